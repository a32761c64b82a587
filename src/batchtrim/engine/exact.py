"""Run one forward with a graph, and backward from the kept losses. This engine defines the right gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchtrim.engine.batch import StepResult, map_tensors
from batchtrim.engine.forward import Forward
from batchtrim.reduction import reduce
from batchtrim.selection import Selection
from batchtrim.trimmer import Trimmer

__all__ = ["ExactEngine", "is_training_step"]


class ExactEngine:
    """Run forward and backward over the whole batch; a dropped sample is a row of zeros in backward. Cost: 1."""

    name = "exact"
    repeats_forward = True
    traces = False
    pays_below = 0.0

    def __init__(self, forward: Forward, trim: Trimmer) -> None:
        self.forward = forward
        self.trim = trim

    def __call__(self, x: Any, y: Any, selection: Selection | None = None) -> StepResult:
        """Run one step; ``selection`` is given if the choice is already made."""
        losses, outputs = self.forward(x, y)
        if selection is None:
            selection = self.trim.select(losses, rank_by=self.forward.scores(losses, outputs, y))
        loss = reduce(losses, selection, self.trim.scale)
        outputs = outputs.detach() if type(outputs) is Tensor else map_tensors(Tensor.detach, outputs)
        return StepResult(loss, losses.values.detach(), outputs, selection, engine=self.name)

    def train_on_kept(self, x: Any, y: Any, selection: Selection, first: Any = None) -> Tensor:
        """Return the loss of rows chosen earlier."""
        return self(x, y, selection).loss

    def pays(self, x: Any, y: Any) -> bool:
        """Return False: it saves nothing."""
        return False


def is_training_step() -> bool:
    """True if a backward may follow; otherwise every engine runs one forward."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
