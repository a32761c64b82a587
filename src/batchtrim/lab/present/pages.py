"""The comparison report as one page of HTML: styles, script and pictures are in it, nothing is fetched.

What the page says is worded in :mod:`batchtrim.lab.present.wording` and drawn in :mod:`batchtrim.lab.present.charts`.
Text that comes from a record is escaped with :func:`batchtrim.lab.present.charts.esc` wherever it enters the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import resources

import numpy as np

from batchtrim.lab.analyse.comparison import Arm, Group, Summary, View
from batchtrim.lab.analyse.inference import points
from batchtrim.lab.present import charts, wording
from batchtrim.lab.present.charts import Series, esc, style_class

MOST_BANDS = 4  # methods; bands of more than these cover one another
OPEN_GROUPS = 3  # more groups than this start folded
MARKS = {"lower": "▼ ", "higher": "▲ ", "same": "≈ ", "none": ""}


def comparison_page(summary: Summary) -> str:
    """The whole page."""
    several = len(summary.groups) > 1
    title = "Comparison of training methods" if several else summary.groups[0].title
    parts = [
        '<p class="eyebrow">batchtrim comparison</p>',
        f"<h1>{esc(title)}</h1>",
        _headline(summary),
        _overview(summary) if several else "",
    ]
    folded = len(summary.groups) > OPEN_GROUPS
    for group in summary.groups:
        body = _group(group)
        if several:
            state = "" if folded else " open"
            words_ = f"<small>{esc(group.verdict)}</small>"
            body = f'<details class="group"{state}><summary>{esc(group.title)}{words_}</summary>{body}</details>'
        parts.append(f"<section>{body}</section>")
    parts.append(_environment(summary))
    return page(f"batchtrim: {title}", "".join(parts))


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A complete document around ``body``, with the shared style and script in it."""
    files = resources.files("batchtrim.lab.present")
    css = files.joinpath("page.css").read_text(encoding="utf-8") + style
    js = files.joinpath("page.js").read_text(encoding="utf-8") + script
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{esc(title)}</title><style>{css}</style></head>\n'
        f"<body>{body}\n<script>{js}</script></body></html>\n"
    )


def definitions(values: dict[str, str]) -> str:
    """Names and values side by side."""
    return f"<dl>{''.join(f'<dt>{esc(name)}</dt><dd>{esc(value)}</dd>' for name, value in values.items())}</dl>"


def breakable(text: str) -> str:
    """Escaped, and free to go on in the next line after an underscore."""
    return esc(text).replace("_", "_<wbr>")


def _headline(summary: Summary) -> str:
    kinds = {wording.kind(arm.paired.verdict) for group in summary.groups for arm in group.arms if arm.paired}
    kind = kinds.pop() if len(kinds) == 1 else "none"
    return (
        f'<div class="verdict {kind}"><p>{MARKS[kind]}{esc(wording.sentence(summary.verdict))}</p>'
        f'<p class="note">{esc(wording.counts(summary))} Lower error is better; '
        "differences are paired by seed.</p></div>"
    )


def _overview(summary: Summary) -> str:
    """Settings by methods: the difference in points, marked where it is a finding."""
    labels = list(dict.fromkeys(arm.label for group in summary.groups for arm in group.arms if arm.paired))
    if not labels:
        return ""
    head = "".join(f"<th>{esc(label)}</th>" for label in labels)
    rows = []
    for group in summary.groups:
        arms = {arm.label: arm for arm in group.arms}
        cells = []
        for label in labels:
            paired = arms[label].paired if label in arms else None
            kind = wording.kind(paired.verdict) if paired else "none"
            tip = f' title="{esc(paired.verdict)}"' if paired else ""
            cells.append(f'<td class="{kind}"{tip}>{MARKS[kind]}{wording.difference(paired)}</td>')
        base = next((wording.error(arm) for arm in group.arms if arm.label == group.baseline), wording.UNKNOWN)
        rows.append(f"<tr><th>{esc(group.title)}</th><td>{base}</td>{''.join(cells)}</tr>")
    return (
        "<h2>Overview</h2>"
        '<p class="note">Difference to the baseline in points of test error. ▼ fewer errors, ▲ more errors, '
        "≈ no difference seen; no mark: no verdict.</p>"
        f'<div class="scroll"><table><thead><tr><th>setting</th><th>baseline<br>error %</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _group(group: Group) -> str:
    styles = _styles(group)
    legend = charts.legend([(arm.label, styles[arm.label]) for arm in group.arms])
    return "".join(
        [
            _tiles(group),
            _table(group.arms, group, styles),
            f'<p class="note">{esc(wording.LEGEND)} Small print: 95 % intervals (Student\'s t, not corrected; '
            "report.csv has the bootstrap's too) and shares of the baseline's cost.</p>",
            _differences(group, styles),
            f"<h2>Over training</h2>{legend}",
            f'<div class="grid2">{_curves(group, styles)}</div>',
            f"<h2>What it cost</h2>{_costs(group, styles)}",
            *(_view(view, group, styles) for view in group.views),
            "<h2>Settings, and how to run it again</h2>",
            f'<div class="card">{definitions(_settings(group))}</div><br><pre>{esc(wording.command(group))}</pre>',
        ]
    )


def _styles(group: Group) -> dict[str, int]:
    """The baseline is grey, style 0; the others take the colours in turn."""
    others = [arm.label for arm in group.arms if arm.label != group.baseline]
    return ({group.baseline: 0} if group.baseline else {}) | {label: 1 + i for i, label in enumerate(others)}


def _tiles(group: Group) -> str:
    """A comparison of two arms in four numbers; larger ones have the table."""
    if len(group.arms) != 2 or group.arms[1].paired is None:
        return ""
    base, arm = group.arms
    assert arm.paired is not None
    kind = wording.kind(arm.paired.verdict)
    tiles = [
        (wording.percent(base.moments.mean) + " %", f"test error, {base.label}", ""),
        (wording.percent(arm.moments.mean) + " %", f"test error, {arm.label}", ""),
        (
            wording.difference(arm.paired) + " points",
            f"difference, 95 % {wording.signed_interval(arm.paired.moments.t)}",
            kind if kind in ("lower", "higher") else "",
        ),
        (wording.share(arm, base, "samples_backward"), f"samples backward, of {base.label}'s", ""),
    ]
    inner = "".join(
        f'<div class="card tile"><b class="{kind}">{esc(value)}</b><p class="note">{esc(text)}</p></div>'
        for value, text, kind in tiles
    )
    return f'<div class="tiles">{inner}</div>'


def _table(arms: Sequence[Arm], group: Group, styles: dict[str, int], cost: bool = True) -> str:
    base = next((arm for arm in arms if arm.label == group.baseline), None)
    heads = ["method", "runs", "test error %", "difference<br>points", "p, Holm"]
    heads += (["training<br>seconds", "samples<br>backward"] if cost else []) + ["verdict"]
    rows = []
    for arm in arms:
        paired = arm.paired
        cells = [wording.runs(arm), wording.error(arm) + _small(wording.interval(arm.moments.t))]
        if paired:
            cells += [wording.difference(paired) + _small(wording.signed_interval(paired.moments.t))]
            cells += [esc(wording.p_value(paired.p_holm)) + _small(f"Wilcoxon {wording.p_value(paired.p_wilcoxon)}")]
        else:
            cells += ["", ""]
        if cost:
            for name in ("seconds", "samples_backward"):
                cells.append(wording.cost(arm, name) + (_small(wording.share(arm, base, name)) if base else ""))
        kind = wording.kind(paired.verdict) if paired else ""
        finding, _, rest = paired.verdict.partition("; ") if paired else ("", "", "")
        said = MARKS[kind] + esc(finding) + _small(rest) if paired else "baseline" if arm is base else ""
        rows.append(
            f'<tr><th><span class="key {style_class(styles[arm.label])}"></span>{breakable(arm.label)}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + f'<td class="words {kind}">{said}</td></tr>'
        )
    head = "".join(f"<th{' class=words' if name == 'verdict' else ''}>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _small(text: str) -> str:
    """A second, quieter line in a cell."""
    return f"<small>{esc(text)}</small>" if text else ""


def _differences(group: Group, styles: dict[str, int]) -> str:
    rows = [
        charts.Differences(
            label=arm.label,
            style=styles[arm.label],
            seeds=arm.paired.seeds,
            values=arm.paired.differences,
            mean=arm.paired.moments.mean,
            interval=arm.paired.moments.t,
            detectable=arm.paired.detectable,
            text=f"{wording.difference(arm.paired)}  [{wording.signed_interval(arm.paired.moments.t)}]",
        )
        for arm in group.arms
        if arm.paired and arm.paired.moments.mean is not None
    ]
    if not rows:
        return ""
    picture = charts.differences(
        rows, x_label="fewer errors  ←  points of test error  →  more errors", fmt=wording.signed,
        title=f"Test error minus that of {group.baseline}, paired by seed",
    )  # fmt: skip
    return (
        f"<h2>Seed by seed, against {esc(group.baseline)}</h2>"
        '<p class="note">A dot is one seed, the upright line their mean, the coloured bar its 95 % interval. In the '
        "grey zone a true difference would be missed more than one time in five with this many seeds.</p>"
        f'<div class="card narrow">{picture}</div>'
    )


def _curves(group: Group, styles: dict[str, int]) -> str:
    banded = len(group.arms) <= MOST_BANDS
    error = _series(group, styles, "test_error", band=banded)
    shown, cut = _error_range(error)
    note = f" The axis ends at {points(shown[1], 0)} %; the first epochs lie above it." if cut and shown else ""
    spread = "; the band is one standard deviation to either side" if banded else ""
    loss = [
        *(_series(group, styles, "kept_loss", band=False)),
        *(_series(group, styles, "mean_loss", band=False, dashed=True)),
    ]
    keep = _series(group, styles, "keep", band=False)
    cards = [
        ("Test error", f"Mean over seeds{spread}.{note}",
         charts.lines(error, x_label="epoch", y_label="test error %", fmt=_axis_percent, y_range=shown,
                      title="Test error over epochs")),
        ("Training error", "Of the samples as they were trained on, while the network changed.",
         charts.lines(_series(group, styles, "train_error", band=banded), x_label="epoch", y_label="training error %",
                      fmt=_axis_percent, title="Training error over epochs")),
        ("Part of the samples kept", "What went backward, as a part of the training set.",
         charts.lines(keep, x_label="epoch", y_label="kept %", fmt=lambda v: f"{100 * v:.0f}", y_range=(0.0, 1.05),
                      title="Keep fraction over epochs")),
        ("Loss of kept samples, and of all", "Solid: mean loss of what was kept. Dashed: of every sample seen.",
         charts.lines(loss, x_label="epoch", y_label="loss", fmt=lambda v: f"{v:.3g}",
                      title="Kept and mean loss over epochs")),
    ]  # fmt: skip
    return "".join(
        f'<div class="card"><h3>{heading}</h3><p class="note">{note}</p>{picture}</div>'
        for heading, note, picture in cards
    )


def _series(
    group: Group, styles: dict[str, int], name: str, *, band: bool = True, dashed: bool = False
) -> list[Series]:
    """Mean over seeds of one curve, an arm a line; epochs are counted from 1 and must have a value from some seed."""
    series = []
    for arm in group.arms:
        curves = [row["curve"].get(name) or [] for row in arm.runs if row["status"] == "finished"]
        length = max(map(len, curves), default=0)
        if not length:
            continue
        table = np.full((len(curves), length), np.nan)
        for line, values in zip(table, curves, strict=True):
            line[: len(values)] = [math.nan if value is None else value for value in values]
        there = np.isfinite(table)
        known = there.any(axis=0)
        count = there.sum(axis=0)[known]
        values = np.where(there, table, 0.0)[:, known]
        mean = values.sum(axis=0) / count
        spread = np.sqrt((np.where(there[:, known], values - mean, 0.0) ** 2).sum(axis=0) / np.maximum(count - 1, 1))
        banded = band and len(curves) > 1
        series.append(
            Series(
                arm.label if not dashed else f"{arm.label}, all",
                styles[arm.label],
                (np.flatnonzero(known) + 1).tolist(),
                mean.tolist(),
                (mean - spread).tolist() if banded else None,
                (mean + spread).tolist() if banded else None,
                dashed,
            )
        )
    return series


def _error_range(series: Sequence[Series]) -> tuple[tuple[float, float] | None, bool]:
    """A range that shows the end of training well: up to the worst after a fifth of it; and whether that cuts any."""
    late = [y for each in series for part in (each.y, each.low, each.high) for y in (part or [])[len(each.y) // 5 :]]
    if not late:
        return None, False
    low, high = charts.data_range(late)
    top = max(y for each in series for y in (each.high or each.y))
    if top <= 1.3 * high:
        return charts.data_range([min(late), max(top, high)]), False
    return (low, high), True


def _costs(group: Group, styles: dict[str, int]) -> str:
    arms = [arm for arm in group.arms if arm.cost and arm.moments.mean is not None]
    cards: list[tuple[str, str, Callable[[Arm], float]]] = [
        ("samples backward", "samples that went backward", lambda arm: arm.cost["samples_backward"]),
        ("training time", "seconds of training, selection included", lambda arm: arm.cost["seconds"]),
    ]
    inner = ""
    for name, label, spent in cards:
        dots = [
            charts.Point(arm.label, styles[arm.label], spent(arm), arm.moments.mean or 0.0, arm.moments.t)
            for arm in arms
        ]
        picture = charts.scatter(
            dots, x_label=label, y_label="test error %", x_fmt=wording.amount, fmt=_axis_percent,
            title=f"Test error against {name}",
        )  # fmt: skip
        inner += f'<div class="card"><h3>Error against {name}</h3>{picture}</div>'
    return (
        '<p class="note">Lower left is better: fewer errors for less. Whiskers are 95 % intervals of the mean.</p>'
        f'<div class="grid2">{inner}</div>'
    )


def _view(view: View, group: Group, styles: dict[str, int]) -> str:
    table = _table(view.arms, group, styles, cost=False) if view.budget is not None else ""
    return f'<h2>{esc(view.title)}</h2><p class="note">{esc(view.note)}</p>{table}'


def _settings(group: Group) -> dict[str, str]:
    return {
        **{name: str(value) for name, value in group.settings.items() if value is not None},
        "seeds": ", ".join(map(str, group.seeds)),
        **{
            arm.label: ", ".join(
                f"{name} {value}"
                for name, value in arm.settings.items()
                if name != "method" and value not in (None, {})
            )
            for arm in group.arms
        },
    }


def _environment(summary: Summary) -> str:
    return f'<h2>Environment</h2><div class="card">{definitions(wording.environment(summary))}</div>'


def _axis_percent(value: float) -> str:
    """As few decimals as an axis of errors needs."""
    return f"{100 * value:.4g}"
