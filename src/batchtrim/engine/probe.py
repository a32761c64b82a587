"""Check on a few rows, by their losses, gradients and NaN, that samples do not depend on one another.

This is not a proof, which needs the graph. It is for the engine that runs models without a captured graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim._checks import in_one_line
from batchtrim.engine.batch_norm import has_batch_norm
from batchtrim.engine.compilation import uncompiled_calls
from batchtrim.engine.cpu_first import CpuFirst
from batchtrim.engine.forward import Forward
from batchtrim.engine.generators import GeneratorStates
from batchtrim.engine.gradients import gradients_without_hooks
from batchtrim.engine.model_facts import is_sharded
from batchtrim.engine.rows import copied, tensors_of
from batchtrim.engine.state import ModelState, Snapshot, restored, without_graph
from batchtrim.engine.tolerance import Tolerance
from batchtrim.engine.writes import ParameterWrites
from batchtrim.errors import EngineRefused

__all__ = ["Probe"]

_FEWEST = 4  # rows that are worth a check
_ROWS = 8  # every second one of them is then run alone


class _CannotRun(EngineRefused):
    """The model or its backward raises an error on a part of the batch, or in evaluation mode."""


class Probe:
    """Look for samples that depend on one another, in an engine's steps 1, 2, 4, 8, ...

    Eight rows go through the model, then every second of them alone. Three things must be the same for these rows:

    * their losses;
    * each parameter's gradient, which shows an interaction behind a weight that is zero, a hook that looks at the
      batch, or a gradient that counts the batch;
    * their losses if every float of the rows in between is NaN.

    If the rows in between are replaced by others, losses and gradients must be the same up to rounding. That shows
    interactions too weak for the other checks, and those of integers, which cannot be NaN. A model with dropout or
    BatchNorm is checked in evaluation mode; in training mode only beside NaN and beside other rows, without BatchNorm.
    """

    def __init__(self, forward: Forward, tolerance: Tolerance) -> None:
        self.forward = forward
        self.tolerance = tolerance
        self.calls = 0

    @property
    def is_due(self) -> bool:
        """True in steps 1, 2, 4, 8, ..."""
        return not self.calls & (self.calls - 1)

    def __call__(self, before: Snapshot, batch: int, scored: Tensor | None, *, redrawn: bool) -> None:
        """Check if a check is due; then restore everything to ``before``.

        Args:
            before: the state before the first pass, and the batch as it was.
            scored: (B,), the losses of the first pass.
            redrawn: True if the first pass drew random numbers or normalised by the batch.

        Raises:
            EngineRefused: the samples depend on one another.
        """
        self.calls += 1
        if not self.is_due or (batch < _FEWEST and not any(map(is_sharded, before.model.modules))):
            return  # a sharded model's forwards wait for those of other ranks, which may have more rows
        for module in before.model.modules:
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.scale_grad_by_freq:
                raise EngineRefused("an embedding with scale_grad_by_freq counts how often the whole batch has a word")
        try:
            self._check(before, batch, scored, redrawn)
        except _CannotRun:
            if self.forward.needs_compiler:
                raise
            # perhaps a part of it runs only compiled; see run_uncompiled()
            self.forward.needs_compiler = True
            try:
                self._check(before, batch, scored, redrawn)
            except _CannotRun:
                self.forward.needs_compiler = False
                raise

    def _check(self, before: Snapshot, batch: int, scored: Tensor | None, redrawn: bool) -> None:
        rows = torch.linspace(0, batch - 1, min(batch, _ROWS)).long()
        poisoned = torch.arange(len(rows)) % 2 == 1
        # a compiled model would be recompiled for so few rows, and would free its buffers after one gradient
        with uncompiled_calls(self.forward), restored(before), _tried_on_cpu(before):
            if not redrawn and scored is not None:
                self._ask(before, batch, rows, poisoned, scored)
                self._look_for_moves(before, batch, rows)
                return
            with _evaluation(before.model.modules):
                known = self._evaluated(before)
                self._ask(before, batch, rows, poisoned, known)
            self._look_for_moves(before, batch, rows)
            with _evaluation([each for each in before.model.modules if has_batch_norm([each])]):
                rows, poisoned = rows.to(known.device), poisoned.to(known.device)
                beside = self._beside_nan(before, batch, rows, poisoned)
                self._beside_others(before, batch, rows, poisoned)
        if scored is not None and beside is not None and beside.isnan().any() and not scored.isnan().any():
            raise EngineRefused("its samples depend on one another in training mode (one that is NaN spreads)")

    def _ask(self, before: Snapshot, batch: int, rows: Tensor, poisoned: Tensor, scored: Tensor) -> None:
        try:
            self._compare(before, batch, rows.to(scored.device), poisoned.to(scored.device), scored)
        except EngineRefused as refused:
            drawn = not before.generators.same(GeneratorStates(before.generators.device))
            beside = self._beside_nan(before, batch, rows.to(scored.device), poisoned.to(scored.device))
            if not drawn or (beside is not None and beside.isnan().any()):
                raise
            raise EngineRefused(
                "it draws random numbers for each sample, in evaluation mode too, which a second pass would draw anew"
            ) from refused

    def _compare(self, before: Snapshot, batch: int, rows: Tensor, poisoned: Tensor, scored: Tensor) -> None:
        some = rows[~poisoned]
        all_losses = self._losses(before, batch, rows)
        self.tolerance.compare(all_losses.detach(), scored, rows, before, where=f"{len(rows)} probed")
        few_losses = self._losses(before, batch, some)
        self.tolerance.compare(few_losses.detach(), scored, some, before, where=f"{len(some)} probed")
        gradients = self._named_gradients(all_losses[~poisoned], before)
        self.tolerance.compare_gradients(gradients, self._named_gradients(few_losses, before))
        other_losses = self._losses(before, batch, _others(rows, poisoned))
        self.tolerance.compare_beside_others(all_losses.detach()[~poisoned], other_losses.detach()[~poisoned], some)
        beside_others = self._named_gradients(other_losses[~poisoned], before)
        self.tolerance.compare_gradients(gradients, beside_others, same_size=True)
        beside = self._beside_nan(before, batch, rows, poisoned)
        if beside is not None:
            self.tolerance.compare(beside, scored, some, before, where="probed, beside NaN,")

    def _losses(self, before: Snapshot, batch: int, rows: Tensor) -> Tensor:
        before.restore(modes=False)
        try:
            losses, _ = self.forward(*self.forward.rows(before.x, before.y, rows, batch), model=self.forward.inner)
        except (EngineRefused, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _CannotRun(f"it cannot run on a part of the batch ({in_one_line(error)})") from error
        if losses.values.shape[0] != len(rows):
            raise EngineRefused(f"it returns {losses.values.shape[0]} losses for {len(rows)} samples of the batch")
        return losses.values

    def _evaluated(self, before: Snapshot) -> Tensor:
        """Return the whole batch's losses in evaluation mode."""
        try:
            with without_graph():
                return self.forward(*copied((before.x, before.y)), model=self.forward.inner)[0].values
        except (EngineRefused, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _CannotRun(
                "it draws random numbers, or normalises by the batch, and does not run in evaluation mode, in which "
                f"such a model is checked ({in_one_line(error)})"
            ) from error

    def _beside_others(self, before: Snapshot, batch: int, rows: Tensor, poisoned: Tensor) -> None:
        """Refuse if losses change beside other rows, unless the rows decide how many random numbers are drawn."""
        losses, drawn = [], []
        with without_graph():
            for each in (rows, _others(rows, poisoned)):
                losses.append(self._losses(before, batch, each)[~poisoned])
                drawn.append(GeneratorStates(before.generators.device))
        if drawn[0].same(drawn[1]):
            self.tolerance.compare_beside_others(losses[0], losses[1], rows[~poisoned])

    def _look_for_moves(self, before: Snapshot, batch: int, rows: Tensor) -> None:
        """Refuse a model whose backward changes state or generators: two passes would do so by the kept rows."""
        losses = self._losses(before, batch, rows)
        parameters = [p for p in self.forward.inner.parameters() if p.requires_grad]
        if not losses.requires_grad or not parameters or any(type(p) is not nn.Parameter for p in parameters):
            return
        state, generators = ModelState(*before.model.roots), GeneratorStates(before.generators.device)
        self._differentiate(losses, parameters, before)
        if not generators.same(GeneratorStates(generators.device)):
            raise EngineRefused("its backward draws random numbers (a checkpoint with preserve_rng_state=False does)")
        if (name := state.unlike(ModelState(*before.model.roots), 0.0)) is not None:
            raise EngineRefused(f"its backward changes state ({name}), and would do so by the kept rows alone")

    def _named_gradients(self, losses: Tensor, before: Snapshot) -> dict[str, Tensor | None]:
        """Return the gradient of every parameter and of every batch tensor that requires one. Frees the graph."""
        named = [(f"parameter {name}", p) for name, p in self.forward.inner.named_parameters() if p.requires_grad]
        if any(type(p) is not nn.Parameter for _, p in named):
            return {}  # sharded parameters (DTensor) have hooks that a gradient asked for here would not run
        asking = [tensor for tensor in tensors_of((before.x, before.y)) if tensor.requires_grad]
        named += [(f"input {number}", tensor) for number, tensor in enumerate(asking)]
        if not named or not losses.requires_grad:
            return {}
        gradients = self._differentiate(losses, [tensor for _, tensor in named], before)
        return dict(zip([name for name, _ in named], gradients, strict=True))

    def _differentiate(self, losses: Tensor, tensors: list[Any], before: Snapshot) -> list[Tensor | None]:
        writes = ParameterWrites(self.forward.inner, others=before.model.watched)
        weights = torch.full_like(losses, 1 / max(1, losses.numel()))
        try:
            with writes:
                found = gradients_without_hooks(losses, tensors, weights, keep=False)
            written = writes.written()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _CannotRun(f"its gradient cannot be asked for twice ({in_one_line(error)})") from error
        finally:
            writes.restore()
        if written:
            raise EngineRefused(f"its backward writes into {min(written)}, and would do so by the kept rows alone")
        return found

    def _beside_nan(self, before: Snapshot, batch: int, rows: Tensor, poisoned: Tensor) -> Tensor | None:
        """Return the losses of the other rows if the poisoned ones are NaN; None if the model does not accept NaN."""
        before.restore(modes=False)
        try:
            with without_graph():
                x, y = self.forward.cutter(before.x, before.y, rows, batch, poisoned)
                losses = self.forward(x, y, model=self.forward.inner)[0].values
        except Exception:  # that says nothing about interactions
            return None
        return losses[~poisoned]


def _others(rows: Tensor, poisoned: Tensor) -> Tensor:
    """Return the rows with each poisoned one replaced by one of those in between."""
    others = rows.clone()
    others[poisoned] = rows[~poisoned][: int(poisoned.sum())]
    return others


def _tried_on_cpu(snapshot: Snapshot) -> AbstractContextManager[Any]:
    """Try on the CPU what could end a GPU process: NaN for a probability, indices beyond a shorter table."""
    on_gpu = any(each.device.type == "cuda" for each in tensors_of((snapshot.x, snapshot.y)))
    return CpuFirst() if on_gpu else nullcontext()


@contextmanager
def _evaluation(modules: list[nn.Module]) -> Iterator[None]:
    """Set modules to evaluation mode one by one, past a ``train()`` that a model overrides.

    In this mode and without a graph, torch's attention takes a shorter way, whose outputs at padding are others.
    """
    modes = [(module, module.training) for module in modules]
    shorter = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in modules:
            module.training = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(shorter)
        for module, mode in modes:
            module.training = mode
