"""Reduce the losses of a selection to one number.

There are two scales. ``kept`` divides by the number kept, as in the paper: the step gets larger as fewer, harder
samples are averaged. ``batch`` divides by the number of candidates: a sample weighs what it weighs in plain training.

Sums, weights and divisors are computed in float32 at least. The result has the dtype of the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from batchtrim._checks import check_choice, check_like, describe
from batchtrim.selection import Selection
from batchtrim.unreduced import Losses, accumulator, as_one, counted, divisors, flatten, losses_of, nonzero

__all__ = [
    "SCALES",
    "kept_divisor",
    "normalized",
    "reduce",
    "reduce_kept",
    "reduce_mask",
    "reduce_rows",
    "term_divisors",
    "with_terms",
]

SCALES = ("kept", "batch")
# A dot product sums in the losses' own dtype, in sequence: its error is 4e-6 for 65,536 losses, 1e-3 for 20 million.
_DOT_TO = 1 << 14
_DOT_IN = (torch.float32, torch.float64)


def reduce(losses: Tensor | Losses, selection: Selection, scale: str = "kept", weights: Tensor | None = None) -> Tensor:
    """Return the loss to call backward on: the mean of the kept ``losses``.

    kept:  ``L = sum_kept(w_i * l_i) / sum_kept(w_i)``, and with no weights ``(1 / k) * sum_kept(l_i)``
    batch: ``L = sum_kept(w_i * l_i) / sum(w_i)``, the divisor over all candidates, and with no weights their
           number n

    A ``normalizer`` or ``batch_normalizer`` of the selection, as :meth:`batchtrim.Trimmer.select` sets them if
    losses are weighted, replaces these divisors.

    Args:
        losses: (B,), with a graph. Or :class:`batchtrim.Losses`, which hold their weights, counts and reduction; a sum
            of terms that count differently has to be given so.
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
    whole = losses
    if isinstance(whole, Losses):
        unit = whole.unit or ("sample" if whole.values.shape[:1] == (selection.size,) else "element")
        whole = flatten(whole, unit)
        whole = whole if selection.terms else as_one(whole)
        if whole.terms and whole.values.shape == (selection.size,):
            selection = selection if selection.terms else with_terms(selection, whole)
            return reduce_rows(whole, selection.indices, selection, scale)
        losses = whole.values
    if selection.terms:
        raise ValueError(
            f"expected `losses` to be the `Losses` that the selection was made from, a sum of {len(selection.terms)} "
            f"terms that count differently, got {describe(losses)}. Pass them whole: reduce(losses, selection)."
        )
    if not isinstance(losses, Tensor) or losses.shape != (selection.size,):
        raise ValueError(
            f"expected `losses` of shape ({selection.size},), which the selection was made from, "
            f"got {describe(losses)}."
        )
    if weights is not None:
        check_like("weights", weights, losses)
        whole = replace(whole, weights=weights) if isinstance(whole, Losses) else losses_of(losses, weights=weights)
    if isinstance(whole, Losses) and selection.batch_normalizer is None:  # a rule's own, which counts samples
        selection = normalized(selection, whole)
    rows, size = selection.indices, selection.size
    k = rows.shape[0]
    if selection.weights is None and 0 < k < size and _dot_is_exact(losses, size):
        divisor = selection.normalizer if scale == "kept" else selection.batch_normalizer
        if divisor is None:
            divisor = k if scale == "kept" else selection.candidates
        loss = losses.dot(losses.new_zeros(size).index_fill_(0, rows, 1.0 / divisor))
        # 0 * inf is NaN: if a dropped loss is not finite, or a kept one is NaN, continue below
        value = loss.item()
        if value == value:
            return loss
    return reduce_kept(losses if selection.everything else losses.index_select(0, rows), selection, scale)


def _dot_is_exact(losses: Tensor, size: int) -> bool:
    """True if a dot product is precise enough: its backward is one product, a gathered mean's is three operators.

    It is not in half precision, which rounds the weights, nor for very many losses, whose sum it rounds. It is not used
    on a device, since reading the result would sync, nor for other kinds of tensors, which may have no values to read.
    """
    return size <= _DOT_TO and losses.is_cpu and losses.dtype in _DOT_IN and type(losses) is Tensor


def reduce_kept(kept: Tensor, selection: Selection, scale: str = "kept") -> Tensor:
    """Return :func:`reduce` from the losses of the kept rows alone: (k,), in the order of ``selection.indices``."""
    if selection.k == 0:
        return kept.sum()  # 0 with a graph: a step that changes nothing, under DDP too
    dtype, total = kept.dtype, accumulator(kept)
    normalizer = selection.batch_normalizer if scale == "batch" else selection.normalizer
    if normalizer is None and scale == "kept":
        if selection.weights is None:
            return kept.mean()
        normalizer = selection.weights.sum(dtype=total)
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


def with_terms(selection: Selection, losses: Losses, joint: Sequence[tuple[float, float]] = ()) -> Selection:
    """Return a selection with one for each term of ``losses``, with its own divisor over the kept entries.

    Args:
        joint: the divisors of each term over the joined batch of all ranks, at scales "kept" and "batch".
    """
    terms = [_all_counted(term) for term in losses.terms]
    terms = [normalized(selection, counted(term) if joint else term) for term in terms]
    if joint and selection.k:
        pairs = zip(terms, joint, strict=True)
        terms = [replace(term, normalizer=kept, batch_normalizer=whole) for term, (kept, whole) in pairs]
    return replace(selection, terms=tuple(terms))


def term_divisors(losses: Losses) -> list[Tensor | None]:
    """Return what each entry adds to the divisor of each term, (B,); None for a term that is a sum."""
    found = []
    for term in losses.terms:
        part = divisors(counted(_all_counted(term)))
        part = torch.ones_like(term.values, dtype=accumulator(term.values)) if part is None else part
        found.append(None if term.reduction == "sum" else part.detach())
    return found


def reduce_rows(losses: Losses, rows: Tensor | slice, selection: Selection, scale: str) -> Tensor:
    """Return :func:`reduce` from the losses at ``rows``, those of ``selection.indices`` in their order."""
    losses = losses if selection.terms else as_one(losses)
    if len(losses.terms) != len(selection.terms):
        raise ValueError(
            f"expected `losses` of {len(selection.terms) or 1} terms, as the selection was made from, got "
            f"{len(losses.terms) or 1}. Make every batch's losses by the same sum."
        )
    if losses.terms:
        pairs = zip(losses.terms, selection.terms, strict=True)
        return torch.stack([reduce_rows(_all_counted(each), rows, part, scale) for each, part in pairs]).sum()
    return reduce_kept(losses.values[rows], selection, scale)


def _all_counted(term: Losses) -> Losses:
    """Return a term without a mask: the entries that it leaves out are 0 and count 0 times."""
    if term.mask is None:
        return term
    counts = counted(replace(term, entries=term.entries or 1)).counts
    assert counts is not None
    values, counts = (torch.where(term.mask, part, torch.zeros_like(part)) for part in (term.values, counts))
    return replace(term, values=values, mask=None, counts=counts)


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
