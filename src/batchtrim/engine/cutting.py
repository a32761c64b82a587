"""Take rows of a tensor, and put rows back among zeros.

Kept rows run as a batch of k samples; kept tokens run as a batch of k samples with one token each.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from batchtrim.engine.layout import RowLayout

__all__ = ["KeptRows", "can_be_cut", "cut", "gather", "put_back", "spread"]


@dataclass(frozen=True)
class KeptRows:
    """The rows that are kept.

    Attributes:
        rows: int64 (k,), in ascending order; for tokens, their positions in the losses of shape (batch, tokens).
        batch: the number of samples.
        tokens: how many tokens of each sample have a loss, if tokens are rows.
        lost: how many tokens at the end of each sample have no loss.
    """

    rows: Tensor
    batch: int
    tokens: int | None = None
    lost: int = 0

    @property
    def k(self) -> int:
        return self.rows.shape[0]

    def places(self) -> tuple[Tensor, Tensor]:
        """Return the sample of every token, and its position in the sample."""
        assert self.tokens is not None
        return self.rows // self.tokens, self.rows % self.tokens


def can_be_cut(layout: RowLayout, symbols: int) -> bool:
    """True if rows in this layout can be taken and put back.

    Samples can, in any layout in which one factor is a number. Tokens can, if samples and tokens are separate
    dimensions or one dimension, sample by sample and with nothing in between (such as heads); or if all tokens of a
    sample hold the same values.
    """
    if symbols == 1:
        (axis,) = layout.axes
        return axis is not None and (isinstance(axis.inner, int) or isinstance(axis.outer, int))
    sample, token = layout.axes
    if sample is None or layout.iota:
        return False
    if token is None or token.dim != sample.dim:
        return sample.plain and (token is None or token.plain)
    return sample.outer == 1 and token.inner == 1 and isinstance(token.outer, sympy.Symbol)  # the number of samples


def cut(tensor: Tensor, layout: RowLayout, kept: KeptRows) -> Tensor:
    """Return the kept rows of a tensor."""
    return _cut_samples(tensor, layout, kept) if kept.tokens is None else _cut_tokens(tensor, layout, kept)


def put_back(value: Tensor, layout: RowLayout, kept: KeptRows) -> Tensor:
    """Return zeros for all rows with the kept rows among them: the inverse of :func:`cut`."""
    return _put_samples(value, layout, kept) if kept.tokens is None else _put_tokens(value, layout, kept)


# --- the same, to be compiled: nothing is written in place, and the compiler picks the memory layout ------------------


def gather(tensor: Tensor, layout: RowLayout, kept: KeptRows) -> Tensor:
    """Return the kept rows of a tensor, through operators that fuse with their readers."""
    sample = layout.axes[0]
    assert sample is not None
    if kept.tokens is None:
        dim, outer, inner = _factors(layout, tensor.shape[sample.dim], kept.batch)
        if layout.iota:
            return _first_samples(tensor, dim, (outer, kept.batch, inner), kept.k)
        if outer == 1 and inner == 1:
            return _take(tensor, {dim: kept.rows})
        return _take(tensor.unflatten(dim, (outer, kept.batch, inner)), {dim + 1: kept.rows}).flatten(dim, dim + 2)
    samples, places = kept.places()
    token = layout.axes[1]
    if token is None:
        return _take(tensor, {sample.dim: samples})
    if token.dim == sample.dim:
        return _take(tensor, {sample.dim: samples * (tensor.shape[sample.dim] // kept.batch) + places})
    rest = [d for d in range(tensor.ndim) if d not in (sample.dim, token.dim)]
    order = [sample.dim, token.dim, *rest]
    taken = _take(tensor.permute(order), {0: samples, 1: places}).unsqueeze(1)
    return taken.permute([order.index(d) for d in range(tensor.ndim)])


def spread(value: Tensor, layout: RowLayout, kept: KeptRows) -> Tensor:
    """Return what :func:`put_back` returns: each row reads its kept row, or is zero."""
    sample = layout.axes[0]
    assert sample is not None
    k = torch.arange(kept.k, device=kept.rows.device)
    if kept.tokens is None:
        dim, outer, inner = _factors(layout, value.shape[sample.dim], kept.k)
        from_row = kept.rows.new_full((kept.batch,), -1).scatter(0, kept.rows, k)
        whole = _take_or_zero(value.unflatten(dim, (outer, kept.k, inner)), dim + 1, from_row)
        return whole.flatten(dim, dim + 2)
    token = layout.axes[1]
    assert token is not None
    samples, places = kept.places()
    width = kept.tokens + kept.lost - int(token.lost)
    from_row = kept.rows.new_full((kept.batch * width,), -1).scatter(0, samples * width + places, k)
    if token.dim == sample.dim:
        return _take_or_zero(value, sample.dim, from_row)
    rest = [d for d in range(value.ndim) if d not in (sample.dim, token.dim)]
    order = [sample.dim, token.dim, *rest]
    whole = _take_or_zero(value.permute(order).squeeze(1), 0, from_row).unflatten(0, (kept.batch, width))
    return whole.permute([order.index(d) for d in range(value.ndim)])


def _take(tensor: Tensor, at: dict[int, Tensor]) -> Tensor:
    """Index without a check of bounds: the rows are known to exist."""
    return torch.ops.aten._unsafe_index(tensor, [at.get(d) for d in range(max(at) + 1)])


def _take_or_zero(value: Tensor, dim: int, from_row: Tensor) -> Tensor:
    there = (from_row >= 0).view([-1 if d == dim else 1 for d in range(value.ndim)])
    return torch.where(there, _take(value, {dim: from_row.clamp_min(0)}), value.new_zeros(()))


# --- samples ---------------------------------------------------------------------------------------------------------


def _factors(layout: RowLayout, size: int, batch: int) -> tuple[int, int, int]:
    axis = layout.axes[0]
    assert axis is not None
    if isinstance(axis.inner, int):
        return axis.dim, size // (batch * axis.inner), axis.inner
    assert axis.outer is not None
    return axis.dim, int(axis.outer), size // (batch * int(axis.outer))


def _cut_samples(tensor: Tensor, layout: RowLayout, kept: KeptRows) -> Tensor:
    """Cut samples; the result keeps the tensor's order of dimensions in memory."""
    axis = layout.axes[0]
    assert axis is not None
    contiguous = tensor.is_contiguous()
    if contiguous and tensor.shape[axis.dim] == kept.batch and not layout.iota:  # the common case: a step cuts hundreds
        return tensor.index_select(axis.dim, kept.rows)
    dim, outer, inner = _factors(layout, tensor.shape[axis.dim], kept.batch)
    size = outer * kept.k * inner
    strides = tensor.stride()
    if layout.iota:
        return _first_samples(tensor, dim, (outer, kept.batch, inner), kept.k)
    if strides[dim] == 0:
        return tensor.narrow(dim, 0, size)
    if contiguous:
        before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
        parts = tensor.view(*before, outer, kept.batch, inner, *after)
        return parts.index_select(dim + 1, kept.rows).view(*before, size, *after)
    spread = [d for d, stride in enumerate(strides) if stride == 0 and tensor.shape[d] > 1]
    shape = list(tensor.shape)
    for d in spread:
        tensor = tensor.narrow(d, 0, 1)
    order = sorted(range(tensor.ndim), key=lambda d: (-strides[d], d))
    moved = tensor.permute(order)
    at = order.index(dim)
    if outer == 1 and inner == 1:
        moved = moved.index_select(at, kept.rows)
    else:
        moved = moved.unflatten(at, (outer, kept.batch, inner)).index_select(at + 1, kept.rows).flatten(at, at + 2)
    result = moved.permute([order.index(d) for d in range(tensor.ndim)])
    if spread:
        shape[dim] = size
        result = result.expand(shape)
    return result


def _first_samples(tensor: Tensor, dim: int, factors: tuple[int, int, int], k: int) -> Tensor:
    """Return the first k samples: the positions that kept samples have among themselves."""
    return tensor.unflatten(dim, factors).narrow(dim + 1, 0, k).flatten(dim, dim + 2)


def _put_samples(value: Tensor, layout: RowLayout, kept: KeptRows) -> Tensor:
    dim, outer, inner = _factors(layout, value.shape[layout.axes[0].dim], kept.k)  # type: ignore[union-attr]
    shape = list(value.shape)
    shape[dim] = outer * kept.batch * inner
    whole = value.new_zeros(shape)
    # a single row may be both; put back, it should then have the order that most operators expect
    if value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last):
        whole = whole.to(memory_format=torch.channels_last)
    parts = whole.unflatten(dim, (outer, kept.batch, inner))
    parts.index_copy_(dim + 1, kept.rows, value.unflatten(dim, (outer, kept.k, inner)))
    return whole


# --- tokens ----------------------------------------------------------------------------------------------------------


def _cut_tokens(tensor: Tensor, layout: RowLayout, kept: KeptRows) -> Tensor:
    sample, token = layout.axes
    assert sample is not None
    samples, places = kept.places()
    if token is None:
        return tensor.index_select(sample.dim, samples)
    if token.dim == sample.dim:
        return tensor.index_select(sample.dim, samples * (tensor.shape[sample.dim] // kept.batch) + places)
    rest = [d for d in range(tensor.ndim) if d not in (sample.dim, token.dim)]
    order = [sample.dim, token.dim, *rest]
    taken = tensor.permute(order)[samples, places].unsqueeze(1)
    taken = taken.permute([order.index(d) for d in range(tensor.ndim)])
    return taken.contiguous() if tensor.is_contiguous() else taken


def _put_tokens(value: Tensor, layout: RowLayout, kept: KeptRows) -> Tensor:
    sample, token = layout.axes
    assert sample is not None
    assert token is not None
    assert kept.tokens is not None
    samples, places = kept.places()
    width = kept.tokens + kept.lost - int(token.lost)
    shape = list(value.shape)
    if token.dim == sample.dim:
        shape[sample.dim] = kept.batch * width
        return value.new_zeros(shape).index_copy_(sample.dim, samples * width + places, value)
    shape[sample.dim], shape[token.dim] = kept.batch, width
    whole = value.new_zeros(shape)
    rest = [d for d in range(value.ndim) if d not in (sample.dim, token.dim)]
    order = [sample.dim, token.dim, *rest]
    whole.permute(order)[samples, places] = value.permute(order)[:, 0]
    return whole
