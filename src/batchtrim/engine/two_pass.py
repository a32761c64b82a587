"""Choose after a forward without a graph, then run forward and backward on the kept rows."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim._checks import in_one_line
from batchtrim.engine.batch import StepResult, kept_loss, padded_rows
from batchtrim.engine.batch_norm import has_batch_norm
from batchtrim.engine.compilation import run_uncompiled
from batchtrim.engine.exact import ExactEngine, is_training_step
from batchtrim.engine.forward import Forward
from batchtrim.engine.model_facts import is_lazy, no_values
from batchtrim.engine.probe import Probe
from batchtrim.engine.reachable import Reachable
from batchtrim.engine.rows import copied
from batchtrim.engine.state import Snapshot, restored, without_graph
from batchtrim.engine.tolerance import Tolerance
from batchtrim.engine.wrappers import runs_again, sync_buffers
from batchtrim.engine.writes import ParameterWrites
from batchtrim.errors import EngineRefused
from batchtrim.losses import Losses
from batchtrim.selection import Selection
from batchtrim.selection.base import asks_for_all
from batchtrim.trimmer import Trimmer

__all__ = ["NOT_ELEMENTS", "TwoPassEngine", "redrawn"]

NOT_ELEMENTS = "it drops samples, and this trimmer chooses among elements (unit='element')"
_logger = logging.getLogger("batchtrim")
_CANNOT = "the two-pass engine cannot run this model: {}"
_DRAWN = "it draws random numbers (dropout), which a second pass would draw anew"
_BATCH_NORM = "BatchNorm would take its statistics from the kept samples alone"


class TwoPassEngine:
    """Two passes, as in other projects, but checked and without their side effects.

    They cost (1 + 3q) / 3 of a plain step, which is below 1 for q < 2/3.

    In every step, the kept losses of the second pass must equal those of the first; otherwise the engine refuses,
    because the kept rows behave differently alone than in the batch. What a loss does not show (a gate that is
    still zero) is looked for in steps 1, 2, 4, 8, ..., on a few rows; see :class:`batchtrim.engine.probe.Probe`.

    Buffers, plain attributes and generators are those of the first forward, over the whole batch, and the second
    starts from where the first did. Two things are not exact, which is why the shared engine exists: dropout is
    drawn anew for the kept rows, and BatchNorm normalises them by their own statistics. :attr:`approximation` and one
    line of the log then say so; ``approximate=False`` refuses both.

    Raises:
        EngineRefused: the trimmer chooses among elements; the batch has something that cannot be cut to rows; samples
            depend on one another; or, with ``approximate=False``, the second pass would draw or normalise anew. The
            model's state and the batch are then what they were before the step.
    """

    name = "two_pass"
    repeats_forward = False
    traces = False
    pays_below = 0.6  # above 2/3 two passes cost more than one, and the engine itself has a cost too

    def __init__(self, forward: Forward, trim: Trimmer, *, approximate: bool = True) -> None:
        if trim.unit != "sample":
            raise EngineRefused(NOT_ELEMENTS)
        self.forward = forward
        self.trim = trim
        self.approximate = approximate
        self.exact = ExactEngine(forward, trim)
        self.tolerance = Tolerance(forward)
        self.probe = Probe(forward, self.tolerance)
        self.approximation: str | None = None  # why the last step's gradient is not exact
        self.logged = False
        self.looked_for_writes = False
        self._unseen = ""  # why that could not be done

    def __call__(self, x: Any, y: Any, selection: Selection | None = None) -> StepResult:
        """Run one step; ``selection`` is given if the choice is already made."""
        whole = asks_for_all(self.trim.rule, self.trim.keep)
        if whole or not is_training_step() or is_lazy(self.forward.inner):
            return self.exact(x, y, selection)
        if (reason := no_values(self.forward.inner)) is not None:
            raise EngineRefused(_CANNOT.format(reason))
        if not self.approximate and (reason := redrawn(self.forward)) is not None:
            raise EngineRefused(_CANNOT.format(reason))
        sync_buffers(self.forward.model)
        before = Snapshot(self.forward, x, y)
        if before.lasting is not None:
            raise EngineRefused(_CANNOT.format(before.lasting))
        if not self.looked_for_writes:
            self._look_for_writes(before, x, y)
        losses, outputs = self._first_pass(before, x, y)
        try:
            if not self.looked_for_writes:
                raise EngineRefused(_CANNOT.format(f"it runs on its batch, but not on a copy of it ({self._unseen})"))
            if selection is None:
                selection = self.trim.select(losses, rank_by=self.forward.scores(losses, outputs, y)).rising()
            loss = self.train_on_kept(x, y, selection, (before, losses.values))
        except EngineRefused:
            before.restore(batch=True)
            raise
        return StepResult(loss, losses.values, outputs, selection, engine=self.name, approximate=self.approximation)

    def _look_for_writes(self, before: Snapshot, x: Any, y: Any) -> None:
        """Refuse a forward that writes into parameters: with a second one, they would be written twice."""
        writes, seen = ParameterWrites(self.forward.inner, others=before.model.watched), False

        def run() -> None:
            with without_graph(), writes:
                self.forward(*copied((x, y)), model=self.forward.inner)

        def undo() -> None:
            writes.restore()
            before.restore()

        try:
            run_uncompiled(self.forward, run, undo)
            seen = True
        except Exception as error:  # a fault of the model shows in the first pass
            self._unseen = in_one_line(error)
        finally:
            written = writes.written()
            undo()
        if written:
            raise EngineRefused(
                _CANNOT.format(
                    "its forward writes into its parameters, or into tensors it holds, which a second pass would repeat"
                )
            )
        self.looked_for_writes = seen

    def _first_pass(self, before: Snapshot, x: Any, y: Any) -> tuple[Losses, Any]:
        try:
            with without_graph():
                return self.forward(x, y, model=self.forward.inner)
        except Exception as error:
            before.restore(batch=True)
            self.forward(*copied((x, y)), model=self.forward.inner)  # a model at fault raises its own error
            before.restore(batch=True)
            raise EngineRefused(_CANNOT.format(f"it does not run without a graph ({in_one_line(error)})")) from error

    def pays(self, x: Any, y: Any) -> bool:
        """Return True if (1 + 3q) / 3 is below 1."""
        return self.trim.expected_keep < 2 / 3

    def train_on_kept(
        self, x: Any, y: Any, selection: Selection, first: tuple[Snapshot, Tensor] | None = None
    ) -> Tensor:
        """Return the loss of the kept rows, with a graph, from the second pass alone.

        Args:
            first: of the pass that scored: the state before it with the batch as it was, and all losses, (B,), to
                compare with. Without it the state is as now, and nothing is compared.

        Raises:
            EngineRefused: the kept losses differ from those scored. Buffers, attributes and generators are in any case
                as they were found.
        """
        try:
            return self._train_on_kept(x, y, selection, first)
        except EngineRefused as refused:
            runs_again(self.forward.model)
            reason = (first and self._other_losses(*first)) or refused
            raise EngineRefused(_CANNOT.format(reason), selection) from refused.__cause__

    def _train_on_kept(self, x: Any, y: Any, selection: Selection, first: tuple[Snapshot, Tensor] | None) -> Tensor:
        before, scored = first or (Snapshot(self.forward, x, y), None)
        if (what := before.shared.written()) is not None:
            raise EngineRefused(f"its forward writes into {what}: in a second pass over the kept rows, these are apart")
        after = Snapshot(self.forward)
        drawn = not before.generators.same(after.generators)
        normed = has_batch_norm([module for module in before.model.modules if module.training])
        try:
            self.probe(before, selection.size, scored, redrawn=drawn or normed)
            before.restore()
            rows = padded_rows(selection)
            kept = self._second_pass(*self.forward.rows(before.x, before.y, rows, selection.size))
            if self.probe.is_due:
                self._look_for_graphs()
        finally:
            after.restore()
        self.approximation = None
        if scored is not None:
            self._compare(kept.values[: selection.k].detach(), scored, selection, before, drawn, normed)
        return kept_loss(kept, selection, self.trim)

    def _other_losses(self, before: Snapshot, scored: Tensor) -> str | None:
        """Return a reason if the whole batch has other losses when it runs again from the same state."""
        try:
            with restored(before), without_graph():
                again = self.forward(*copied((before.x, before.y)), model=self.forward.inner)[0].values
            self.tolerance.compare(again, scored, torch.arange(len(scored), device=scored.device), before)
        except EngineRefused:
            return (
                "its losses change when it runs again from the same state: it keeps state elsewhere, or draws numbers"
            )
        except Exception:  # what was found first is the reason
            return None
        return None

    def _look_for_graphs(self) -> None:
        """Refuse a model that keeps a tensor of its graph: a loss term from it would have no gradient."""
        found = Reachable(self.forward.inner, self.forward.per_sample_loss).with_graph
        if found:
            raise EngineRefused(
                f"it keeps a tensor with its graph ({found[0]}), which is one pass's. Keep a detached one"
            )

    def _compare(
        self, kept: Tensor, scored: Tensor, selection: Selection, before: Snapshot, drawn: bool, normed: bool
    ) -> None:
        try:
            apart = drawn or normed
            self.tolerance.compare(kept, scored, selection.indices, before, drawn=drawn, expected_apart=apart)
        except EngineRefused as refused:
            if not (drawn or normed):
                raise
            reason = _DRAWN if drawn else _BATCH_NORM
            if not self.approximate:
                raise EngineRefused(reason) from refused
            if not self.logged:
                _logger.warning("engine='two_pass' is approximate for this model: %s.", reason)
            self.logged, self.approximation = True, reason

    def _second_pass(self, x: Any, y: Any) -> Losses:
        try:
            return self.forward(x, y)[0]
        except (EngineRefused, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise EngineRefused(f"it cannot run on a part of the batch ({in_one_line(error)})") from error


def redrawn(forward: Forward) -> str | None:
    """Return why a second pass would differ from the first, as far as the modules show, or None."""
    training = [module for module in forward.inner.modules() if module.training]
    if has_batch_norm(training):
        return _BATCH_NORM
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p for module in training):
        return "a second pass would draw dropout anew"
    if any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse for module in forward.inner.modules()):
        return "an embedding's sparse gradient would lack the words of dropped samples, which SparseAdam updates too"
    return None
