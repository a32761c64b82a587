"""Keep the samples that hold most of the loss: k follows from the batch, and the dropped share is bounded.

Legend: n samples to choose from, s skipped, k kept, v_1 >= v_2 >= ... the losses in descending order.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from batchtrim._checks import (
    check_count,
    check_fraction,
    check_has_values,
    check_keep,
    check_not_below,
    check_number,
    check_ordered,
    check_part,
    check_positive,
)
from batchtrim.selection.base import Selection, fraction, keep_count, keep_count_tensor, length, top_indices

__all__ = ["loss_mass", "smoothing_floor"]

# A sum counts as reaching the share if it falls short by less than this fraction of the total: float64 sums round.
_ROUNDING = 1e-12
# A loss of 0 may be computed as this many units of its dtype below 0: log_softmax and the like round.
_BELOW_ZERO = 4
# On a CPU: up to this many losses are counted in Python, and from this many on by bins. In between, a sort is as fast.
_LIST_TO = 1024
_BINS_FROM = 4096
_BINS = 2048
_SUMMABLE = 1e290  # sums of losses above this may overflow


def smoothing_floor(label_smoothing: float, classes: int) -> float:
    """Return the cross-entropy that no prediction can go below under label smoothing: the entropy of its targets.

    ``H = -p * log(p) - (C - 1) * r * log(r)`` with ``r = label_smoothing / C`` and ``p = 1 - label_smoothing + r``,
    the targets of ``torch.nn.CrossEntropyLoss(label_smoothing=...)``.

    Args:
        label_smoothing: in [0, 1].
        classes: C, at least 2.

    Returns:
        In nats; 0 without smoothing. For ``loss_mass(offset=...)``.

    Example:
        >>> round(smoothing_floor(0.2, 10), 4)
        0.8669
        >>> round(smoothing_floor(1.0, 10), 4) == round(math.log(10), 4)
        True
    """
    smoothing = check_part("label_smoothing", label_smoothing)
    classes = check_count("classes", classes, minimum=2)
    rest = smoothing / classes
    if not rest:
        return 0.0
    right = 1.0 - smoothing + rest
    return -right * math.log(right) - (classes - 1) * rest * math.log(rest)


@dataclass(frozen=True)
class loss_mass:
    """Keep the fewest samples that hold a share of the batch's loss. ``keep`` is that share, not a part of the batch.

    ``k = min{ j : v_1 + ... + v_j >= keep * (v_1 + ... + v_n) }``, the j largest losses

    With ``Trimmer(0.9, select=loss_mass(), scale="batch")`` the loss of a step is at least 0.9 of the plain mean,
    whatever the network, so the dropped loss is bounded. Early in training losses are similar and most samples stay;
    later a few hold nearly all of the loss. A schedule sets the share. Source: batchtrim. Its control is
    ``uniform(like=loss_mass())``: as many samples at each step, drawn at random.

    Args:
        skip: fraction dropped from the hard end first, in [0, 1), against label noise, as in :class:`between`:
            ``s = min(round(skip * n), n - 1)`` samples are dropped, and the share refers to the loss of the rest.
        at_least: lower bound of k as a fraction of n: ``k >= keep_count(at_least, n)``; 0 asks for one sample.
        at_most: upper bound: ``k <= keep_count(at_most, n)``. Below 1 the dropped loss is no longer bounded.
        offset: subtracted from every loss first: the least loss that a sample can have. With label smoothing that is
            :func:`smoothing_floor`; without it k stays large, since the floor counts as loss.

    Raises:
        ValueError: on call, if a loss lies below ``offset`` (0) by more than rounding. Negative losses have no mass:
            rank by a loss that cannot be negative (``rank_by``), or use another rule. In a compiled function, a
            RuntimeError.

    Notes:
        Ties: of equal losses the lower index is kept. NaN and inf hold all the mass: if there are any (after
        ``skip``), they are kept, and the rest of the batch counts as nothing. If all losses are 0, one sample is kept.
        With keep 1 everything is kept, zeros too: plain training. Sums are in float64, and a sum that
        falls short of the share by 1e-12 of the total counts as reaching it.
        The mass is that of the ranked losses: those with class weights multiplied in, or ``rank_by``. With ``rank_by``
        the bound holds for that loss. Samples of which the plain mean counts some more than others (padded sequences,
        ``unit="sample"``) are ranked by their own means, so the bound holds for the mean of these; with
        ``unit="element"`` it holds for the plain mean. With several ranks, the joined batch's mass counts, without a
        further collective.
        Cost: a sort; on a CPU, from 4,096 losses on, a histogram and the sort of one bin. k depends on the losses, so
        each call syncs the device once; under torch.compile a mask of fixed shape is used, without a sync.

    Example:
        >>> losses = torch.tensor([0.1, 3.0, 2.0, 0.5])
        >>> loss_mass()(losses, 0.8).indices
        tensor([1, 2])
        >>> loss_mass()(losses, 0.9).k, loss_mass(at_most=0.5)(losses, 0.9).k, loss_mass(skip=0.25)(losses, 0.7).k
        (3, 2, 1)
    """

    skip: float = 0.0
    at_least: float = 0.0
    at_most: float = 1.0
    offset: float = 0.0
    k_follows_losses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        skip = check_fraction("skip", self.skip, "It is the fraction of the batch dropped from the hard end.")
        at_least, at_most = check_part("at_least", self.at_least), check_keep("at_most", self.at_most)
        check_ordered("at_least", at_least, "at_most", at_most)
        offset = check_positive("offset", self.offset) if check_number("offset", self.offset) else 0.0
        for name, value in {"skip": skip, "at_least": at_least, "at_most": at_most, "offset": offset}.items():
            object.__setattr__(self, name, value)

    def __call__(self, losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
        n, keep = length(losses), fraction(keep)
        if not n:
            return Selection(top_indices(losses, 0), 0, 0)
        check_has_values("losses", losses, "loss_mass")
        skipped = min(round(self.skip * n), n - 1)
        if losses.is_cpu and keep < 1.0 and n >= _BINS_FROM and not skipped:
            found = self._by_bins(losses, keep)
            if found is not None:
                k = self._within(found.shape[0], n)
                return Selection(found if k == found.shape[0] else top_indices(losses, k), n, n)
        if losses.is_cpu and keep < 1.0 and n <= _LIST_TO:
            found = self._listed(losses, keep, skipped)
            if found is not None:
                return Selection(found, n, n)
        ordered, rows = torch.sort(losses, descending=True, stable=True)
        active = torch.arange(n, device=losses.device) >= skipped
        share = torch.full((), keep, dtype=_wide(losses), device=losses.device)
        count = self._count(ordered, active, share)
        low, number = torch.stack([ordered[-1].to(share.dtype), count]).tolist()  # the only sync
        self._check_low(low, losses.dtype)
        k = min(self._within(int(number), n), n - skipped)
        return Selection(rows[skipped : skipped + k], n, n)

    def compiled_mask(self, losses: Tensor, keep: Tensor, n: Tensor | int) -> Tensor:
        """Return bool, True for kept: :meth:`__call__` in fixed shapes. Losses beyond the ``n`` that count are -inf."""
        ordered, rows = torch.sort(losses, descending=True, stable=True)
        place = torch.arange(losses.shape[0], device=losses.device)
        share = keep.to(losses.device, _wide(losses))
        size = torch.ones_like(share) * n
        skipped = torch.minimum(torch.round(self.skip * size), size - 1)
        lowest = self.offset - _tolerance(self.offset, losses.dtype)
        counted = place < size
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            (~counted | ~(ordered < lowest)).all(),
            "expected losses of at least 0 for loss_mass, or of at least its `offset`, got less. "
            "Rank by a loss that cannot be negative (rank_by=...), or use batchtrim.hardest().",
        )
        k = self._count(ordered, counted & (place >= skipped), share)
        k = torch.maximum(k, keep_count_tensor(self.at_least * torch.ones_like(share), size))
        k = torch.minimum(k, keep_count_tensor(self.at_most * torch.ones_like(share), size))
        kept = (place >= skipped) & (place < skipped + k) & counted
        return torch.zeros_like(kept).scatter(0, rows, kept)

    def _count(self, ordered: Tensor, active: Tensor, share: Tensor) -> Tensor:
        """Return how many of the ``active`` entries, hardest first, hold the share of their mass; 0-d."""
        finite = active & ordered.isfinite()
        mass = torch.where(finite, self._mass(ordered.to(share.dtype), ordered.dtype), 0.0)
        mass = mass / mass.amax().clamp(min=torch.finfo(share.dtype).tiny)  # so that no sum overflows
        held = mass.cumsum(0)
        missing = active & (held < share * held[-1] * (1.0 - _ROUNDING))
        endless = (active & ~finite).sum()
        k = torch.where(endless > 0, endless, 1 + missing.sum())
        return torch.where(share >= 1.0, active.sum(), torch.minimum(k, active.sum())).to(share.dtype)

    def _listed(self, losses: Tensor, share: float, skipped: int) -> Tensor | None:
        """Return the kept rows of a short vector, counted in Python, which is cheaper. None if a loss is not finite."""
        n = losses.shape[0]
        ordered, rows = torch.topk(losses, n)  # half the cost of a stable sort
        values = ordered.tolist()
        low = values[-1]
        if not (math.isfinite(values[0]) and math.isfinite(low)):
            return None
        if low < self.offset:
            self._check_low(low, losses.dtype)
        mass = values[skipped:] if skipped else values
        if self.offset or low < 0.0:
            least = self._nothing(losses.dtype)
            mass = [value - self.offset if value > least else 0.0 for value in mass]
        wanted = share * sum(mass) * (1.0 - _ROUNDING)
        if not math.isfinite(wanted):
            return None
        k = next((j for j, held in enumerate(itertools.accumulate(mass), 1) if held >= wanted), len(mass))
        if self.at_least or self.at_most < 1.0:
            k = min(self._within(k, n), n - skipped)
        end = skipped + k
        if (end < n and values[end - 1] == values[end]) or (skipped and values[skipped - 1] == values[skipped]):
            rows = torch.sort(losses, descending=True, stable=True).indices  # a tie at the cut: the lower row
        return rows[skipped:end]

    def _by_bins(self, losses: Tensor, share: float) -> Tensor | None:
        """Return the rows of the largest losses that hold the share, without a full sort. None if one is not finite.

        The sum is taken bin by bin from the top. Only the bin in which it reaches the share is resolved further: in
        finer bins while it holds many, sorted if it holds few.
        """
        values = losses.double()
        low, high = (float(end) for end in values.aminmax())
        if not (math.isfinite(low) and math.isfinite(high) and abs(high) < _SUMMABLE):
            return None
        self._check_low(low, losses.dtype)
        mass = self._mass(values, losses.dtype)
        wanted = share * float(mass.sum()) * (1.0 - _ROUNDING)
        while values.shape[0] > _BINS and (width := (high - low) / _BINS) > 0.0:
            bins = ((values - low) / width).long().clamp_(max=_BINS - 1)
            held = torch.bincount(bins, mass, minlength=_BINS).flip(0).cumsum(0)
            inside = min(int((held < wanted).sum()), _BINS - 1)  # this many bins from the top do not reach it
            wanted -= float(held[inside - 1]) if inside else 0.0
            rows = (bins == _BINS - 1 - inside).nonzero().squeeze(1)  # fewer: the lowest and the highest are apart
            values, mass = values[rows], mass[rows]
            low, high = (float(end) for end in values.aminmax())
        ordered, rows = torch.sort(values, descending=True)
        reached = int((mass[rows].cumsum(0) < wanted).sum())
        edge = ordered[min(reached, ordered.shape[0] - 1)]
        # of the losses that equal the last one kept, as many as needed
        tied = int((ordered[: reached + 1] == edge).sum())
        over = (losses > edge).nonzero().squeeze(1)
        return torch.cat([over, (losses == edge).nonzero().squeeze(1)[:tied]])

    def _nothing(self, dtype: torch.dtype) -> float:
        """Return the largest loss that has no mass: the floor, plus the rounding error of the losses' dtype."""
        return self.offset + _tolerance(self.offset, dtype) if self.offset else 0.0

    def _mass(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return each loss's height above the floor."""
        if not self.offset:
            return values.clamp(min=0)
        return torch.where(values > self._nothing(dtype), values - self.offset, 0.0)

    def _within(self, k: int, n: int) -> int:
        return min(max(k, keep_count(self.at_least, n)), keep_count(self.at_most, n))

    def _check_low(self, low: float, dtype: torch.dtype) -> None:
        check_not_below("losses", low, self.offset, _tolerance(self.offset, dtype), "loss_mass")


def _tolerance(offset: float, dtype: torch.dtype) -> float:
    return _BELOW_ZERO * torch.finfo(dtype).eps * max(1.0, offset)


def _wide(losses: Tensor) -> torch.dtype:
    return torch.float32 if losses.device.type == "mps" else torch.float64
