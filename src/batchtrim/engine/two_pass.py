"""Choose in a forward without a graph, then forward and backward on the kept rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchtrim.engine.batch import Forward, Step
from batchtrim.engine.exact import ExactEngine, is_training_step
from batchtrim.engine.guard import GeneratorStates, without_graph
from batchtrim.losses import Losses
from batchtrim.reduction import reduce_kept
from batchtrim.selection import Selection
from batchtrim.trimmer import Trimmer

__all__ = ["TwoPassEngine", "padded_rows"]


class TwoPassEngine:
    """What peers do, without their side effects. Cost: (1 + 3q) / 3 of a plain step, below 1 where q < 2/3.

    Buffers are those of the first forward, over the whole batch: running statistics stay right. Two things are not
    exact, and why the shared engine exists: dropout is drawn anew for the kept rows, and BatchNorm normalises them by
    their own statistics.
    """

    name = "two_pass"

    def __init__(self, forward: Forward, trim: Trimmer) -> None:
        self.forward = forward
        self.trim = trim
        self.exact = ExactEngine(forward, trim)

    def __call__(self, x: Any, y: Any, selection: Selection | None = None) -> Step:
        """One step; ``selection`` is given where the choice was made already."""
        if self.trim.keep == 1.0 or not is_training_step():
            return self.exact(x, y, selection)
        with without_graph():
            losses, outputs = self.forward(x, y, model=self.forward.inner)
        if selection is None:
            selection = self.trim.select(losses, rank_by=self.forward.scores(outputs, y)).rising()
        return Step(self.train_on_kept(x, y, selection), losses.values, outputs, selection)

    def train_on_kept(self, x: Any, y: Any, selection: Selection) -> Tensor:
        """The second pass alone: the loss of the kept rows, with a graph. Buffers and generators stay as they are."""
        inner = self.forward.inner
        buffers = [(buffer, buffer.clone()) for buffer in inner.buffers()]
        generators = GeneratorStates(selection.indices.device)
        kept, _ = self.forward(*self.forward.rows(x, y, padded_rows(selection), selection.size))
        generators.restore()
        for buffer, value in buffers:
            buffer.data.copy_(value)  # past autograd, which has saved the buffer but not for its value
        return kept_loss(kept, selection, self.trim)


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
