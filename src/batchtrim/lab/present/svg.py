"""The parts of a chart as SVG: its size, scales, ticks, axes, paths, and the classes of its colours.

Colours are classes ``s0`` (the baseline) to ``s8``; from ``s9`` on they repeat with dashes. Labels are escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from batchtrim.lab.files import shown

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 44
COLOURS = 8  # not counting the baseline's

Format = Callable[[float], str]


@dataclass(frozen=True)
class Scale:
    """A linear map from data to the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def esc(value: object) -> str:
    """Escape text for HTML and SVG, including quoted attributes and characters that XML does not allow."""
    return html.escape(shown(value), quote=True)


def style_class(style: int) -> str:
    """Return the CSS classes of a series: its colour, and dashes once all colours are used."""
    if style == 0:
        return "s0"
    return f"s{1 + (style - 1) % COLOURS}" + (f" d{(style - 1) // COLOURS}" if style > COLOURS else "")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers that span ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def drawing(body: str, title: str, height: int, attributes: str) -> Markup:
    """Return an SVG element with a title for screen readers."""
    return Markup(
        f'<svg{attributes} viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{esc(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def axes(x: Scale, y: Scale, x_label: str, y_label: str, x_fmt: Format, fmt: Format, whole: bool = False) -> str:
    """Draw ticks, grid lines and labels of both axes; ``whole``: ticks of x at whole numbers only."""
    floor = HEIGHT - BOTTOM
    parts = []
    for tick in ticks(y.low, y.high):
        at = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{fmt(tick)}</text>')
    for tick in ticks(x.low, x.high, 6):
        if whole and tick != int(tick):
            continue
        label = str(int(tick)) if whole else x_fmt(tick)
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{floor + 16}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    centre = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{centre}" y="{HEIGHT - 8}" text-anchor="middle">{esc(x_label)}</text>')
    middle = (TOP + floor) / 2
    parts.append(
        f'<text class="axis" x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">'
        f"{esc(y_label)}</text>"
    )
    return "".join(parts)


def polyline(xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale) -> str:
    """Return the points of a polyline or polygon."""
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))


def data_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the range from the smallest value to the largest, with a small margin."""
    low, high = widened(min(values), max(values))
    air = 0.06 * (high - low)
    return low - air if low < 0 or low - air > 0 else 0.0, high + air


def widened(low: float, high: float) -> tuple[float, float]:
    """Return the range, widened if it is a single point."""
    if high > low:
        return low, high
    air = abs(low) * 0.1 or 0.01
    return low - air, high + air
