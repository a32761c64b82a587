"""Look at the precision in which float32 is multiplied, and set it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["coarsest_dtype", "full_float32", "in_tf32", "uses_tf32"]

_COARSER = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # each has fewer digits than the one before


def coarsest_dtype(model: nn.Module, losses: Tensor) -> torch.dtype:
    """Return the least precise dtype in use, as far as is visible from outside; TF32 counts as float16."""
    device = losses.device
    seen = {losses.dtype, *(each.dtype for each in model.parameters())}
    if torch.is_autocast_enabled(device.type):
        seen.add(torch.get_autocast_dtype(device.type))
    if uses_tf32(device):
        seen.add(torch.float16)  # TF32 has as many digits
    return max(seen.intersection(_COARSER), key=_COARSER.index, default=torch.float32)


def uses_tf32(device: torch.device) -> bool:
    """Return True if products of float32 may be computed with TF32's ten bits, which is cuDNN's default."""
    return any(in_tf32(device))


def in_tf32(device: torch.device) -> tuple[bool, bool]:
    """Return whether matrix products, and whether convolutions and recurrent layers, may be computed with TF32."""
    if device.type != "cuda":
        return False, False
    products, *others = (getattr(place, name) in (True, "tf32") for place, name in _tf32_switches())
    return products, any(others)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products of float32 in full float32 inside the block, on a GPU too."""
    before = [(place, name, getattr(place, name)) for place, name in _tf32_switches()]
    try:
        for place, name, value in before:
            setattr(place, name, "ieee" if isinstance(value, str) else False)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _tf32_switches() -> list[tuple[Any, str]]:
    """Return the switches that allow TF32: from torch 2.9 on, one for each kind of operator.

    There the older switches raise once a user has set one of the new ones.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        return [(place, "fp32_precision") for place in (matmul, cudnn.conv, cudnn.rnn)]
    return [(matmul, "allow_tf32"), (cudnn, "allow_tf32")]
