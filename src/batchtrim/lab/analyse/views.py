"""Compare errors at a budget that every run reached: equal backward samples, or equal training time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from batchtrim._checks import is_finite
from batchtrim.lab.metric import Metric
from batchtrim.lab.records import Row

BUDGETS = ("samples_backward", "seconds")


def error_at(row: Row, budget: float, axis: str) -> float | None:
    """Return the test error of a run at ``budget`` on ``axis`` ("samples_backward" or "seconds").

    It is interpolated linearly between the evaluations around the budget; None before the first evaluation, since
    nothing was measured.
    """
    spent, errors = spent_curve(row, axis)
    if not _reached(spent, budget):
        return None
    return float(np.interp(budget, spent, errors))


def spent_curve(row: Row, axis: str) -> tuple[list[float], list[float]]:
    """Return what a run had spent at each evaluation, and the test error there, if there was one."""
    curve = row.get("curve") or {}
    points = [
        (x, y)
        for x, y in zip(curve.get(axis) or [], curve.get(Metric.of(row["config"]).field) or [], strict=False)
        if is_finite(x) and is_finite(y)
    ]
    return [x for x, _ in points], [y for _, y in points]


@dataclass(frozen=True)
class Missing:
    """The reason why runs have no budget in common.

    Attributes:
        kind: "no run" finished, "no curve" of a run was recorded, or the runs lie "apart".
        ended, begun: for runs that lie apart, the index of the one that ended before the other's first evaluation, and
            of the other.
    """

    kind: Literal["no run", "no curve", "apart"]
    ended: int = 0
    begun: int = 0


def common_budget(rows: Sequence[Row], axis: str) -> float | Missing:
    """Return the largest budget by which all runs have been evaluated, or why there is none."""
    if not rows:
        return Missing("no run")
    spent = [spent_curve(row, axis)[0] for row in rows]
    if not all(spent):
        return Missing("no curve")
    ended = min(range(len(rows)), key=lambda number: spent[number][-1])
    begun = max(range(len(rows)), key=lambda number: spent[number][0])
    if not _reached(spent[begun], spent[ended][-1]):
        return Missing("apart", ended, begun)
    return spent[ended][-1]


def _reached(spent: list[float], budget: float) -> bool:
    """True if a run was evaluated at the budget or before; sums may be off in their last digits."""
    return bool(spent) and budget >= spent[0] * (1 - 1e-9)
