"""Rules whose k follows from the keep fraction, a threshold or a draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchtrim._checks import (
    check_count,
    check_fraction,
    check_has_values,
    check_keep,
    check_number,
    check_rule,
    check_state,
    check_stateless,
    describe,
)
from batchtrim.selection.base import (
    Rule,
    Selection,
    drawing,
    drawing_device,
    fraction,
    keep_count,
    keep_count_tensor,
    length,
    rank_mask,
    reads_keep,
    top_indices,
)

__all__ = [
    "above",
    "between",
    "easiest",
    "hardest",
    "percentile",
    "percentile_topk",
    "superquantile",
    "uniform",
]


@dataclass(frozen=True)
class hardest:
    """Keep the k largest losses, ``k = max(1, round(keep * n))``: mini-batch trimming.

    Source: Fassold, arXiv 2110.13058; the same choice as Ordered SGD, arXiv 1907.04371.

    Example:
        >>> hardest()(torch.tensor([0.1, 3.0, 2.0, 0.5]), 0.5).indices
        tensor([1, 2])
    """

    def __call__(self, losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
        n = length(losses)
        return Selection(top_indices(losses, keep_count(keep, n)), n, n)

    def compiled_mask(self, losses: Tensor, keep: Tensor, n: Tensor | int) -> Tensor:
        return rank_mask(losses, keep_count_tensor(keep, n))


@dataclass(frozen=True)
class easiest:
    """Keep the k smallest losses: small-loss selection against label noise. NaN counts as largest and is dropped first.

    Source: Co-teaching, arXiv 1804.06872, here with one network; its schedule falls from 1 to 1 - noise rate.

    Example:
        >>> easiest()(torch.tensor([0.1, 3.0, 2.0, 0.5]), 0.5).indices
        tensor([0, 3])
    """

    def __call__(self, losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
        n = length(losses)
        return Selection(torch.sort(losses, stable=True).indices[: keep_count(keep, n)], n, n)


@dataclass(frozen=True)
class between:
    """Two-sided trimming: drop the hardest part ``skip``, keep the next ``keep``.

    ``s = min(round(skip * n), n - 1)`` samples of largest loss are dropped, then the ``min(k, n - s)`` next hardest are
    kept. It is meant for label noise: wrong labels concentrate among the very largest losses, and a small keep fraction
    multiplies their share. The hardest ``skip`` is dropped even if ``keep`` is 1.

    Args:
        skip: fraction dropped from the hard end, in [0, 1); about the noise rate.

    Example:
        >>> between(skip=0.25)(torch.tensor([0.1, 9.0, 2.0, 0.5]), 0.5).indices
        tensor([2, 3])
    """

    skip: float = 0.1

    def __post_init__(self) -> None:
        skip = check_fraction("skip", self.skip, "It is the fraction of the batch dropped from the hard end.")
        object.__setattr__(self, "skip", skip)

    def __call__(self, losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
        n = length(losses)
        skipped = min(round(self.skip * n), n - 1)
        order = torch.sort(losses, descending=True, stable=True).indices[skipped : skipped + keep_count(keep, n)]
        return Selection(order, n, n)

    def compiled_mask(self, losses: Tensor, keep: Tensor, n: Tensor | int) -> Tensor:
        skipped = torch.minimum(torch.round(torch.ones_like(keep) * self.skip * n), torch.ones_like(keep) * n - 1)
        return rank_mask(losses, keep_count_tensor(keep, n), skipped)


@dataclass(frozen=True)
class uniform:
    """Keep k samples drawn uniformly without replacement: the control that separates selection from smaller batches.

    Source: a strong baseline in arXiv 2111.12621. A trimmer passes its own generator; called without one, the rule
    draws from torch's.

    Args:
        like: a rule that sets k in each step, for rules whose k depends on the losses: the control of ``loss_mass`` is
            ``uniform(like=loss_mass())``. None means ``k = keep_count(keep, n)``.

    Example:
        >>> uniform(like=above(1.0))(torch.tensor([0.1, 3.0, 2.0, 0.5]), 1.0).k
        2
    """

    like: Rule | None = None

    def __post_init__(self) -> None:
        if self.like is not None:
            check_rule("like", self.like)
            check_stateless("like", self.like)

    @property
    def k_follows_losses(self) -> bool:
        return self.like is not None

    @property
    def reads_keep(self) -> bool:
        return reads_keep(self.like)

    def __repr__(self) -> str:
        return "uniform()" if self.like is None else f"uniform(like={self.like!r})"

    def __call__(self, losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
        n = length(losses)
        k = keep_count(keep, n) if self.like is None else self.like(losses, keep, generator).k
        drawn = torch.randperm(n, generator=drawing(generator), device=drawing_device(generator))[:k]
        return Selection(drawn.to(losses.device), n, n)


@dataclass(frozen=True)
class above:
    """Keep every loss above a threshold, and at least the ``min_keep`` hardest: online hard example mining.

    Source: arXiv 1604.03540, in the threshold form commonly used for segmentation. The keep fraction is not used.
    How many are kept depends on the values, so this rule syncs the device.

    Args:
        threshold: in units of the loss.
        min_keep: smallest number kept.

    Example:
        >>> above(1.0)(torch.tensor([0.1, 3.0, 2.0, 0.5]), 1.0).indices
        tensor([1, 2])
    """

    threshold: float
    min_keep: int = 1
    k_follows_losses: ClassVar[bool] = True
    reads_keep: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", check_number("threshold", self.threshold))
        if self.threshold != self.threshold:
            raise ValueError("expected `threshold` to be a number to compare losses with, got nan.")
        object.__setattr__(self, "min_keep", check_count("min_keep", self.min_keep))

    def __call__(self, losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
        n = length(losses)
        check_has_values("losses", losses, "above")
        # not <=, so that a NaN loss counts as above
        over = int((~(losses <= self.threshold)).sum())
        return Selection(top_indices(losses, min(n, max(over, self.min_keep))), n, n)


@dataclass(frozen=True)
class superquantile:
    """Take the mean above the (1 - keep) quantile, with the boundary sample weighted by its fraction (CVaR).

    With ``t = keep * n`` and ``m = floor(t)``: weight 1 for the m hardest, ``t - m`` for the next; the sum is divided
    by t. No weight is ever negative. If t is whole, this equals :class:`hardest`.

    Example:
        >>> selection = superquantile()(torch.tensor([0.1, 3.0, 2.0, 0.5]), 0.375)
        >>> selection.indices, selection.weights, selection.normalizer
        (tensor([1, 2]), tensor([1.0000, 0.5000]), 1.5)
    """

    def __call__(self, losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
        n = length(losses)
        tail = fraction(keep) * n
        whole = int(tail)
        if whole in (0, tail):  # for less than one sample the mean is the largest loss, whatever the fraction
            return Selection(top_indices(losses, max(1, whole)), n, n)
        indices = torch.sort(losses, descending=True, stable=True).indices[: whole + 1]
        weights = torch.ones(whole + 1, dtype=torch.promote_types(losses.dtype, torch.float32), device=losses.device)
        weights[-1] = tail - whole
        return Selection(indices, n, n, weights, tail)


@dataclass(frozen=True)
class percentile:
    """Keep each sample with probability ``(percentile among recent losses) ** beta``, independently.

    Source: Selective-Backprop, arXiv 1910.00762 (its script: beta 3, history 1024). There, kept samples are collected
    until a batch is full; here each batch keeps its own draws, or the hardest sample if nothing was drawn. The keep
    fraction is not used. The percentile of l is the fraction of the history, this batch included, that is <= l.

    Args:
        beta: exponent, >= 0; a larger one keeps fewer. The expected fraction kept is 1 / (beta + 1).
        history: how many recent losses the percentile refers to.
    """

    beta: float = 2.0
    history: int = 1024
    k_follows_losses: ClassVar[bool] = True
    reads_keep: ClassVar[bool] = False
    _recent: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", check_number("beta", self.beta))
        if not self.beta >= 0:
            raise ValueError(f"expected `beta` to be at least 0, got {self.beta:g}. 0 keeps everything.")
        object.__setattr__(self, "history", check_count("history", self.history))

    def __call__(self, losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
        n = length(losses)
        check_has_values("losses", losses, "percentile")
        # NaN counts as largest: a search among sorted losses needs it to be comparable
        batch = losses.detach().float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        recent = batch if self._recent is None else torch.cat([self._recent.to(batch.device), batch])
        recent = recent[-self.history :].clone()
        self._remember(recent)
        ordered = torch.sort(recent).values
        chance = torch.searchsorted(ordered, batch, right=True).to(batch.dtype) / ordered.shape[0]
        draw = torch.rand(n, generator=drawing(generator), device=drawing_device(generator)).to(batch.device)
        indices = (draw < chance**self.beta).nonzero().squeeze(1)
        return Selection(indices if indices.shape[0] else top_indices(losses, 1), n, n)

    def state_dict(self) -> dict[str, Any]:
        """Return the recent losses, padded with NaN to the length of the history: a state of one shape."""
        recent = torch.full((self.history,), torch.nan, device="cpu")
        if self._recent is not None:
            known = self._recent[-self.history :]
            recent[: known.shape[0]] = known
        return {"recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, ("recent",), "a percentile rule")
        recent = state["recent"]
        if recent is not None and not (isinstance(recent, Tensor) and recent.ndim == 1 and recent.is_floating_point()):
            raise ValueError(f"expected `state['recent']` to be a vector of losses, got {describe(recent)}.")
        recent = None if recent is None else recent[~recent.isnan()]
        self._remember(None if recent is None or not len(recent) else recent)

    def _remember(self, recent: Tensor | None) -> None:
        object.__setattr__(self, "_recent", recent)  # the settings alone are frozen


@dataclass(frozen=True)
class percentile_topk:
    """Draw k samples without replacement, with probability proportional to ``percentile ** (1 / keep - 1)``.

    Source: the variant of Selective-Backprop in MosaicML's Composer, in which the percentile of rank i of n (0 the
    easiest) is ``(i + 0.5) / n`` and k is rounded down; here k follows :func:`keep_count`. Composer keeps 0.5 from
    50 % to 90 % of training, on every second step: here that is up to the schedule.
    """

    def __call__(self, losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
        n = length(losses)
        k = keep_count(check_keep("keep", keep), n)
        if k == n:
            return Selection(torch.arange(n, device=losses.device), n, n)
        check_has_values("losses", losses, "percentile_topk")
        generator, device = drawing(generator), drawing_device(generator)
        order = torch.argsort(losses, stable=True).to(device)
        chance = torch.empty(n, dtype=torch.float64, device=device)
        # relative to the hardest, in logarithms: with a small keep the powers would all round to 0
        rank = torch.arange(n, dtype=torch.float64, device=device) + 0.5
        chance[order] = torch.exp(min(1.0 / keep - 1.0, 1e300) * torch.log(rank / (n - 0.5)))
        drawn = torch.multinomial(chance, k, replacement=False, generator=generator)
        return Selection(drawn.to(losses.device), n, n)
