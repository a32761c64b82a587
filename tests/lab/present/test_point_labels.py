"""Names of points are beside them, and overlap nothing else if possible."""

from __future__ import annotations

import itertools
import random
import re

from batchtrim.lab.present import charts, point_labels, svg
from batchtrim.lab.present.point_labels import ABOVE, BELOW, FAR, GAP, NUMBER, far, named_and_numbered, place, width

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


def crowd(count: int = 15) -> list[tuple[float, float, float]]:
    """Return points of similar cost, as methods that take about as long as each other have."""
    draw = random.Random(1)
    return [(draw.uniform(300, 360), draw.uniform(120, 200), draw.uniform(60, 150)) for _ in range(count)]


def test_a_crowded_name_gives_way_to_a_number() -> None:
    """About 15 names of methods with similar times covered each other's points, or stood far from their own."""
    points = [(100.0, 60.0, 90.0), *crowd()]
    dots = [[(x - 6, x + 6, y - 6, y + 6)] for x, y, _ in points]
    places, numbered = named_and_numbered(points, dots, ROOM, first=[3])
    assert numbered == sorted(numbered, key=lambda each: points[each])
    assert len(numbered) >= 4
    assert 0 not in numbered, "a point that stands alone is named"
    sizes = [(x, y, NUMBER if row in numbered else width) for row, (x, y, width) in enumerate(points)]
    found = boxes(sizes, places)
    for one, other in itertools.combinations(found, 2):
        assert one[0] >= other[1] or other[0] >= one[1] or one[2] >= other[3] or other[2] >= one[3]
    for row, (box, point) in enumerate(zip(found, points, strict=True)):
        if row not in numbered:
            assert abs(places[row][1] - 4 - point[1]) <= FAR
            for (dot,) in dots:
                assert box[0] >= dot[1] or dot[0] >= box[1] or box[2] >= dot[3] or dot[2] >= box[3]


def test_names_with_room_have_no_numbers_and_few_points_neither() -> None:
    apart = [(60.0 + 40 * k, 30.0 + 40 * k, 60.0) for k in range(5)]
    assert named_and_numbered(apart, [], ROOM)[1] == []
    assert named_and_numbered(crowd(4), [[(290.0, 370.0, 100.0, 220.0)]], ROOM)[1] == []
    assert named_and_numbered([], [], ROOM) == ([], [])


def test_numbers_are_listed_below_the_chart_which_grows() -> None:
    points = [charts.Point(f"method_{n:02d}<", n, 90.0 + n / 3, 3.0 + (7 * n % 5) / 50, (2.5, 3.5)) for n in range(17)]
    drawn = str(charts.scatter(points, x_label="", y_label="", x_fmt=str, fmt=str))
    listed = dict(re.findall(r'text-anchor="end">(\d+)</text><text class="tick"[^>]*>([^<]*)</text>', drawn))
    assert len(listed) >= 8
    assert list(listed) == [str(1 + n) for n in range(len(listed))]
    for number, name in listed.items():
        assert len(re.findall(rf">{number}</text>", drawn)) == 2, "beside its point and in the list"
        assert drawn.count(f">{name}</text>") == 1
    height = int(re.findall(r'viewBox="0 0 480 (\d+)"', drawn)[0])
    assert height > svg.HEIGHT
    assert max(float(y) for y in re.findall(r'<text class="tick" x="[0-9.]+" y="([0-9.]+)">', drawn)) < height
    assert max(float(x) for x in re.findall(r'<text class="tick" x="([0-9.]+)" y="[0-9.]+">', drawn)) < svg.WIDTH


def test_a_single_crowded_name_is_joined_by_a_stroke() -> None:
    """A list of one name is more to read than a stroke."""
    points = [(100.0, 100.0, 90.0), (300.0, 30.0, 50.0), (300.0, 200.0, 50.0), (400.0, 40.0, 40.0), (60.0, 220.0, 90.0)]
    dots = [[(x - 6, x + 6, y - 6, y + 6)] for x, y, _ in points]
    lines = [[(0.0, 480.0, 80.0, 118.0)], [(0.0, 480.0, 90.0, 110.0)]]
    places, numbered = named_and_numbered(points, [*dots, *lines], ROOM)
    assert numbered == []
    assert any(far(point, at) for point, at in zip(points, places, strict=True))


def test_a_stroke_tells_whose_a_name_is() -> None:
    """A number above its point stood nearer to another one, and read as the other's."""
    point, at = (100.0, 100.0, NUMBER), (90.0, 104.0 - FAR, "end")
    assert not point_labels.joined(point, at, [point, (130.0, 90.0, 40.0), (20.0, 90.0, 40.0)])
    assert point_labels.joined(point, at, [point, (80.0, 80.0, 40.0)])
    assert point_labels.joined(point, (90.0, 103.0 - FAR, "end"), [point])


def test_the_baseline_keeps_its_name() -> None:
    points = [charts.Point("full", 0, 100.0, 3.05, (2.5, 3.5))]
    points += [
        charts.Point(f"method_{n:02d}", 1 + n, 90.0 + n / 3, 3.0 + (7 * n % 5) / 50, (2.5, 3.5)) for n in range(16)
    ]
    drawn = str(charts.scatter(points, x_label="", y_label="", x_fmt=str, fmt=str))
    assert re.search(r'<text class="name s0"[^>]*>full</text>', drawn)
    assert width("full") < width("oooo")
