"""Separate overlapping marks in a chart so that none hides another. Lengths are in units of the drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["apart", "covered", "rings"]

LEVELS = (0, *(sign * step for step in (6, 12, 3, 9, 15) for sign in (-1, 1)))


def apart(places: Sequence[float], near: float = 7.0) -> list[int]:
    """Return how far each dot of a row moves up or down: by its size, or half of it if many share a place."""
    taken: list[tuple[float, int]] = []
    for place in places:
        beside = {level for other, level in taken if abs(place - other) <= near}
        taken.append((place, next((level for level in LEVELS if level not in beside), 0)))
    return [level for _, level in taken]


def rings(places: Sequence[tuple[float, float]], near: float = 4.0) -> list[int]:
    """Return the number of each dot's ring: 0 for a dot with no earlier one at its place, then 1, 2, ... outwards."""
    found: list[int] = []
    for number, place in enumerate(places):
        there = [ring for other, ring in zip(places[:number], found, strict=True) if math.dist(place, other) < near]
        found.append(max(there) + 1 if there else 0)
    return found


def covered(lines: Sequence[tuple[Sequence[float], Sequence[float], bool]], near: float = 1.5) -> list[int]:
    """Return how many earlier lines each would mostly cover: more of them give it wider gaps.

    Args:
        lines: x and y of each, and whether it is dashed.
    """

    def covers(line: int, other: int) -> bool:
        (x, y, dashed), (x_other, y_other, dashed_other) = lines[line], lines[other]
        if list(x) != list(x_other) or dashed != dashed_other or len(x) < 2:
            return False
        return sum(abs(a - b) < near for a, b in zip(y, y_other, strict=True)) > 0.8 * len(x)

    return [sum(covers(line, other) for other in range(line)) for line in range(len(lines))]
