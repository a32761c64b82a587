"""Place the names of a chart's points: beside them, clear of each other, and of other points and lines if possible.

All lengths are those of the drawing, y downwards.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Box", "place"]

Box = tuple[float, float, float, float]
"""Left, right, top and bottom of something drawn."""

ABOVE, BELOW = 10, 3  # of a name's base line, that its letters take
GAP = 10  # between the middle of a point and its name
CROSSED = 16.0  # how far a name is moved rather than laid over a point or a line
SIDES = {"start": 0.0, "end": 2.0, "middle": 4.0}
"""Anchors of a name: to the right, to the left, above or below; each with its penalty."""


def place(
    points: Sequence[tuple[float, float, float]], taken: Sequence[Sequence[Box]], room: Box
) -> list[tuple[float, float, str]]:
    """Return each name's x, base line and anchor.

    No name covers another as long as there is room; each is moved up or down by little, and by up to ``CROSSED`` for
    each point or line that it would cover.

    Args:
        points: x and y of each, and the width of its name. taken: what else is drawn, in boxes. room: for all of it.
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
