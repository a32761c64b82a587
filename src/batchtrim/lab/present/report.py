"""The comparison report as one HTML page that contains style, script and charts and fetches nothing.

This file collects the values for ``templates/report.html``. Its sentences are in
:mod:`batchtrim.lab.present.wording`, its charts in :mod:`batchtrim.lab.present.charts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from batchtrim.lab.analyse.comparison import Arm, Group, Paired, Row, Summary, summarize
from batchtrim.lab.files import write_whole, writing
from batchtrim.lab.metric import ERROR
from batchtrim.lab.present import charts, formats, sweep, tables, wording
from batchtrim.lab.present.caveat_texts import caveat_texts
from batchtrim.lab.present.curves import error_range, series_of
from batchtrim.lab.present.svg import style_class
from batchtrim.lab.present.templating import render

MOST_LABELS = 10  # points that are named in a chart of costs; if there are more, the best of each method
MOST_BANDS = 4  # methods; bands of more would cover one another
OPEN_GROUPS = 3  # more groups than this start collapsed
ELSEWHERE = "The runs are unchanged. To write the report elsewhere: `batchtrim report` with --out FOLDER."
MARKS = {"lower": "▼ ", "higher": "▲ ", "same": "≈ ", "none": ""}


@dataclass(frozen=True)
class Cell:
    """A table cell: a line, and a second, less prominent one."""

    main: str
    small: str = ""


@dataclass(frozen=True)
class Tile:
    """A prominent number with its caption; ``kind`` sets the colour."""

    value: str
    text: str
    kind: str = ""


@dataclass(frozen=True)
class Card:
    """A chart under a heading and a note."""

    heading: str
    note: str
    chart: Markup


def write_report(rows: Iterable[Row], out_dir: str | Path, baseline: str = "full") -> Path:
    """Write report.html, report.md and report.csv on ``rows`` of runs.jsonl into ``out_dir``; return the page's path.

    Raises:
        ValueError: there are no rows. OSError: the folder cannot be written.
    """
    summary = summarize(rows, baseline)
    out_dir = Path(out_dir)
    with writing(out_dir, ELSEWHERE):
        out_dir.mkdir(parents=True, exist_ok=True)
    page = out_dir / "report.html"
    texts = {page: comparison_page(summary), out_dir / "report.md": tables.to_markdown(summary)}
    for path, text in (texts | {out_dir / "report.csv": tables.to_csv(summary)}).items():
        with writing(path, ELSEWHERE):
            write_whole(path, lambda file, text=text: file.write(text.encode()))
    return page


def comparison_page(summary: Summary) -> str:
    """Return the whole page."""
    several = len(summary.groups) > 1
    heading = "Comparison of training methods" if several else summary.groups[0].title
    pairs = [arm.paired for group in summary.groups for arm in group.arms if arm.paired]
    kinds = {wording.kind(paired) for paired in pairs}
    colours = {wording.colour(paired) for paired in pairs}
    metrics = {group.metric for group in summary.groups}
    return render(
        "report.html",
        title=f"batchtrim: {heading}",
        heading=heading,
        kind=kinds.pop() if len(kinds) == 1 else "none",
        colour=colours.pop() if len(colours) == 1 else "none",
        better=wording.better(next(iter(metrics))) if len(metrics) == 1 else "Differences are paired by seed.",
        metric=next(iter(metrics)) if len(metrics) == 1 else None,
        marks=MARKS,
        verdict=wording.sentence(wording.headline(summary)),
        counts=wording.counts(summary),
        overview=_overview(summary) if several else None,
        groups=[group_values(group) for group in summary.groups],
        folded=len(summary.groups) > OPEN_GROUPS,
        environment=wording.environment(summary),
    )


def _overview(summary: Summary) -> dict[str, Any] | None:
    """Return a table of settings by methods: the difference in points, highlighted if it is a finding."""
    labels = list(dict.fromkeys(arm.label for group in summary.groups for arm in group.arms if arm.paired))
    if not labels:
        return None
    rows = []
    for group in summary.groups:
        arms = {arm.label: arm for arm in group.arms}
        base = group.reference
        rows.append(
            {
                "title": group.title,
                "baseline": formats.error(base) if base else formats.UNKNOWN,
                "cells": [_overview_cell(arms.get(label), base) for label in labels],
            }
        )
    return {"labels": labels, "rows": rows}


def _overview_cell(arm: Arm | None, base: Arm | None) -> dict[str, str]:
    paired = arm.paired if arm else None
    tip = wording.verdict(arm, base) if arm else ""
    return {
        "kind": wording.kind(paired),
        "colour": wording.colour(paired),
        "text": formats.difference(paired),
        "tip": tip,
    }


def group_values(group: Group) -> dict[str, Any]:
    """Return the page's texts and charts for a group."""
    chosen = styles(group)
    return {
        "title": group.title,
        "verdict": wording.group_verdict(group),
        "caveats": caveat_texts(group),
        "legend_note": wording.legend(group.metric),
        "terms": wording.TERMS,
        "times": wording.times(group),
        "metric": group.metric,
        "baseline": group.baseline,
        "tiles": _tiles(group),
        "sweeps": sweep.grids(group),
        "table": _table(group.arms, group, chosen),
        "differences": _differences(group, chosen),
        "legend": charts.legend([(arm.label, chosen[arm.label]) for arm in group.arms]),
        "curves": _drawn(_curves(group, chosen)),
        "costs": _drawn(_costs(group, chosen)),
        "views": [
            {
                "title": wording.view_title(view),
                "note": wording.view_note(view),
                "table": _table(view.arms, group, chosen, cost=False) if view.budget is not None else None,
            }
            for view in group.views
        ],
        "settings": _settings(group),
        "command": wording.command(group),
    }


def styles(group: Group) -> dict[str, int]:
    """Return a style per arm: 0 (grey) for the baseline; the others get the colours in turn."""
    others = [arm.label for arm in group.arms if arm.label != group.baseline]
    return ({group.baseline: 0} if group.baseline else {}) | {label: 1 + i for i, label in enumerate(others)}


def _tiles(group: Group) -> list[Tile]:
    """Return a comparison of two arms as four tiles; none for more arms, for which there is the table."""
    if len(group.arms) != 2 or group.arms[1].paired is None:
        return []
    base, arm = group.arms
    assert arm.paired is not None
    kind, metric = wording.colour(arm.paired), group.metric
    between = formats.signed_interval(arm.paired.moments.t, metric)
    percent = " %" if metric.in_percent else ""
    tiles = [
        Tile(formats.percent(base.moments.mean, 2, metric) + percent, f"{metric.title}, {base.label}"),
        Tile(formats.percent(arm.moments.mean, 2, metric) + percent, f"{metric.title}, {arm.label}"),
        Tile(
            formats.difference(arm.paired) + metric.unit,
            f"difference, 95 % {between}",
            kind if kind in ("lower", "higher") else "",
        ),
    ]
    if "samples_backward" in base.cost and "samples_backward" in arm.cost:
        tiles.append(Tile(formats.share(arm, base, "samples_backward"), f"backward samples, of {base.label}'s"))
    return tiles


def _table(arms: Sequence[Arm], group: Group, styles: dict[str, int], cost: bool = True) -> dict[str, Any]:
    base = next((arm for arm in arms if arm.label == group.baseline), None)
    heads = [["method"], ["runs"], [group.metric.heading], ["difference"], ["p, Holm"]]
    if group.metric.in_percent:
        heads[3].append("points")
    heads += [["training", "seconds"], ["samples", "backward"]] if cost else []
    rows = []
    for arm in arms:
        cells = [
            Cell(*formats.runs(arm).split(", ", 1)),
            Cell(formats.error(arm), formats.interval(arm.moments.t, arm.metric)),
            *_paired_cells(arm.paired),
        ]
        if cost:
            names = ("seconds", "samples_backward")
            cells += [Cell(formats.cost(arm, name), formats.share(arm, base, name) if base else "") for name in names]
        kind = wording.kind(arm.paired) if arm.paired else ""
        # a view at an equal budget disadvantages full, whose learning rate has not decayed yet: no verdict colour
        colour = wording.colour(arm.paired) if arm.paired and cost else ""
        first, _, rest = wording.verdict(arm, group.reference).partition("; ")
        said = MARKS[kind] + first if arm.paired else "baseline" if arm is base else ""
        rows.append(
            {
                "label": arm.label,
                "style": style_class(styles[arm.label]),
                "cells": cells,
                "colour": colour,
                "verdict": Cell(said, rest),
            }
        )
    return {"heads": heads, "rows": rows}


def _paired_cells(paired: Paired | None) -> list[Cell]:
    if paired is None:
        return [Cell(""), Cell("")]
    return [
        Cell(formats.difference(paired), formats.signed_interval(paired.moments.t, paired.metric)),
        Cell(formats.p_value(paired.p_holm), f"Wilcoxon {formats.p_value(paired.p_wilcoxon)}"),
    ]


def _differences(group: Group, styles: dict[str, int]) -> Markup | None:
    rows = [
        charts.Differences(
            label=arm.label,
            style=styles[arm.label],
            seeds=arm.paired.seeds,
            values=arm.paired.differences,
            mean=arm.paired.moments.mean,
            interval=arm.paired.moments.t,
            detectable=arm.paired.detectable,
            text=f"{formats.difference(arm.paired)}  [{formats.signed_interval(arm.paired.moments.t, arm.metric)}]",
        )
        for arm in group.arms
        if arm.paired and arm.paired.moments.mean is not None
    ]
    if not rows:
        return None
    metric = group.metric
    less, more = ("fewer errors", "more errors") if metric.name == "error" else ("lower", "higher")
    return charts.differences(
        rows, x_label=f"{less}  ←  {'points of ' if metric.in_percent else ''}{metric.title}  →  {more}",
        fmt=lambda value: formats.signed(value, 2, metric),
        title=f"{wording.capital(metric.title)} minus that of {group.baseline}, paired by seed",
    )  # fmt: skip


def _drawn(cards: list[Card]) -> list[Card]:
    """Return the cards that have data: results of another program have no curves, and may have no cost."""
    return [card for card in cards if "<svg" in card.chart]


def _curves(group: Group, styles: dict[str, int]) -> list[Card]:
    banded = len(group.arms) <= MOST_BANDS
    metric = group.metric
    error = series_of(group, styles, metric.field, band=banded)
    shown, cut = error_range(error) if metric.name == "error" else (None, False)
    note = f" The axis ends at {formats.points(shown[1], 0)} %; the first epochs lie above it." if cut and shown else ""
    spread = "; the band is one standard deviation to either side" if banded else ""
    loss = [
        *(series_of(group, styles, "kept_loss", band=False)),
        *(series_of(group, styles, "mean_loss", band=False, dashed=True)),
    ]
    keep = series_of(group, styles, "keep", band=False)
    training = series_of(group, styles, "train_error", band=banded)  # a task need not log it
    fitted = [
        Card("Training error", "Of the samples as they were trained on, while the network changed.",
             charts.lines(training, x_label="epoch", y_label="training error %", fmt=_axis_percent,
                           title="Training error over epochs"))
    ] if any(len(each.x) for each in training) else []  # fmt: skip
    return [
        Card(wording.capital(metric.title), f"Mean over seeds{spread}.{note}",
             charts.lines(error, x_label="epoch", y_label=metric.heading, fmt=_axis(group), y_range=shown,
                           title=f"{wording.capital(metric.title)} over epochs")),
        *fitted,
        Card("Keep fraction", "Kept samples as a share of the training set, by epoch.",
             charts.lines(keep, x_label="epoch", y_label="kept %", fmt=lambda v: f"{100 * v:.0f}", y_range=(0.0, 1.05),
                           title="Keep fraction over epochs")),
        Card("Loss of kept samples, and of all", "Solid: mean loss of what was kept. Dashed: of every sample seen.",
             charts.lines(loss, x_label="epoch", y_label="loss", fmt=lambda v: f"{v:.3g}",
                           title="Kept and mean loss over epochs")),
    ]  # fmt: skip


def _costs(group: Group, styles: dict[str, int]) -> list[Card]:
    axes = [
        ("backward samples", "backward samples", "samples_backward"),
        ("training time", "seconds of training, selection included", "seconds"),
    ]
    cards = []
    for name, label, cost in axes:
        dots = [
            charts.Point(arm.label, styles[arm.label], arm.cost[cost], arm.moments.mean or 0.0, arm.moments.t)
            for arm in group.arms
            if cost in arm.cost and arm.moments.mean is not None
        ]
        if not dots and group.metric != ERROR:
            continue
        best = {arm.label for arms in tables.by_method(group.arms).values() for arm in wording.best_of(arms)[:1]}
        chart = charts.scatter(
            dots, named=best if len(dots) > MOST_LABELS else None,
            x_label=label, y_label=group.metric.heading, x_fmt=formats.amount, fmt=_axis(group),
            higher_is_better=group.metric.higher_is_better,
            title=f"{wording.capital(group.metric.title)} against {name}",
        )  # fmt: skip
        note = "A ring is a method at the place of another." if 'class="ring"' in chart else ""
        cards.append(Card(f"{wording.capital(group.metric.name)} against {name}", note, chart))
    return cards


def _settings(group: Group) -> dict[str, str]:
    return {
        **{name: str(value) for name, value in group.settings.items() if value is not None},
        "seeds": ", ".join(map(str, group.seeds)),
        **{arm.label: text for arm in group.arms if (text := _settings_of(arm))},
    }


def _settings_of(arm: Arm) -> str:
    values = {**arm.settings, **(arm.settings.get("method_params") or {})}
    named = (name for name in values if name not in ("method", "method_params") and values[name] is not None)
    return ", ".join(f"{name} {values[name]}" for name in named)


def _axis(group: Group) -> Callable[[float], str]:
    """Return how values of the metric are written; digits that all of them share come on top of four."""
    if group.metric.in_percent:
        return _axis_percent
    values = [value for arm in group.arms for value in arm.errors.values()]
    spread = max(values, default=0.0) - min(values, default=0.0)
    shared = math.floor(math.log10(max(map(abs, values)) / spread)) if spread > 0 else 0
    digits = 4 + min(11, max(0, shared))
    return lambda value: f"{value:.{digits}g}"


def _axis_percent(value: float) -> str:
    """Return a percentage with as few decimals as an error axis needs."""
    return f"{100 * value:.4g}"
