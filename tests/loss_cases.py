"""Batches that tests of losses share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchtrim import Losses, per_sample

WEIGHT = torch.tensor([1.0, 3.0, 0.5])


def pixels(batch: int = 4, classes: int = 3, size: int = 6) -> tuple[Tensor, Tensor]:
    """Return logits and labels of small images, of which one is half and another wholly unlabelled."""
    labels = torch.randint(0, classes, (batch, size, size))
    labels[0, : size // 2] = 255
    labels[1] = 255
    return torch.randn(batch, classes, size, size, requires_grad=True), labels


def token_losses_by_sample() -> Losses:
    return per_sample(nn.CrossEntropyLoss())(torch.randn(2, 3, 4), torch.randint(0, 3, (2, 4)))
