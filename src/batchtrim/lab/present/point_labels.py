"""Place the names of a chart's points: beside them, clear of each other, and of other points and lines if possible.

All lengths are in units of the drawing, with y downwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

__all__ = ["Box", "Place", "along", "around", "joined", "named_and_numbered", "place", "width"]

Box = tuple[float, float, float, float]
"""Left, right, top and bottom of something drawn."""
Place = tuple[float, float, str]
"""The place of a name: x, base line and anchor."""
Named = tuple[float, float, float]
"""A point: x, y, and the width of its name."""

ABOVE, BELOW = 11, 4  # of a name's base line, that its letters take on a phone, where they are the largest
GAP = 10  # between the middle of a point and its name
FAR = 15  # from a point to its name, up or down: from here on a stroke joins them
MOST_STROKE = 60  # from the only point whose name is not beside it
CROSSED = 16.0  # how far a name is moved rather than laid over a point or a line
SIDES = {"start": 0.0, "end": 2.0, "middle": 4.0}
"""Anchors of a name: to the right, to the left, above or below; each with its penalty."""
THIN, WIDE = 5.8, 9.9  # width of a letter of a name, about, on a phone
FEW = 4  # points whose names can be distinguished at any place
NUMBER = 20.0  # width of a number of two digits


def place(points: Sequence[Named], taken: Sequence[Sequence[Box]], room: Box) -> list[Place]:
    """Return the place of each name.

    No name covers another as long as there is room. Each moves up or down a little, and by up to ``CROSSED`` for
    each point or line that it would cover.

    Args:
        taken: what else is drawn, in boxes.
        room: for all of it.
    """
    found: list[Place] = []
    names: list[Box] = []
    for point in points:
        at, _ = _best(point, names, taken, room)
        names.append(_box(point, at))
        found.append(at)
    return found


def named_and_numbered(
    points: Sequence[Named], taken: Sequence[Sequence[Box]], room: Box, first: Sequence[int] = ()
) -> tuple[list[Place], list[int]]:
    """Return the place of each name, or of the number that stands for it, and which have a number, from left to right.

    All are named where each name stands beside its point and on nothing else, and where points are few. Otherwise a
    name that finds no such place gives way to a number.

    Args:
        first: the points that are named before the others.
    """
    order = sorted(range(len(points)), key=lambda each: points[each][1])
    at = dict(zip(order, place([points[each] for each in order], taken, room), strict=True))
    all_clear = not any(far(points[each], at[each]) or _crossed(points[each], at[each], taken) for each in order)
    if all_clear or len(points) <= FEW:
        return [at[each] for each in range(len(points))], []
    names: dict[int, Box] = {}
    lonely = sorted(order, key=lambda each: -_nearest(points, each))
    for each in [*first, *(each for each in lonely if each not in first)]:
        at[each], clear = _best(points[each], list(names.values()), taken, room)
        if clear and not far(points[each], at[each]):
            names[each] = _box(points[each], at[each])
    numbered = sorted(set(order) - set(names), key=lambda each: points[each])
    if len(numbered) == 1:  # a stroke to its name is less to read than a list of one
        (alone,) = numbered
        at[alone], clear = _best(points[alone], list(names.values()), taken, room)
        numbered = [] if clear and abs(at[alone][1] - points[alone][1]) < MOST_STROKE else numbered
    for each in numbered:
        short = (*points[each][:2], NUMBER)
        at[each], _ = _best(short, list(names.values()), taken, room)
        names[each] = _box(short, at[each])
    return [at[each] for each in range(len(points))], numbered


def width(name: str) -> float:
    """Return about how wide a name is."""
    return sum(THIN if letter in "fijlrt1(). " else WIDE for letter in name)


def far(point: Named, at: Place) -> bool:
    """True if a name is not beside its point."""
    return abs(at[1] - 4 - point[1]) > FAR


def joined(point: Named, at: Place, points: Sequence[Named]) -> bool:
    """True if a stroke has to join a name to its point: it is far, or another point is nearer to the name."""
    box = _box(point, at)
    return far(point, at) or any(_gap(box, each) < _gap(box, point) for each in points)


def around(x: float, y: float, radius: float) -> Box:
    """Return the box of a dot."""
    return x - radius, x + radius, y - radius, y + radius


def along(places: Sequence[tuple[float, float]], pieces: int = 24) -> list[Box]:
    """Return the line through places, in small pieces."""
    parts = [
        (x + part * (x_next - x), y + part * (y_next - y))
        for (x, y), (x_next, y_next) in itertools.pairwise(places)
        for part in (k / pieces for k in range(pieces + 1))
    ]
    return [(across - 5, across + 5, down - 1, down + 1) for across, down in parts]


def _best(point: Named, names: Sequence[Box], taken: Sequence[Sequence[Box]], room: Box) -> tuple[Place, bool]:
    """Return the cheapest place of a name, and whether it covers nothing there."""
    x, y, _ = point
    least, clear = float("inf"), False
    best: Place = (x + GAP, y + 4, "start")
    sides = []
    for anchor, extra in SIDES.items():
        across = {"start": x + GAP, "end": x - GAP, "middle": x}[anchor]
        left, right, _, _ = _box(point, (across, y, anchor))
        if left >= room[0] and right <= room[1]:  # at every level the same is beside a name
            groups = [[each for each in group if left < each[1] and each[0] < right] for group in (names, *taken)]
            sides.append((across, anchor, extra, groups))
    for level in sorted(range(int(room[2]) + ABOVE, int(room[3]) - BELOW), key=lambda each: abs(each - y - 4)):
        if abs(level - y - 4) >= least:
            break
        for across, anchor, extra, (others, *groups) in sides:
            at = (across, level, anchor)
            box = _box(point, at)
            if any(_meet(box, each) for each in others):
                continue
            crossed = sum(any(_meet(box, each) for each in group) for group in groups)
            cost = abs(level - y - 4) + extra + CROSSED * crossed
            if cost < least:
                least, best, clear = cost, at, not crossed
    return best, clear


def _box(point: Named, at: Place) -> Box:
    left = at[0] - {"start": 0.0, "end": point[2], "middle": point[2] / 2}[at[2]]
    return left, left + point[2], at[1] - ABOVE, at[1] + BELOW


def _crossed(point: Named, at: Place, taken: Sequence[Sequence[Box]]) -> int:
    """Return how many of the things drawn a name covers."""
    box = _box(point, at)
    return sum(any(_meet(box, each) for each in group) for group in taken)


def _nearest(points: Sequence[Named], one: int) -> float:
    """Return how far the nearest other point is."""
    return min((math.dist(points[one][:2], each[:2]) for n, each in enumerate(points) if n != one), default=math.inf)


def _gap(box: Box, point: Named) -> float:
    """Return how far a point is from a box."""
    left, right, top, bottom = box
    return math.hypot(max(left - point[0], 0.0, point[0] - right), max(top - point[1], 0.0, point[1] - bottom))


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
