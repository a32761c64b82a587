"""Statistics of few paired values: intervals, tests, correction, and the smallest detectable difference.

Errors are fractions in [0, 1] throughout; a *point* is one percentage point of error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = [
    "ALPHA",
    "MIN_PAIRS",
    "NO_SPREAD",
    "Moments",
    "detectable",
    "detectable_effect",
    "holm",
    "moments",
    "paired_t",
    "unit_of",
    "wilcoxon",
]

ALPHA = 0.05
POWER = 0.80
RESAMPLES = 10_000
_VALUES_AT_ONCE = 1_000_000  # of the resamples; they do not depend on it
_EXACT_PAIRS = 500  # of the signed-rank test
MIN_PAIRS = 3
"""With fewer pairs than this no verdict is given: an interval over two pairs spans thirteen times their spread."""

# Standard deviations below this are rounding: errors are counts over at most millions of test samples.
NO_SPREAD = 1e-12


@dataclass(frozen=True)
class Moments:
    """The mean of some values and its precision; None if n is too small.

    Attributes:
        n: number of values.
        std: with n - 1.
        t: 95 % interval of the mean from Student's t.
        bootstrap: 95 % percentile interval over resamples. It is too narrow for a handful of values and only shows
            whether the t interval depends on the shape of the distribution.
    """

    n: int
    mean: float | None
    std: float | None
    t: tuple[float, float] | None
    bootstrap: tuple[float, float] | None

    def times(self, unit: float) -> Moments:
        """Return the moments of ``unit`` times the values."""

        def scaled(ends: tuple[float, float] | None) -> tuple[float, float] | None:
            return None if ends is None else (ends[0] * unit, ends[1] * unit)

        mean, std = (None if value is None else value * unit for value in (self.mean, self.std))
        return Moments(self.n, mean, std, scaled(self.t), scaled(self.bootstrap))


def unit_of(values: Iterable[float]) -> float:
    """Return the power of two below the largest magnitude: in this unit, rounding is as for errors."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0


def moments(values: Sequence[float]) -> Moments:
    """Return mean, spread and 95 % intervals of a few values; intervals need at least two."""
    n = len(values)
    if n == 0:
        return Moments(0, None, None, None, None)
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if n == 1:
        return Moments(1, mean, None, None, None)
    std = _spread(data)
    half = _t_quantile(n - 1) * std / math.sqrt(n)
    return Moments(n, mean, std, (mean - half, mean + half), _bootstrap(data))


def paired_t(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of Student's paired t-test: t = mean / (std / sqrt(n)) on n - 1 degrees of freedom.

    None for fewer than two pairs, and if all differences are equal but not zero: the test is then undefined.
    """
    from scipy import stats

    data = np.asarray(differences, dtype=np.float64)
    if len(data) < 2:
        return None
    if _spread(data) == 0.0:
        return 1.0 if abs(data.mean()) < NO_SPREAD else None
    return float(stats.ttest_1samp(data, 0.0)[1])  # type: ignore[arg-type]


def wilcoxon(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of Wilcoxon's signed-rank test, exact with ties and for up to 500 pairs.

    Beyond that, where the exact distribution takes minutes, it is the normal approximation.
    Zeros are left out; ties get their mean rank. None for fewer than two pairs; 1 if all differences are zero.
    """
    from scipy import stats

    if len(differences) < 2:
        return None
    data = np.asarray(differences, dtype=np.float64).round(12)
    data = data[data != 0.0]
    if len(data) == 0:
        return 1.0
    if len(data) > _EXACT_PAIRS:
        ranks = stats.rankdata(np.abs(data))
        z = (ranks[data > 0].sum() - ranks.sum() / 2.0) / math.sqrt((ranks**2).sum() / 4.0)
        return float(2.0 * stats.norm.sf(abs(z)))
    if len(np.unique(np.abs(data))) == len(data):
        return float(stats.wilcoxon(data, method="exact")[1])  # type: ignore[arg-type]
    return _wilcoxon_with_ties(data, stats.rankdata(np.abs(data)))


def _wilcoxon_with_ties(data: np.ndarray, ranks: np.ndarray) -> float:
    """Return the exact p-value with tied ranks: SciPy's exact test allows none, and trying all signs takes 2^n."""
    doubled = (2 * ranks).astype(int)  # so that tied ranks are whole numbers
    ways = np.zeros(doubled.sum() + 1)
    ways[0] = 1.0
    for rank in doubled:
        ways[rank:] += ways[:-rank].copy()
        ways /= 2.0
    observed = int(doubled[data > 0].sum())
    return float(min(1.0, 2.0 * min(ways[: observed + 1].sum(), ways[observed:].sum())))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Apply Holm's step-down correction: the i-th smallest of m p-values times m - i + 1, kept non-decreasing."""
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i] or 0.0)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for position, i in enumerate(order):
        largest = max(largest, min(1.0, (p_values[i] or 0.0) * (len(order) - position)))
        corrected[i] = largest
    return corrected


def detectable(differences: Moments) -> float | None:
    """Return the smallest mean difference detectable with this many pairs and this spread; None if unknown."""
    if differences.n < MIN_PAIRS or not differences.std:
        return None
    return detectable_effect(differences.n) * differences.std


@lru_cache(maxsize=1024)
def detectable_effect(n: int) -> float:
    """Return the mean difference, in standard deviations of the differences, that a paired t-test over n pairs finds.

    That is, with 80 % power at the two-sided 0.05 level, by the noncentral t distribution.
    """
    from scipy import optimize, stats

    critical = _t_quantile(n - 1)

    def power(effect: float) -> float:
        # The other tail adds less than 0.0001 at a power of 0.8.
        return float(stats.nct.sf(critical, n - 1, effect * math.sqrt(n))) - POWER

    high = 2.0 / math.sqrt(n)  # slightly below the answer for any n
    while power(high) < 0:
        high *= 1.25
    return float(optimize.brentq(power, 1e-9, high, xtol=1e-9))  # type: ignore[arg-type]


def _spread(data: np.ndarray) -> float:
    std = float(data.std(ddof=1))
    return std if std > NO_SPREAD else 0.0


@lru_cache(maxsize=1024)
def _t_quantile(df: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(1 - ALPHA / 2, df))


def _bootstrap(data: np.ndarray) -> tuple[float, float]:
    """Return the percentile interval of the mean; every call uses the same resamples, so reports are reproducible."""
    from scipy import stats

    found = stats.bootstrap(
        (data,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _VALUES_AT_ONCE // len(data)),
        confidence_level=1 - ALPHA,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
