"""Take rows of a tensor, and put rows back among zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from batchtrim.engine.layout import Rows

__all__ = ["cut", "put_back"]


def _factors(layout: Rows, size: int, batch: int) -> tuple[int, int, int]:
    axis = layout.axes[0]
    assert axis is not None
    if axis.outer is None:
        return axis.dim, size // batch, 1
    if isinstance(axis.inner, int):
        return axis.dim, size // (batch * axis.inner), axis.inner
    return axis.dim, int(axis.outer), size // (batch * int(axis.outer))


def cut(tensor: Tensor, layout: Rows, rows: Tensor, batch: int) -> Tensor:
    """The given rows of a tensor, in memory in the order in which the tensor has its dimensions."""
    dim, outer, inner = _factors(layout, tensor.shape[layout.axes[0].dim], batch)  # type: ignore[union-attr]
    k = rows.shape[0]
    strides = tensor.stride()
    if layout.iota or strides[dim] == 0:
        return tensor.narrow(dim, 0, outer * k * inner)
    spread = [d for d, stride in enumerate(strides) if stride == 0 and tensor.shape[d] > 1]
    shape = list(tensor.shape)
    for d in spread:
        tensor = tensor.narrow(d, 0, 1)
    order = sorted(range(tensor.ndim), key=lambda d: (-strides[d], d))
    moved = tensor.permute(order)
    at = order.index(dim)
    if outer == 1 and inner == 1:
        moved = moved.index_select(at, rows)
    else:
        moved = moved.unflatten(at, (outer, batch, inner)).index_select(at + 1, rows).flatten(at, at + 2)
    back = [order.index(d) for d in range(tensor.ndim)]
    result = moved.permute(back)
    if spread:
        shape[dim] = outer * k * inner
        result = result.expand(shape)
    return result


def put_back(kept: Tensor, layout: Rows, rows: Tensor, batch: int) -> Tensor:
    """Zeros for all rows, and the kept ones among them: what :func:`cut` takes, the other way."""
    k = rows.shape[0]
    dim, outer, inner = _factors(layout, kept.shape[layout.axes[0].dim], k)  # type: ignore[union-attr]
    shape = list(kept.shape)
    shape[dim] = outer * batch * inner
    whole = kept.new_zeros(shape)
    if kept.ndim == 4 and kept.is_contiguous(memory_format=torch.channels_last):
        whole = whole.to(memory_format=torch.channels_last)
    parts = whole.unflatten(dim, (outer, batch, inner))
    parts.index_copy_(dim + 1, rows, kept.unflatten(dim, (outer, k, inner)))
    return whole
