"""Reduce the losses of a selection to one number.

There are two scales. ``kept`` divides by the number kept, as in the paper: the step gets larger as fewer, harder
samples are averaged. ``batch`` divides by the number of candidates: a sample weighs what it weighs in plain training.

Sums, weights and divisors are computed in float32 at least. The result has the dtype of the losses.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from batchtrim._checks import check_choice, check_like, describe
from batchtrim.selection import Selection
from batchtrim.unreduced import Losses, accumulator, divisors, nonzero

__all__ = [
    "SCALES",
    "SUM_OF_TERMS",
    "kept_divisor",
    "normalized",
    "reduce",
    "reduce_kept",
    "reduce_mask",
    "reduce_terms",
]

SCALES = ("kept", "batch")
# A dot product sums in the losses' own dtype, in sequence: its error is 4e-6 for 65,536 losses, 1e-3 for 20 million.
_DOT_TO = 1 << 14
_DOT_IN = (torch.float32, torch.float64)
SUM_OF_TERMS = (
    "a sum of terms that count differently (one is masked, weighted or summed, the other is not). Only trim(losses) on "
    "one process takes that; elsewhere add plain values, a.values + b.values, so that each sample counts the same."
)


def reduce(losses: Tensor, selection: Selection, scale: str = "kept", weights: Tensor | None = None) -> Tensor:
    """Return the loss to call backward on: the mean of the kept ``losses``.

    kept:  ``L = sum_kept(w_i * l_i) / sum_kept(w_i)``, and with no weights ``(1 / k) * sum_kept(l_i)``
    batch: ``L = sum_kept(w_i * l_i) / sum(w_i)``, the divisor over all candidates, and with no weights their
           number n

    A ``normalizer`` or ``batch_normalizer`` of the selection, as :meth:`batchtrim.Trimmer.select` sets them if
    losses are weighted, replaces these divisors.

    Args:
        losses: (B,), with a graph.
        selection: the samples to keep.
        scale: "kept" or "batch".
        weights: (B,), per-sample weights a criterion has already multiplied into ``losses`` (class weights); the
            mean over the kept is then divided by their sum over the kept, as the criterion's own mean would be.

    Returns:
        0-d, dtype of ``losses``. With everything kept and no weights: ``losses.mean()``, bit for bit.
    """
    if scale not in SCALES:
        check_choice("scale", scale, SCALES)
    if not isinstance(selection, Selection):
        hint = "A rule gives one: batchtrim.hardest()(losses, keep)."
        raise TypeError(f"expected `selection` to be a batchtrim.Selection, got {describe(selection)}. {hint}")
    if not isinstance(losses, Tensor) or losses.shape != (selection.size,):
        raise ValueError(
            f"expected `losses` of shape ({selection.size},), which the selection was made from, "
            f"got {describe(losses)}."
        )
    if weights is not None:
        check_like("weights", weights, losses)
    rows, size = selection.indices, selection.size
    k = rows.shape[0]
    if weights is None and selection.weights is None and 0 < k < size and _dot_is_exact(losses, size):
        divisor = selection.normalizer if scale == "kept" else selection.batch_normalizer
        if divisor is None:
            divisor = k if scale == "kept" else selection.candidates
        loss = losses.dot(losses.new_zeros(size).index_fill_(0, rows, 1.0 / divisor))
        # 0 * inf is NaN: if a dropped loss is not finite, or a kept one is NaN, continue below
        value = loss.item()
        if value == value:
            return loss
    if not selection.everything:
        if weights is not None and scale == "batch" and selection.batch_normalizer is None:
            selection = replace(selection, batch_normalizer=weights.sum(dtype=accumulator(losses)))
        losses = losses.index_select(0, selection.indices)
        weights = None if weights is None else weights.index_select(0, selection.indices)
    return reduce_kept(losses, selection, scale, weights)


def _dot_is_exact(losses: Tensor, size: int) -> bool:
    """True if a dot product is precise enough: its backward is one product, a gathered mean's is three operators.

    It is not in half precision, which rounds the weights, nor for very many losses, whose sum it rounds. It is not used
    on a device, since reading the result would sync, nor for other kinds of tensors, which may have no values to read.
    """
    return size <= _DOT_TO and losses.is_cpu and losses.dtype in _DOT_IN and type(losses) is Tensor


def reduce_kept(kept: Tensor, selection: Selection, scale: str = "kept", weights: Tensor | None = None) -> Tensor:
    """Return :func:`reduce` from the losses of the kept rows alone: (k,), in the order of ``selection.indices``."""
    if selection.k == 0:
        return kept.sum()  # 0 with a graph: a step that changes nothing, under DDP too
    dtype, total = kept.dtype, accumulator(kept)
    normalizer = selection.batch_normalizer if scale == "batch" else selection.normalizer
    if normalizer is None and weights is None and selection.weights is None and scale == "kept":
        return kept.mean()
    if normalizer is None and weights is not None:
        normalizer = nonzero(_times(weights, selection.weights).sum(dtype=total))
    if normalizer is None and scale == "kept":
        normalizer = selection.weights.sum(dtype=total)  # type: ignore[union-attr]
    kept = _times(kept, selection.weights)
    return (kept.sum(dtype=total) / (selection.candidates if normalizer is None else normalizer)).to(dtype)


def normalized(selection: Selection, losses: Losses) -> Selection:
    """Return a selection with the divisors of ``losses``, (B,), unless a plain mean over the kept has them already.

    Args:
        selection: of ``losses``, as a rule chose it. Its own normalizer counts samples; if losses are weighted,
            the divisor is the sum of the kept weights.
        losses: with weights, counts or reduction "sum"; without these, the selection is returned as it is.

    Notes:
        The divisors are 0-d tensors: nothing is read from the device.
    """
    weights = selection.weights
    if losses.counts is not None:
        weights = _times(losses.counts[selection.indices], weights)
    if losses.reduction == "sum":
        return replace(selection, weights=weights, normalizer=1.0, batch_normalizer=1.0)
    divisor = divisors(losses)
    if divisor is None or selection.k == 0:
        return selection
    total = accumulator(losses.values)
    kept = _times(divisor[selection.indices], selection.weights)
    counted = divisor if losses.mask is None else torch.where(losses.mask, divisor, torch.zeros_like(divisor))
    return replace(
        selection,
        weights=weights,
        normalizer=nonzero(kept.sum(dtype=total)),
        batch_normalizer=nonzero(counted.sum(dtype=total)),
    )


def reduce_terms(losses: Losses, selection: Selection, scale: str) -> Tensor:
    """Return :func:`reduce` of a sum of terms, each with its own divisor over the kept entries."""
    parts = []
    for term in losses.terms:
        if term.mask is not None:
            ones = torch.ones_like(term.values, dtype=accumulator(term.values))
            counts = torch.where(term.mask, ones if term.counts is None else term.counts, torch.zeros_like(ones))
            term = replace(term, values=torch.where(term.mask, term.values, 0.0), mask=None, counts=counts)
        parts.append(reduce(term.values, normalized(selection, term), scale, term.weights))
    return torch.stack(parts).sum()


def kept_divisor(selection: Selection, weights: Tensor | None = None) -> float:
    """Return what :func:`reduce` with scale "kept" divides the weighted kept sum by. Syncs the device with weights.

    Args:
        weights: (B,), as in :func:`reduce`.
    """
    if selection.normalizer is not None:
        return float(selection.normalizer)
    if weights is None:
        return selection.k if selection.weights is None else float(selection.weights.sum(dtype=torch.float64))
    return float(_times(weights[selection.indices], selection.weights).sum(dtype=torch.float64))


def reduce_mask(losses: Losses, kept: Tensor, scale: str) -> Tensor:
    """Return :func:`reduce` with fixed shapes, for torch.compile: ``sum(where(kept, losses, 0)) / divisor``.

    Args:
        losses: of shape (B,).
        kept: bool (B,), True for kept.
    """
    if losses.terms:
        return torch.stack([reduce_mask(term, kept, scale) for term in losses.terms]).sum()
    values, total = losses.values, accumulator(losses.values)
    if losses.counts is not None:
        values = values * losses.counts
    if losses.mask is not None:
        kept = kept & losses.mask
    summed = torch.where(kept, values, torch.zeros_like(values)).sum(dtype=total)
    if losses.reduction == "sum":
        return summed.to(losses.values.dtype)
    counted = kept if scale == "kept" else losses.mask
    divisor = divisors(losses)
    if divisor is None:
        number = torch.full_like(summed, values.shape[0]) if counted is None else counted.sum()
    else:
        number = (divisor if counted is None else torch.where(counted, divisor, torch.zeros_like(divisor))).sum(
            dtype=total
        )
    return (summed / nonzero(number)).to(losses.values.dtype)


def _times(values: Tensor, weights: Tensor | None) -> Tensor:
    return values if weights is None else values * weights
