"""Where the samples of a batch lie in a tensor, and how to take some of them.

Legend: B batch, k kept. A dimension that holds the batch has size ``a * B * c``: the batch index is at ``(i, b, j)``
with i < a and j < c. ``a = c = 1`` is the plain case; ``a = 1`` is batch-major (heads folded behind the batch);
``c = 1`` is batch-minor (time-major layouts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WHOLE", "Layout", "candidates", "close", "take"]

# Largest difference between a row computed in a large and in a small batch, relative to the tensor's largest value.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Layout:
    """The batch lies in dimension ``dim``, ``outer`` times around it and ``inner`` times within."""

    dim: int
    outer: int = 1
    inner: int = 1


# The tensor does not depend on the samples.
WHOLE = Layout(-1)


def candidates(full: torch.Size, part: torch.Size, batch: int, k: int) -> list[Layout]:
    """All layouts under which a tensor of shape ``part``, k rows, can be the rows of one of shape ``full``, B rows.

    That the size changes with the number of rows is what tells the batch from a channel count that happens to equal
    it, so k must differ from B. Two changed dimensions (a matrix of samples against samples) fit no layout.
    """
    if full == part:
        return [WHOLE]
    changed = [dim for dim, (n, m) in enumerate(zip(full, part, strict=False)) if n != m]
    if len(full) != len(part) or len(changed) != 1:
        return []
    dim = changed[0]
    times = full[dim] // batch
    if full[dim] != times * batch or part[dim] != times * k:
        return []
    return [Layout(dim, outer, times // outer) for outer in range(1, times + 1) if times % outer == 0]


def take(tensor: Tensor, layout: Layout, rows: Tensor) -> Tensor:
    """The given samples of ``tensor``, in its own order of strides (channels_last stays so); all of it for WHOLE."""
    if layout is WHOLE:
        return tensor.detach()
    dim, sizes = layout.dim, list(tensor.shape)
    batch = sizes[dim] // (layout.outer * layout.inner)
    sizes[dim] = layout.outer * rows.shape[0] * layout.inner
    order = list(range(tensor.ndim))
    if not tensor.is_contiguous():
        order.sort(key=lambda i: -tensor.stride(i))
        tensor = tensor.permute(order).contiguous()
    # As rows of a matrix: taking whole rows of memory is several times faster than indexing an inner dimension.
    before = math.prod(tensor.shape[: order.index(dim)]) * layout.outer
    if before > 1:
        starts = torch.arange(0, before * batch, batch, device=rows.device)
        rows = (starts.unsqueeze(1) + rows).flatten()
    taken = tensor.view(before * batch, -1).index_select(0, rows).view([sizes[i] for i in order])
    return taken if order == sorted(order) else taken.permute([order.index(i) for i in range(len(order))])


def close(real: Tensor, guess: Tensor) -> bool:
    """Whether two computations of the same rows agree, up to what another order of summation changes."""
    if real.shape != guess.shape or real.dtype != guess.dtype:
        return False
    if not real.dtype.is_floating_point:
        return torch.equal(real, guess)
    if real.numel() == 0:
        return True
    tolerance = _TOLERANCE.get(real.dtype, 6e-2)
    difference = (real - guess).abs().amax()
    return bool(difference <= tolerance * real.abs().amax())
