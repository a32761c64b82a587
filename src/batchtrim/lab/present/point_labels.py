"""Place the names of a chart's points: beside them, clear of each other, and of other points and lines if possible.

All lengths are in units of the drawing, with y downwards.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Box", "place"]

Box = tuple[float, float, float, float]
"""Left, right, top and bottom of a mark."""

ABOVE, BELOW = 10, 3  # height of letters above a name's baseline
GAP = 10  # between the middle of a point and its name
CROSSED = 16.0  # how far a name moves rather than cover a point or a line
SIDES = {"start": 0.0, "end": 2.0, "middle": 4.0}
"""Positions of a name: right, left, above or below, each with its penalty."""


def place(
    points: Sequence[tuple[float, float, float]], taken: Sequence[Sequence[Box]], room: Box
) -> list[tuple[float, float, str]]:
    """Return each name's x, baseline and anchor.

    No name covers another as long as there is room. Each moves up or down a little, and by up to ``CROSSED`` for
    each point or line that it would cover.

    Args:
        points: x and y of each, and the width of its name. taken: boxes of other marks. room: the box for everything.
    """
    found: list[tuple[float, float, str]] = []
    names: list[Box] = []
    for x, y, width in points:
        x_of = {"start": x + GAP, "end": x - GAP, "middle": x}
        lefts = {"start": x + GAP, "end": x - GAP - width, "middle": x - width / 2}
        least, best = float("inf"), (x + GAP, y + 4, "start")
        for level in sorted(range(int(room[2]) + ABOVE, int(room[3]) - BELOW), key=lambda each: abs(each - y - 4)):
            if abs(level - y - 4) >= least:
                break
            for anchor, extra in SIDES.items():
                box = (lefts[anchor], lefts[anchor] + width, level - ABOVE, level + BELOW)
                outside = box[0] < room[0] or box[1] > room[1]
                if outside or any(_meet(box, each) for each in names):
                    continue
                crossed = sum(any(_meet(box, each) for each in group) for group in taken)
                cost = abs(level - y - 4) + extra + CROSSED * crossed
                if cost < least:
                    least, best = cost, (x_of[anchor], level, anchor)
        left = best[0] - {"start": 0.0, "end": width, "middle": width / 2}[best[2]]
        names.append((left, left + width, best[1] - ABOVE, best[1] + BELOW))
        found.append(best)
    return found


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
