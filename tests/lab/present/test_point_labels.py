"""Names of points lie beside them, on nothing else if that can be."""

from __future__ import annotations

import itertools
import random

from batchtrim.lab.present.point_labels import ABOVE, BELOW, GAP, place

ROOM = (0.0, 480.0, 0.0, 250.0)


def boxes(points: list[tuple[float, float, float]], places: list[tuple[float, float, str]]) -> list[tuple[float, ...]]:
    shift = {"start": 0.0, "end": 1.0, "middle": 0.5}
    return [
        (x - shift[anchor] * width, x + (1 - shift[anchor]) * width, level - ABOVE, level + BELOW)
        for (_, _, width), (x, level, anchor) in zip(points, places, strict=True)
    ]


def test_a_lone_name_is_at_the_right_and_turns_left_at_the_edge() -> None:
    assert place([(100.0, 100.0, 60.0)], [], ROOM) == [(100.0 + GAP, 104, "start")]
    assert place([(440.0, 100.0, 60.0)], [], ROOM) == [(440.0 - GAP, 104, "end")]


def test_a_name_goes_where_it_covers_nothing() -> None:
    whisker = [(150.0, 160.0, 40.0, 200.0)]
    assert place([(100.0, 100.0, 80.0)], [whisker], ROOM)[0][2] == "end"
    ahead = [(100.0 + k, 102.0 + k, 99.0, 101.0) for k in range(200)]
    dot = [(34.0, 46.0, 94.0, 106.0)]
    assert place([(40.0, 100.0, 80.0)], [dot, ahead], ROOM)[0][1] != 104


def test_no_two_names_meet_and_none_leaves_the_room() -> None:
    draw = random.Random(0)
    for _ in range(20):
        points = [(draw.uniform(50, 430), draw.uniform(20, 230), draw.uniform(20, 120)) for _ in range(20)]
        found = boxes(points, place(points, [[(0.0, 480.0, 120.0, 121.0)]], ROOM))
        for one, other in itertools.combinations(found, 2):
            assert one[0] >= other[1] or other[0] >= one[1] or one[2] >= other[3] or other[2] >= one[3]
        assert all(ROOM[0] <= left and right <= ROOM[1] for left, right, _, _ in found)
