"""Small charts as inline SVG: lines with bands, paired differences, cost against error.

Written by hand rather than with a plotting library so that a page of them is light, sharp at any size, follows the
reader's light or dark scheme through CSS variables, and has searchable text.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from batchtrim.lab.present import overlaps, point_labels
from batchtrim.lab.present.point_labels import Box
from batchtrim.lab.present.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Format,
    Scale,
    axes,
    data_range,
    drawing,
    esc,
    polyline,
    style_class,
    ticks,
    widened,
)

BOLD = 7.6  # approximate width of a letter in a name
DOT, BIG = 3.5, 5.5  # radius of a dot in a chart of lines, and of costs
MOST_POINTS = 150  # points of a line: more are not visible at this size

_ids = itertools.count()


@dataclass(frozen=True)
class Series:
    """A line: ``style`` picks the colour, ``low`` and ``high`` a band around it."""

    label: str
    style: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Differences:
    """A row of the paired plot: one dot per seed, the mean with its interval, and the undetectable range."""

    label: str
    style: int
    seeds: Sequence[int]
    values: Sequence[float]
    mean: float
    interval: tuple[float, float] | None
    detectable: float | None
    text: str


@dataclass(frozen=True)
class Point:
    """A method in the cost plot, with an interval of its error."""

    label: str
    style: int
    x: float
    y: float
    interval: tuple[float, float] | None


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    fmt: Format,
    y_range: tuple[float, float] | None = None,
    title: str = "",
) -> Markup:
    """Draw lines with bands over a common x axis; with scripts enabled, the pointer shows the values."""
    drawn = [_thin(each) for each in series if len(each.x)]
    xs = [x for each in drawn for x in each.x]
    if not xs:
        return Markup('<p class="note">No curve was recorded.</p>')
    low, high = y_range or data_range(
        [y for each in drawn for part in (each.y, each.low, each.high) for y in part or ()]
    )
    x = Scale(*widened(min(xs), max(xs)), LEFT, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    clip = f"clip{next(_ids)}"
    parts = [
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP - 2}" width="{WIDTH - LEFT - RIGHT}"'
        f' height="{HEIGHT - TOP - BOTTOM + 4}"/></clipPath>',
        axes(x, y, x_label, y_label, str, fmt, whole=True),
        f'<g clip-path="url(#{clip})">',
        *(_band(each, x, y) for each in drawn),
        *_lines(drawn, x, y),
        "</g>",
    ]
    known = {
        "plot": [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
        "x": [x.low, x.high],
        "series": [
            {"label": each.label, "css": style_class(each.style), "x": list(each.x), "y": [fmt(v) for v in each.y]}
            for each in drawn
        ],
    }
    return drawing("".join(parts), title, HEIGHT, f' class="chart lines" data-read="{esc(json.dumps(known))}"')


def differences(rows: Sequence[Differences], *, x_label: str, fmt: Format, title: str = "") -> Markup:
    """Draw one row per method: dots for seeds, a bar for the interval, shading for differences too small to detect."""
    values = [value for row in rows for value in (*row.values, *(row.interval or ()), 0.0)]
    low, high = data_range(values)
    step, top = 58, 8
    height = top + step * len(rows) + BOTTOM
    x = Scale(low, high, 16, WIDTH - 16)
    zero, floor = x(0.0), height - BOTTOM
    parts = []
    for tick in ticks(low, high, 6):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{floor}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{floor + 16}" text-anchor="middle">{fmt(tick)}</text>')
    parts.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{top}" y2="{floor}"/>')
    parts.append(f'<text class="axis" x="{WIDTH / 2}" y="{height - 8}" text-anchor="middle">{esc(x_label)}</text>')
    for number, row in enumerate(rows):
        base = top + step * number
        middle = base + 38
        if row.detectable:
            left, right = (min(max(x(edge), 16), WIDTH - 16) for edge in (-row.detectable, row.detectable))
            parts.append(
                f'<rect class="blind" x="{left:.1f}" y="{middle - 13}" width="{right - left:.1f}" height="26"/>'
            )
        parts.append(f'<g class="{style_class(row.style)}">')
        wide = 7 * len(row.text)  # a background, so that no grid line crosses the name or the numbers
        room, needed = WIDTH - 40 - wide, BOLD * len(row.label)  # longer names are squeezed, not truncated
        parts.append(f'<rect class="clear" x="12" y="{base}" width="{min(room, needed) + 8:.0f}" height="24"/>')
        parts.append(f'<rect class="clear" x="{WIDTH - 16 - wide}" y="{base}" width="{wide + 8}" height="24"/>')
        squeezed = f' textLength="{room}" lengthAdjust="spacingAndGlyphs"' if 0.92 * needed > room else ""
        parts.append(f'<text class="name" x="16" y="{base + 17}"{squeezed}>{esc(row.label)}</text>')
        parts.append(f'<text class="tick" x="{WIDTH - 16}" y="{base + 17}" text-anchor="end">{esc(row.text)}</text>')
        if row.interval:
            start, end = (x(edge) for edge in row.interval)
            parts.append(f'<line class="bar" x1="{start:.1f}" x2="{end:.1f}" y1="{middle}" y2="{middle}"/>')
        levels = overlaps.apart([x(value) for value in row.values])
        for seed, value, level in zip(row.seeds, row.values, levels, strict=True):
            parts.append(
                f'<circle class="dot" cx="{x(value):.1f}" cy="{middle + level}" r="4.5">'
                f"<title>seed {seed}: {fmt(value)}</title></circle>"
            )
        centre = x(row.mean)
        parts.append(
            f'<line class="mean" x1="{centre:.1f}" x2="{centre:.1f}" y1="{middle - 11}" y2="{middle + 11}"/></g>'
        )
    return drawing("".join(parts), title, height, ' class="chart"')


def scatter(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    x_fmt: Format,
    fmt: Format,
    title: str = "",
    named: Collection[str] | None = None,
    higher_is_better: bool = False,
) -> Markup:
    """Draw cost on x from zero, error on y with its interval; each point has its name beside it, or a number.

    Args:
        named: labels of the points to name if all would be too many; points on the front are always named.

    A line joins the front: the points that no other point beats in both cost and y. A point at the same place as
    others is a ring around them. If names would be crowded, numbers stand for them, and are listed below.
    """
    if not points:
        return Markup('<p class="note">No run finished.</p>')
    x = Scale(0.0, max(point.x for point in points) * 1.08 or 1.0, LEFT, WIDTH - RIGHT)
    values = [v for point in points for v in (point.y, *(point.interval or ()))]
    low, high = data_range(values)
    y = Scale(max(low, 0.0) if min(values) >= 0 else low, high, HEIGHT - BOTTOM, TOP)  # errors are not below 0
    parts = [axes(x, y, x_label, y_label, x_fmt, fmt)]
    best = front(points, higher_is_better)
    if len(best) > 1:
        way = polyline([point.x for point in best], [point.y for point in best], x, y)
        parts.append(f'<polyline class="front" points="{way}"/>')
    radii = [BIG + 4 * ring for ring in overlaps.rings([(x(each.x), y(each.y)) for each in points])]
    for point, radius in zip(points, radii, strict=True):
        there = ", on the front" if point in best else ""
        centre, middle = x(point.x), y(point.y)
        parts.append(f'<g class="{style_class(point.style)}">')
        if point.interval:
            ends = [y(edge) for edge in point.interval]
            parts.append(
                f'<line class="whisker" x1="{centre:.1f}" x2="{centre:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
            )
        parts.append(
            f'<circle class="{"big" if radius == BIG else "ring"}" cx="{centre:.1f}" cy="{middle:.1f}" r="{radius}">'
            f"<title>{esc(point.label)}: {fmt(point.y)} at {x_fmt(point.x)}{there}</title></circle></g>"
        )
    shown = [point for point in points if named is None or point.label in named or point in best]
    dots = [
        [point_labels.around(x(each.x), y(each.y), radius + 0.5)] for each, radius in zip(points, radii, strict=True)
    ]
    whiskers = [[_reach(each, x, y)] for each in points]
    joined = point_labels.along([(x(each.x), y(each.y)) for each in best])
    names, below = _labels(shown, x, y, [*dots, *dots, *whiskers, joined], best)  # dots twice: rather cover a line
    return drawing("".join([*parts, names]), title, HEIGHT + below, ' class="chart"')


def front(points: Sequence[Point], higher_is_better: bool = False) -> list[Point]:
    """Return the points that no other beats: none has at most their cost and as good a y, with one of them better."""
    sign = -1.0 if higher_is_better else 1.0
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.x, sign * each.y)):
        if not best or sign * point.y < sign * best[-1].y:
            best.append(point)
    return best


def legend(entries: Sequence[tuple[str, int]]) -> Markup:
    """Draw names with a line of their colour; hovering over one brings its lines to the front."""
    items = "".join(
        f'<li class="{style_class(style)}" data-series="{esc(label)}"><svg width="26" height="10" aria-hidden="true">'
        f'<line class="line" x1="1" x2="25" y1="5" y2="5"/></svg>{esc(label)}</li>'
        for label, style in entries
    )
    return Markup(f'<ul class="legend">{items}</ul>')


def _labels(
    points: Sequence[Point], x: Scale, y: Scale, taken: Sequence[Sequence[Box]], best: Sequence[Point]
) -> tuple[str, int]:
    """Draw names beside their points, or numbers and a list of names below; return it, and the height of the list.

    A stroke joins a point to its name or number where these are far, or another point is nearer.
    """
    room = (LEFT, WIDTH, TOP - 2, HEIGHT - BOTTOM)
    spots = [(x(each.x), y(each.y), point_labels.width(each.label)) for each in points]
    first = [row for row, point in enumerate(points) if point in best or not point.style]  # and the baseline
    places, numbered = point_labels.named_and_numbered(spots, taken, room, first)
    number_of = {row: str(1 + number) for number, row in enumerate(numbered)}
    strokes, names = [], []
    for row, (point, spot, at) in enumerate(zip(points, spots, places, strict=True)):
        css = style_class(point.style)
        written = (*spot[:2], point_labels.NUMBER) if row in number_of else spot
        if point_labels.joined(written, at, spots):
            ends = f'x1="{spot[0]:.1f}" y1="{spot[1]:.1f}" x2="{at[0]:.1f}" y2="{at[1] - 4:.1f}"'
            strokes.append(f'<line class="lead {css}" {ends}/>')
        said = esc(number_of.get(row, point.label))
        names.append(f'<text class="name {css}" x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{at[2]}">{said}</text>')
    listed, height = _numbers([points[row] for row in numbered])
    return "".join([*strokes, *names, listed]), height


def _numbers(points: Sequence[Point]) -> tuple[str, int]:
    """List the names that numbers stand for, below a chart, in as many columns as there is room for."""
    if not points:
        return "", 0
    wide = 42 + max(point_labels.width(point.label) for point in points)
    rows = math.ceil(len(points) / max(1, int((WIDTH - 16) / wide)))
    drawn = []
    for place, point in enumerate(points):
        column, row = divmod(place, rows)
        left, down = 16 + column * wide, HEIGHT + 16 + 20 * row
        drawn.append(
            f'<g class="{style_class(point.style)}"><circle class="big" cx="{left:.0f}" cy="{down - 4}" r="4.5"/>'
            f'<text class="name" x="{left + 26:.0f}" y="{down}" text-anchor="end">{place + 1}</text>'
            f'<text class="tick" x="{left + 32:.0f}" y="{down}">{esc(point.label)}</text></g>'
        )
    return "".join(drawn), 20 * rows + 8


def _reach(point: Point, x: Scale, y: Scale) -> Box:
    """Return the bounding box of a point with its interval."""
    ends = [y(edge) for edge in (point.y, *(point.interval or ()))]
    return x(point.x) - 6, x(point.x) + 6, min(ends) - 5, max(ends) + 5


def _lines(drawn: Sequence[Series], x: Scale, y: Scale) -> Iterator[str]:
    """Yield each line; a single point is a dot, a ring if others are there, and hollow if the line would be dashed."""
    shared = overlaps.covered([(each.x, [y(value) for value in each.y], each.dashed) for each in drawn])
    rings = iter(overlaps.rings([(x(each.x[0]), y(each.y[0])) for each in drawn if len(each.x) == 1]))
    for series, below in zip(drawn, shared, strict=True):
        dash = (" dashed" if series.dashed else "") + (f" over{min(below, 3)}" if below else "")
        if len(series.x) > 1:
            body = f'<polyline class="line{dash}" points="{polyline(series.x, series.y, x, y)}"/>'
        else:
            ring = next(rings)
            kind = ("ring" if ring or series.dashed else "dot") + dash
            radius = DOT + ring * (DOT + 1)
            body = f'<circle class="{kind}" cx="{x(series.x[0]):.1f}" cy="{y(series.y[0]):.1f}" r="{radius}"/>'
        yield f'<g class="{style_class(series.style)}" data-series="{esc(series.label)}">{body}</g>'


def _band(series: Series, x: Scale, y: Scale) -> str:
    if series.low is None or series.high is None or len(series.x) < 2:
        return ""
    up, down = polyline(series.x, series.high, x, y), polyline(series.x[::-1], series.low[::-1], x, y)
    return (
        f'<g class="{style_class(series.style)}" data-series="{esc(series.label)}">'
        f'<polygon class="band" points="{up} {down}"/></g>'
    )


def _thin(series: Series) -> Series:
    """Return every n-th point of a long line, and always the last one."""
    n = len(series.x)
    if n <= MOST_POINTS:
        return series
    rows = sorted({*range(0, n, math.ceil(n / MOST_POINTS)), n - 1})
    x, y = ([values[i] for i in rows] for values in (series.x, series.y))
    low, high = (None if values is None else [values[i] for i in rows] for values in (series.low, series.high))
    return Series(series.label, series.style, x, y, low, high, series.dashed)
