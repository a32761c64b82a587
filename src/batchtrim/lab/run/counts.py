"""What a run has cost so far, and what it got wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Counts:
    """What a run has cost so far."""

    seconds: float = 0.0
    seconds_eval: float = 0.0
    samples_forward: int = 0
    samples_backward: int = 0
    steps: int = 0


class CountingLoss:
    """Cross-entropy of each sample, and on the side the errors of the epoch so far; they stay on the device.

    Args:
        device: of the outputs. smoothing: label smoothing of the loss that is trained on.
    """

    def __init__(self, device: torch.device, smoothing: float = 0.0):
        self.device = device
        self.smoothing = smoothing
        self.reset()

    def reset(self) -> None:
        """Start an epoch."""
        self.wrong = torch.zeros((), dtype=torch.int64, device=self.device)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Losses (B,) of ``outputs`` (B, classes) for ``targets`` (B,)."""
        self.count(outputs.detach(), targets)
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.smoothing)

    def plain(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """The losses to rank by where smoothing is in those that are trained on; None where it is not."""
        return F.cross_entropy(outputs.detach(), targets, reduction="none") if self.smoothing else None

    def count(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch's errors."""
        self.wrong += (outputs.argmax(1) != targets).sum()
