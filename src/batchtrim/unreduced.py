"""Un-reduced losses, with the mask, weights and counts that their reduction needs.

A criterion's own mean is ``sum(l) / D``, with D the number of entries that count, or the sum of their class weights.
Trimming does the same over the kept entries, ``sum_kept(l) / D_kept``, so keep 1 gives the criterion's own value.

Legend: B batch, P further positions of a sample (pixels, tokens), j one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from batchtrim._checks import (
    check_choice,
    check_has_values,
    check_like,
    check_losses,
    describe,
    is_number,
)
from batchtrim._no_tensor import NoTensor
from batchtrim.errors import PassUnreducedLosses

__all__ = [
    "UNITS",
    "Losses",
    "accumulator",
    "as_one",
    "counted",
    "divisors",
    "flatten",
    "losses_of",
    "nonzero",
    "sum_of",
    "to_rank",
]

UNITS = ("sample", "element")
_REDUCTIONS = ("mean", "sum")
_DEPTH = 16  # how many operators there may be between a difference and the losses
# Operators, by parts of their names in a graph, whose result of (B, B) does not come from broadcasting.
_PRODUCTS = ("mm", "Mm", "linear", "Linear", "Convolution")

_transforming = torch._C._are_functorch_transforms_active  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(eq=False)
class Losses(NoTensor):
    """Un-reduced losses with mask, weights and counts. A :class:`batchtrim.Trimmer` takes them in place of a tensor.

    The loss of a selection is ``sum_kept(c_i * v_i) / sum_kept(c_i * w_i)``: v values, w weights, c counts.

    Attributes:
        values: (B,) or (B, ...), with a graph.
        mask: bool, shape of ``values``, True where an entry counts; None if all do.
        weights: shape of ``values``: weights already multiplied into ``values`` (class weights), whose sum the
            criterion's own mean divides by; None if there are none.
        counts: (B,): what each value contributes to the criterion's own divisor, if a value is the mean of a
            sample's entries: the number of entries that count, or the sum of their class weights. None if every
            value contributes the same.
        unit: what each value is, "sample" or "element"; None leaves it to the trimmer.
        reduction: "mean", or "sum" if the loss is the plain sum of what is kept.
        terms: the terms of a sum whose entries may count differently (``ce + dice``, of which only one has class
            weights): each is divided by its own divisor over what is kept. Empty otherwise.
        entries: how many entries each value is the mean of, if there are no ``counts``; batches may differ in it.

    Losses can be added and scaled: ``ce(out, y) + 0.4 * ce(aux, y)``. They are ranked by their sum. A tensor of the
    shape of ``values`` can be added too, and is reduced as they are; a factor is a number, or a tensor of that shape.

    Example:
        >>> main, aux = Losses(torch.tensor([1.0, 3.0])), Losses(torch.tensor([0.0, 1.0]))
        >>> (main + 0.5 * aux).mean()
        tensor(2.2500)
    """

    values: Tensor
    mask: Tensor | None = None
    weights: Tensor | None = None
    counts: Tensor | None = None
    unit: str | None = None
    reduction: str = "mean"
    terms: tuple[Losses, ...] = ()
    entries: int | None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise an error if the parts do not fit each other; they may be set one by one."""
        if not isinstance(self.values, Tensor):
            raise TypeError(f"expected `values` to be a tensor, got {describe(self.values)}.")
        if self.mask is not None:
            check_like("mask", self.mask, self.values, torch.bool)
        if self.weights is not None:
            check_like("weights", self.weights, self.values)
        if self.counts is not None and self.values.ndim == 1:
            check_like("counts", self.counts, self.values)
        if self.unit is not None and self.unit not in UNITS:
            check_choice("unit", self.unit, UNITS)
        if self.reduction not in _REDUCTIONS:
            check_choice("reduction", self.reduction, _REDUCTIONS)

    def detach(self) -> Losses:
        """Return the same without a graph."""
        terms = tuple(term.detach() for term in self.terms) if self.terms else ()
        return replace(self, values=self.values.detach(), terms=terms)

    def masked(self, mask: Tensor) -> Losses:
        """Return the same with the entries where ``mask`` is False left out as well."""
        terms = tuple(term.masked(mask) for term in self.terms)
        return replace(self, mask=mask if self.mask is None else mask & self.mask, terms=terms)

    def mean(self) -> Tensor:
        """Return the criterion's own value, 0-d: the loss with everything kept; 0 if nothing counts."""
        if self.terms:
            return torch.stack([term.mean() for term in self.terms]).sum()
        values, total = self.values, accumulator(self.values)
        counted = values if self.counts is None else values * self.counts
        divisor = divisors(self)
        if self.mask is not None:
            counted = torch.where(self.mask, counted, 0.0)
            divisor = self.mask if divisor is None else torch.where(self.mask, divisor, 0.0)
        summed = counted.sum(dtype=total)
        if self.reduction == "sum" or values.numel() == 0:
            return summed.to(values.dtype)
        number = values.numel() if divisor is None else nonzero(divisor.sum(dtype=total))
        return (summed / number).to(values.dtype)

    __array_ufunc__ = None  # NumPy would make an array of objects: array * losses, one `Losses` an entry

    def __add__(self, other: object) -> Losses:
        if is_number(other) and other == 0:  # sum() starts with 0
            return self
        if is_number(other):
            raise PassUnreducedLosses(
                f"expected a term with one loss per sample to add to `Losses`, got {describe(other)}. "
                "Add it to the trimmed loss: trim(losses) + term."
            )
        if isinstance(other, Tensor):
            other = Losses(self._checked_term(other), unit=self.unit, reduction=self.reduction)
        if not isinstance(other, Losses):
            return NotImplemented
        self._checked_term(other.values)
        if None not in (self.unit, other.unit) and self.unit != other.unit:
            raise ValueError(f"expected two terms of one unit, got {self.unit!r} and {other.unit!r}.")
        if _count_alike(self, other):
            return replace(self, values=self.values + other.values, unit=self.unit or other.unit)
        return sum_of((*(self.terms or (self,)), *(other.terms or (other,))), self.unit or other.unit)

    __radd__ = __add__

    def __mul__(self, factor: object) -> Losses:
        if isinstance(factor, Tensor):
            factor = self._checked_factor(factor)
        elif is_number(factor):
            factor = float(factor)  # type: ignore[arg-type]
        elif hasattr(factor, "__array__") and not isinstance(factor, Losses):
            raise TypeError(
                f"expected a number or a tensor to scale `Losses` by, got {describe(factor)}. Convert it: "
                "torch.as_tensor(array, dtype=losses.values.dtype)."
            )
        else:
            return NotImplemented
        return replace(self, values=self.values * factor, terms=tuple(each * factor for each in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Losses:
        return self * (1.0 / divisor) if is_number(divisor) or isinstance(divisor, Tensor) else NotImplemented  # type: ignore[operator]

    def __neg__(self) -> Losses:
        return self * -1.0

    def __sub__(self, other: object) -> Losses:
        return self + -other if isinstance(other, (Losses, Tensor)) or is_number(other) else NotImplemented  # type: ignore[operator]

    def __rsub__(self, other: object) -> Losses:
        return -self + other if isinstance(other, Tensor) or is_number(other) else NotImplemented

    def __iter__(self) -> Iterator[Tensor | None]:
        if self.counts is not None or self.reduction != "mean" or self.terms:
            raise TypeError(
                "expected the parts of `Losses` to be read by name (losses.values), got them unpacked as three."
            )
        return iter((self.values, self.mask, self.weights))

    def _checked_factor(self, factor: Tensor) -> Tensor:
        if factor.numel() == 1:
            return factor.reshape(())  # a learned weight often has shape (1,)
        if factor.shape != self.values.shape:
            raise ValueError(
                f"expected a factor of one number, or of shape {tuple(self.values.shape)}, to scale `Losses` by, got "
                f"{describe(factor)}. Expand it, so that each loss has one of its own."
            )
        return factor

    def _checked_term(self, other: Tensor) -> Tensor:
        if other.ndim == 0:
            raise PassUnreducedLosses(
                "expected a term with one loss per sample to add to `Losses`, got one of shape (). "
                "Un-reduce it too (batchtrim.per_sample), or add it to the trimmed loss: trim(losses) + term."
            )
        if other.shape != self.values.shape or not other.dtype.is_floating_point:
            raise ValueError(
                f"expected a term of shape {tuple(self.values.shape)} to add to `Losses`, got {describe(other)}. "
                "Give every term with the same unit: per_sample(criterion, unit=...)."
            )
        return other


def sum_of(terms: Sequence[Losses], unit: str | None) -> Losses:
    """Return the sum of terms that count differently. An entry counts if it counts in one of them."""
    values = [term.values if term.mask is None else torch.where(term.mask, term.values, 0.0) for term in terms]
    masks = [term.mask for term in terms if term.mask is not None]
    mask = torch.stack(masks).any(0) if len(masks) == len(terms) else None
    return Losses(torch.stack(values).sum(0), mask, unit=unit, terms=tuple(terms))


def _count_alike(one: Losses, other: Losses) -> bool:
    """Return True if two terms have the same divisor in any batch, whatever is kept."""
    if one.terms or other.terms or (one.reduction, one.entries) != (other.reduction, other.entries):
        return False
    return one.mask is other.mask and one.weights is other.weights and one.counts is other.counts


def as_one(losses: Losses) -> Losses:
    """Return a sum of means over all entries as one term: in one batch they have one divisor, the samples kept."""
    parts = [part for term in losses.terms for part in (term.mask, term.weights, term.counts) if part is not None]
    if not losses.terms or parts or any(term.reduction != "mean" for term in losses.terms):
        return losses
    return Losses(losses.values, unit=losses.unit)


def counted(losses: Losses) -> Losses:
    """Return losses with counts, if each value is the mean of several entries that all count."""
    if losses.entries is None or losses.counts is not None:
        return losses
    counts = torch.full_like(losses.values, losses.entries, dtype=accumulator(losses.values))
    return replace(losses, counts=counts, entries=None)


def accumulator(values: Tensor) -> torch.dtype:
    """Return the dtype for sums of ``values``: at least float32. Half precision ends at 65,504."""
    return torch.promote_types(values.dtype, torch.float32)


def nonzero(divisor: Tensor) -> Tensor:
    """Return a divisor with 1 in place of 0: a sum over nothing is then 0, not NaN."""
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def divisors(losses: Losses) -> Tensor | None:
    """Return what each entry adds to the criterion's own divisor, ``c_i * w_i``, or None if that is 1 for all."""
    if losses.counts is None or losses.weights is None:
        return losses.weights if losses.counts is None else losses.counts
    return losses.counts * losses.weights


def to_rank(
    losses: Tensor | Losses,
    rank_by: Tensor | Losses | None,
    mask: Tensor | None,
    unit: str,
    *,
    allow_empty: bool = False,
) -> tuple[Losses, Tensor]:
    """Return the vector there is to choose from, and the scores to rank it by; arguments as a trimmer's."""
    if isinstance(losses, Losses):
        losses.check()
        values = losses.values
        check_losses(values, allow_empty=allow_empty)
    else:
        check_losses(losses, allow_empty=allow_empty)
        values, losses = losses, losses_of(losses)
    if mask is not None:
        check_like("mask", mask, values, torch.bool)
        losses = losses.masked(mask)
    flat = losses if values.ndim == 1 and losses.unit is None else flatten(losses, unit)
    if rank_by is None:
        return flat, flat.values.detach()
    if isinstance(rank_by, Losses):
        rank_by.check()
        ranked = flatten(rank_by, unit)
        check_like("rank_by", ranked.values, flat.values)
        _check_scored(flat.mask, ranked.mask)
    else:
        check_losses(rank_by, "rank_by", allow_empty=allow_empty)
        check_like("rank_by", rank_by, values)
        # by their plain mean: the weights and the reduction are those of the losses trained on
        ranked = flatten(Losses(rank_by, losses.mask), unit)
    return flat, ranked.values.detach()


def losses_of(
    values: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    unit: str | None = None,
    reduction: str = "mean",
) -> Losses:
    """Return ``Losses`` without its checks, of parts that were checked or computed: one is made in every batch."""
    if weights is not None:
        return Losses(values, mask, weights, None, unit, reduction)
    losses = object.__new__(Losses)  # its other fields have their defaults, which are the class's
    losses.values, losses.mask, losses.unit, losses.reduction = values, mask, unit, reduction
    return losses


def _check_scored(counted: Tensor | None, scored: Tensor | None) -> None:
    """Check that every entry that counts has a score; not where no value can be read, compiled or under torch.vmap."""
    if scored is None or scored is counted or torch.compiler.is_compiling() or _transforming():
        return
    check_has_values("rank_by", scored, "a trimmer")
    without = ~scored if counted is None else counted & ~scored
    if bool(without.any()):
        raise ValueError(
            f"expected `rank_by` to rank every entry that counts, got {int(without.sum())} left out of it (ignored "
            "targets, a mask). Leave them out of the losses too, with mask=, or rank them by 0: rank_by=scores.values."
        )


def flatten(losses: Losses, unit: str) -> Losses:
    """Return (B, ...) losses as the vector a rule chooses from.

    sample:  ``l_i = sum_j(m_ij * l_ij) / c_i`` with ``c_i = sum_j(m_ij)`` over the positions that count, (B,): a mean,
             since length alone does not make a sample harder. With class weights ``c_i = sum_j(m_ij * w_ij)``. The
             counts are returned too, so that keeping everything gives the criterion's own value. With reduction "sum"
             ``l_i`` is the sum. A sample in which nothing counts is masked out.
    element: every position separately, (B * ...,).

    Raises:
        ValueError: the losses were made for another unit.
    """
    if losses.unit not in (None, unit):
        raise ValueError(
            f"expected `losses` of unit {unit!r}, which the trimmer chooses among, got unit {losses.unit!r}. "
            f"Give both the same: per_sample(criterion, unit={unit!r}), or Trimmer(unit={losses.unit!r})."
        )
    if losses.terms:
        return sum_of(tuple(flatten(term, unit) for term in losses.terms), unit)
    values, mask, weights = losses.values, losses.mask, losses.weights
    if values.ndim == 1:
        return losses
    if unit == "element":
        parts = (None if part is None else part.reshape(-1) for part in (values, mask, weights, losses.counts))
        return Losses(*parts, unit=unit, reduction=losses.reduction)  # type: ignore[arg-type]
    if losses.counts is not None:
        raise ValueError("expected `counts` with values of shape (B,), whose entries they count, got (B, ...).")
    if mask is None and values.ndim == 2:
        _tell_broadcast(values)
    values, total = values.flatten(1), accumulator(values)
    summing = losses.reduction == "sum"
    if mask is None and weights is None:
        means = (values.sum(1, dtype=total) if summing else values.mean(1, dtype=total)).to(values.dtype)
        return replace(losses, values=means, unit=unit, entries=None if summing else values.shape[1])
    mask = None if mask is None else mask.flatten(1)
    counted = mask if weights is None else weights.flatten(1)
    if mask is not None:
        values = torch.where(mask, values, 0.0)
        counted = torch.where(mask, counted, torch.zeros_like(counted))  # type: ignore[arg-type]
    counts = counted.sum(1, dtype=total)  # type: ignore[union-attr]
    summed = values.sum(1, dtype=total)
    means = (summed if summing else summed / nonzero(counts)).to(values.dtype)
    return Losses(
        means, None if mask is None else mask.any(1), None, None if summing else counts, unit, losses.reduction
    )


def _tell_broadcast(values: Tensor) -> None:
    """Warn if the graph of (B, B) losses shows that outputs (B, 1) or (B,) were broadcast to them by their targets."""
    size = values.shape[0]
    # neither in a compiled function nor in a trace for any batch size: a comparison of sizes would bind it to one
    if torch.compiler.is_compiling() or not isinstance(size, int) or not size == values.shape[1] > 1:
        return
    node: Any = values.grad_fn
    for _ in range(_DEPTH):
        if node is None or any(part in node.name() for part in _PRODUCTS):
            return
        before = [(each, _shape_of(each, place)) for each, place in node.next_functions]
        node = next((each for each, shape in before if shape == (size, size)), None)
        found = next((shape for _, shape in before if shape in ((size, 1), (size,))), None)
        if node is None and found is not None:
            warnings.warn(
                f"expected one loss per sample, got losses {(size, size)} computed from {found}. Were outputs and "
                f"targets of shapes {(size, 1)} and {(size,)} broadcast against each other? Squeeze or unsqueeze one.",
                stacklevel=7,
            )


def _shape_of(node: Any, place: int) -> tuple[int, ...]:
    """Return the shape of a node's output in the forward."""
    known = getattr(node, "_input_metadata", ())
    return tuple(known[place].shape) if place < len(known) else ()
