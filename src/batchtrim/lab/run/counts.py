"""The cost of a run so far, and its training errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Counts:
    """The cost of a run so far."""

    seconds: float = 0.0
    seconds_eval: float = 0.0
    samples_forward: int = 0
    samples_backward: int = 0
    steps: int = 0


class CountingLoss:
    """Cross-entropy of each sample. It also counts the errors of the epoch so far, on the device.

    Args:
        device: of the outputs.
        smoothing: label smoothing of the loss trained on.
    """

    def __init__(self, device: torch.device, smoothing: float = 0.0):
        self.device = device
        self.smoothing = smoothing
        self.reset()

    def reset(self) -> None:
        """Start an epoch."""
        self.wrong = torch.zeros((), dtype=torch.int64, device=self.device)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return losses (B,) of ``outputs`` (B, classes) for ``targets`` (B,)."""
        self.count(outputs.detach(), targets)
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.smoothing)

    def plain(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return the losses to rank by if training uses label smoothing; otherwise None."""
        return F.cross_entropy(outputs.detach(), targets, reduction="none") if self.smoothing else None

    def count(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch's errors."""
        self.wrong += (outputs.argmax(1) != targets).sum()
