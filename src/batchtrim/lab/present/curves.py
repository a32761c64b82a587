"""The curves of a group's runs as lines of a chart: one per arm, a mean over seeds at each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from batchtrim._checks import is_finite
from batchtrim.lab.analyse.comparison import Arm, Group
from batchtrim.lab.present import svg
from batchtrim.lab.present.charts import Series

__all__ = ["error_range", "series_of"]


def series_of(
    group: Group, styles: dict[str, int], name: str, *, band: bool = True, dashed: bool = False
) -> list[Series]:
    """Return one line per arm: a curve's mean over the seeds that have a value, with their spread as a band.

    Epochs count from 1. A task may log some epochs only, and each seed others.
    """
    found = []
    for arm in group.arms:
        runs, points = _points(arm, name)
        epochs = sorted(points)
        if not epochs:
            continue
        mean = [fmean(points[epoch]) for epoch in epochs]
        spread = [_deviation(points[epoch]) for epoch in epochs]
        banded = band and runs > 1
        found.append(
            Series(
                arm.label if not dashed else f"{arm.label}, all",
                styles[arm.label],
                epochs,
                mean,
                [middle - half for middle, half in zip(mean, spread, strict=True)] if banded else None,
                [middle + half for middle, half in zip(mean, spread, strict=True)] if banded else None,
                dashed,
            )
        )
    return found


def error_range(series: Sequence[Series]) -> tuple[tuple[float, float] | None, bool]:
    """Return an axis range up to the worst error after a fifth of training, and whether it cuts off any values."""
    late = [y for each in series for part in (each.y, each.low, each.high) for y in (part or [])[len(each.y) // 5 :]]
    if not late:
        return None, False
    low, high = svg.data_range(late)
    top = max(y for each in series for y in (each.high or each.y))
    if top <= 1.3 * high:
        return svg.data_range([min(late), max(top, high)]), False
    return (low, high), True


def _points(arm: Arm, name: str) -> tuple[int, dict[int, list[float]]]:
    """Return the number of finished runs, and their finite values of a curve by epoch."""
    runs, found = 0, {}
    for row in arm.runs:
        curve: dict[str, Any] = row.get("curve") or {}
        values = curve.get(name) or []
        if row["status"] != "finished":
            continue
        runs += 1
        epochs = curve.get("epoch") or []
        if len(epochs) != len(values):
            epochs = range(len(values))
        for epoch, value in zip(epochs, values, strict=True):
            if is_finite(value):
                found.setdefault(1 + int(epoch), []).append(value)
    return runs, found


def _deviation(values: Sequence[float]) -> float:
    """Return the standard deviation, with n - 1; 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0
