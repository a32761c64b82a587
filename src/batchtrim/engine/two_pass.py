"""Choose in a forward without a graph, then forward and backward on the kept rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchtrim.engine.batch import Forward, Step
from batchtrim.engine.batch_norm import has_batch_norm
from batchtrim.engine.exact import ExactEngine, is_training_step
from batchtrim.engine.guard import BufferValues, GeneratorStates, device_of, without_graph
from batchtrim.errors import EngineRefused
from batchtrim.losses import Losses
from batchtrim.reduction import reduce_kept
from batchtrim.selection import Selection
from batchtrim.trimmer import Trimmer

__all__ = ["NOT_ELEMENTS", "TwoPassEngine", "padded_rows", "redrawn"]

NOT_ELEMENTS = "it drops samples, and this trimmer chooses among elements (unit='element')"


class TwoPassEngine:
    """What peers do, without their side effects. Cost: (1 + 3q) / 3 of a plain step, below 1 where q < 2/3.

    Buffers are those of the first forward, over the whole batch: running statistics stay right. Two things are not
    exact, and why the shared engine exists: dropout is drawn anew for the kept rows, and BatchNorm normalises them by
    their own statistics. With ``approximate=False`` it refuses both.

    Raises:
        EngineRefused: the trimmer chooses among elements; or, with ``approximate=False``, the second pass would not
            compute what the first one did.
    """

    name = "two_pass"
    repeats_forward = False

    def __init__(self, forward: Forward, trim: Trimmer, *, approximate: bool = True) -> None:
        if trim.unit != "sample":
            raise EngineRefused(NOT_ELEMENTS)
        self.forward = forward
        self.trim = trim
        self.approximate = approximate
        self.exact = ExactEngine(forward, trim)

    def __call__(self, x: Any, y: Any, selection: Selection | None = None) -> Step:
        """One step; ``selection`` is given where the choice was made already."""
        if self.trim.keep == 1.0 or not is_training_step():
            return self.exact(x, y, selection)
        before = None if self.approximate else self._state_unless_redrawn()
        with without_graph():
            losses, outputs = self.forward(x, y, model=self.forward.inner)
        if selection is None:
            selection = self.trim.select(losses, rank_by=self.forward.scores(outputs, y)).rising()
        if before is not None:
            self._refuse_what_is_redrawn(*before, selection)
        return Step(self.train_on_kept(x, y, selection), losses.values, outputs, selection)

    def _state_unless_redrawn(self) -> tuple[GeneratorStates, BufferValues]:
        reason = redrawn(self.forward)
        if reason is not None:
            raise EngineRefused(f"the two-pass engine cannot run this model: {reason}")
        inner = self.forward.inner
        return GeneratorStates(device_of(inner)), BufferValues(inner)

    def _refuse_what_is_redrawn(self, generators: GeneratorStates, buffers: BufferValues, selection: Selection) -> None:
        """Take the first pass back where it drew random numbers, which a second one would draw anew."""
        if generators.same_torch_state(GeneratorStates(generators.device)):
            return
        generators.restore()
        buffers.restore()
        reason = "it draws random numbers (dropout), which a second pass would draw anew"
        raise EngineRefused(f"the two-pass engine cannot run this model: {reason}", selection)

    def pays(self, x: Any, y: Any) -> bool:
        """True where (1 + 3q) / 3 is below 1."""
        return self.trim.keep < 2 / 3

    def train_on_kept(self, x: Any, y: Any, selection: Selection) -> Tensor:
        """The second pass alone: the loss of the kept rows, with a graph. Buffers and generators stay as they are."""
        buffers = BufferValues(self.forward.inner)
        generators = GeneratorStates(selection.indices.device)
        kept, _ = self.forward(*self.forward.rows(x, y, padded_rows(selection), selection.size))
        generators.restore()
        buffers.restore()
        return kept_loss(kept, selection, self.trim)


def redrawn(forward: Forward) -> str | None:
    """Why a second pass would not compute what the first one did, as far as looking at the modules tells."""
    training = [module for module in forward.inner.modules() if module.training]
    if has_batch_norm(training):
        return "BatchNorm would take its statistics from the kept samples alone"
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p for module in training):
        return "a second pass would draw dropout anew"
    return None


def padded_rows(selection: Selection, companions: int = 0) -> Tensor:
    """The kept rows, in rising order, and behind them ``companions`` dropped ones, spread over the batch.

    At least one goes along where a single row or none is kept: a batch of one is a special case to BatchNorm and to
    ``squeeze``. What they add is left out of the loss again by :func:`kept_loss`.
    """
    rows = selection.indices
    wanted = min(max(companions, 2 - selection.k), selection.size - selection.k)
    if wanted <= 0:
        return rows
    dropped = torch.ones(selection.size, dtype=torch.int8, device=rows.device).index_fill_(0, rows, 0)
    others = dropped.argsort(descending=True, stable=True)[: selection.size - selection.k]
    return torch.cat([rows, others[:: len(others) // wanted][:wanted]])


def kept_loss(kept: Losses, selection: Selection, trim: Trimmer) -> Tensor:
    """The loss from a forward over :func:`padded_rows`."""
    weights = kept.weights
    values = kept.values
    if values.shape[0] != selection.k:
        values, weights = values[: selection.k], None if weights is None else weights[: selection.k]
    return reduce_kept(values, selection, trim.scale, weights)
