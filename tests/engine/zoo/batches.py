"""Batches for the networks of the zoo."""

from __future__ import annotations

import torch
from torch import Tensor


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def vectors(batch: int, size: int = 8) -> Tensor:
    return torch.randn(batch, size)


def tokens(batch: int, length: int = 6) -> Tensor:
    return torch.randint(0, 11, (batch, length))


def images_channels_last(batch: int) -> Tensor:
    return images(batch).to(memory_format=torch.channels_last)
