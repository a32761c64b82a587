"""The obvious engine: one forward with a graph, then the kept losses. It defines what the right gradient is."""

from __future__ import annotations

from typing import Any

import torch

from batchtrim.engine.batch import Forward, StepResult, map_tensors
from batchtrim.reduction import reduce_kept
from batchtrim.selection import Selection
from batchtrim.trimmer import Trimmer

__all__ = ["ExactEngine", "is_training_step"]


class ExactEngine:
    """Forward and backward over the whole batch; a dropped sample is a row of zeros in backward. Cost: 1."""

    name = "exact"
    repeats_forward = True

    def __init__(self, forward: Forward, trim: Trimmer) -> None:
        self.forward = forward
        self.trim = trim

    def __call__(self, x: Any, y: Any, selection: Selection | None = None) -> StepResult:
        """Run one step; ``selection`` is given if the choice is already made."""
        losses, outputs = self.forward(x, y)
        if selection is None:
            selection = self.trim.select(losses.detach(), rank_by=self.forward.scores(outputs, y)).rising()
        kept, weights = losses.values, losses.weights
        if not selection.everything:
            kept = kept.index_select(0, selection.indices)
            weights = None if weights is None else weights.index_select(0, selection.indices)
        loss = reduce_kept(kept, selection, self.trim.scale, weights)
        return StepResult(
            loss, losses.values.detach(), map_tensors(torch.Tensor.detach, outputs), selection, engine=self.name
        )

    def train_on_kept(self, x: Any, y: Any, selection: Selection, first: Any = None) -> torch.Tensor:
        """Return the loss of rows that were chosen before."""
        return self(x, y, selection).loss

    def pays(self, x: Any, y: Any) -> bool:
        """Return False: it saves nothing."""
        return False


def is_training_step() -> bool:
    """Return True if a backward may follow. If none can, every engine is one forward."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
