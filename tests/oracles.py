"""The definition in plain NumPy, in float64, with loops where loops are clearest."""

from __future__ import annotations

import math

import numpy as np


def keep_count(keep: float, n: int) -> int:
    return min(n, max(1, round(keep * n)))


def order_hardest_first(losses: np.ndarray) -> list[int]:
    """Return the rows by falling loss; NaN is largest; of equal losses the lower row first."""
    return sorted(range(len(losses)), key=lambda i: (not np.isnan(losses[i]), -np.nan_to_num(losses[i], nan=0.0), i))


def hardest(losses: np.ndarray, keep: float) -> set[int]:
    return set(order_hardest_first(losses)[: keep_count(keep, len(losses))])


def easiest(losses: np.ndarray, keep: float) -> set[int]:
    order = sorted(range(len(losses)), key=lambda i: (np.isnan(losses[i]), np.nan_to_num(losses[i], nan=0.0), i))
    return set(order[: keep_count(keep, len(losses))])


def between(losses: np.ndarray, keep: float, skip: float) -> set[int]:
    skipped = min(round(skip * len(losses)), len(losses) - 1)
    return set(order_hardest_first(losses)[skipped : skipped + keep_count(keep, len(losses))])


def superquantile(losses: np.ndarray, keep: float) -> float:
    """(1 / (q n)) * integral of the upper tail: whole samples, then a fraction of the next."""
    tail = keep * len(losses)
    ordered = np.sort(losses)[::-1]
    whole = int(tail)
    rest = (tail - whole) * ordered[whole] if whole < len(losses) else 0.0
    return float((ordered[:whole].sum() + rest) / tail)


def loss_mass(
    losses: np.ndarray,
    keep: float,
    skip: float = 0.0,
    at_least: float = 0.0,
    at_most: float = 1.0,
    offset: float = 0.0,
) -> set[int]:
    """The fewest of the hardest that hold the share; sums of falling losses, each taken exactly."""
    n = len(losses)
    order = order_hardest_first(losses)[min(round(skip * n), n - 1) :]
    values = [float(losses[i]) for i in order]
    endless = sum(not math.isfinite(value) for value in values)
    mass = [max(0.0, value - offset) for value in values[endless:]]
    if keep == 1.0:
        k = len(order)
    elif endless:
        k = endless
    else:
        wanted = keep * math.fsum(mass) * (1 - 1e-12)
        k = next(j for j in range(1, len(mass) + 1) if math.fsum(mass[:j]) >= wanted)
    return set(order[: min(max(k, keep_count(at_least, n)), keep_count(at_most, n))])
