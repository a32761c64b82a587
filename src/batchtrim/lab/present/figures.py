"""Save the charts of a report as separate SVG and PNG files for papers and slides, with a light style."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchtrim._checks import import_extra
from batchtrim.lab.analyse.comparison import Group, Summary
from batchtrim.lab.files import write_whole, writing
from batchtrim.lab.present import report, svg
from batchtrim.lab.present.templating import shipped

ELSEWHERE = "The report is unchanged. Pass a writable folder: --figures FOLDER."
SCALE = 3  # pixels of the PNG per unit of the chart
ROW = 20  # height of a legend line


def save(summary: Summary, folder: str | Path) -> list[Path]:
    """Write every chart of the report into ``folder`` as NAME.svg and NAME.png; return the paths.

    Raises:
        InstallExtra: resvg_py, which draws the PNG, is missing. CannotWrite: the folder cannot be written.
    """
    resvg: Any = import_extra("resvg_py", "lab", "--figures")
    folder, paths = Path(folder), []
    with writing(folder, ELSEWHERE):
        folder.mkdir(parents=True, exist_ok=True)
    for number, group in enumerate(summary.groups):
        prefix = f"{number + 1}-" if len(summary.groups) > 1 else ""
        for name, chart, note in _charts(group):
            drawing = standalone(chart, group, note)
            image = bytes(resvg.svg_to_bytes(svg_string=drawing, zoom=SCALE))
            for suffix, content in ((".svg", drawing.encode()), (".png", image)):
                path = folder / f"{prefix}{name}{suffix}"
                with writing(path, ELSEWHERE):
                    write_whole(path, lambda file, content=content: file.write(content))
                paths.append(path)
    return paths


def standalone(chart: str, group: Group, note: str = "") -> str:
    """Return a chart as an SVG document with its style, a white background and a legend, without the page's script.

    Args:
        note: a line under the legend.
    """
    found = re.match(r"<svg[^>]*viewBox=\"0 0 (\d+) (\d+)\"[^>]*>(.*)</svg>$", chart, re.DOTALL)
    assert found is not None
    width, height, body = int(found[1]), int(found[2]), found[3]
    names = [(arm.label, report.styles(group)[arm.label]) for arm in group.arms]
    keys = _legend(names, height) if "data-series=" in body else ""
    if note:
        keys += f'<text class="tick" x="0" y="{height + ROW * len(names) + 12}">{svg.esc(note)}</text>'
    whole = height + (ROW * (len(names) + bool(note)) + 8 if keys else 0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-6 -6 {width + 12} {whole + 12}" width="{width + 12}" '
        f'height="{whole + 12}" class="chart" font-family="DejaVu Sans, Arial, Helvetica, sans-serif" font-size="12">'
        f"<style>{_style()}</style>"
        f'<rect x="-6" y="-6" width="{width + 12}" height="{whole + 12}" fill="#ffffff"/>{body}{keys}</svg>\n'
    )


def _charts(group: Group) -> Iterator[tuple[str, str, str]]:
    """Yield name, chart and the note it needs outside the page, which explains dashes beside the chart."""
    drawn = report.group_values(group)
    if drawn["differences"]:
        yield "differences", str(drawn["differences"]), ""
    for card in (*drawn["curves"], *drawn["costs"]):
        if card.chart.startswith("<svg"):
            name = re.sub(r"\W+", "-", card.heading.lower()).strip("-")
            yield name, str(card.chart), card.note if re.search('class="(line|ring) dashed', card.chart) else ""


def _legend(names: list[tuple[str, int]], top: int) -> str:
    return "".join(
        f'<g class="{svg.style_class(style)}"><line class="line" x1="{svg.LEFT}" x2="{svg.LEFT + 26}" '
        f'y1="{top + ROW * number + 8}" y2="{top + ROW * number + 8}"/>'
        f'<text class="tick" x="{svg.LEFT + 34}" y="{top + ROW * number + 12}">{svg.esc(label)}</text></g>'
        for number, (label, style) in enumerate(names)
    )


def _style() -> str:
    """Return the page's light rules for charts without CSS variables, which drawing programs do not support."""
    sheet = str(shipped("page.css")).partition("@media (max-width")[0]
    light = dict(re.findall(r"--([\w-]+): (#\w+);", sheet.partition("@media")[0]))
    rules = [
        rule.strip().replace("svg.chart", "svg")
        for rule in re.findall(r"[^{}]*svg[^{}]*\{[^{}]*\}|\.d\d \.line[^{}]*\{[^{}]*\}", sheet)
    ]
    for number in range(svg.COLOURS + 1):
        colour = light[f"s{number}"]
        rules += [
            rule.replace("svg ", f".s{number} ").replace("var(--c)", colour) for rule in rules if "var(--c)" in rule
        ]
    text = " ".join(rule for rule in rules if "var(--c)" not in rule)
    return re.sub(r"var\(--([\w-]+)\)", lambda found: light.get(found[1], "#000000"), text)
