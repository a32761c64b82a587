"""Compare errors at a budget that every run reached: equal backward samples, or equal training time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from batchtrim.lab.metric import Metric
from batchtrim.lab.records import Row

BUDGETS = ("samples_backward", "seconds")


def error_at(row: Row, budget: float, axis: str) -> float | None:
    """Return the test error of a run when it had spent ``budget`` of ``axis`` ("samples_backward" or "seconds").

    Interpolated linearly between the evaluations around the budget; None before the first evaluation, where nothing
    was measured.
    """
    spent, errors = spent_curve(row, axis)
    if not spent or budget < spent[0] * (1 - 1e-9):
        return None
    return float(np.interp(budget, spent, errors))


def spent_curve(row: Row, axis: str) -> tuple[list[float], list[float]]:
    """Return what a run had spent by each evaluation, and the test error there, where there was one."""
    curve = row.get("curve") or {}
    if axis == "seconds" or curve.get(axis):
        spent = list(curve.get(axis) or [])
    else:  # older rows: spread the total over epochs by the fraction kept in each
        keep = np.nan_to_num(np.asarray(curve.get("keep") or [], dtype=np.float64), nan=1.0)
        total = keep.sum()
        spent = (row[axis] * keep.cumsum() / total).tolist() if total > 0 and row.get(axis) is not None else []
    points = [
        (x, y)
        for x, y in zip(spent, curve.get(Metric.of(row["config"]).field) or [], strict=False)
        if _is_number(x) and _is_number(y)
    ]
    return [x for x, _ in points], [y for _, y in points]


def common_budget(rows: list[Row], axis: str) -> float | None:
    """Return the largest budget that every run reached; None where a run has no curve, or there is no run."""
    spent = [spent_curve(row, axis)[0] for row in rows]
    return min((each[-1] for each in spent), default=None) if all(spent) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
