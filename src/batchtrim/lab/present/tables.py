"""A comparison as tables: Markdown, CSV, JSON, and for the console.

The numbers come from :mod:`batchtrim.lab.analyse.comparison`, the texts from :mod:`batchtrim.lab.present.wording`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from batchtrim.lab.analyse.comparison import Arm, Group, Summary, View
from batchtrim.lab.present import formats, wording
from batchtrim.lab.present.caveat_texts import caveat_texts
from batchtrim.lab.terminal import console

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

__all__ = ["console_table", "print_numbers", "print_table", "to_json"]

NARROWEST_LABEL = 20  # characters after which names of methods are wrapped


def console_table(summary: Summary) -> RenderableType:
    """Return the tables and verdicts, for ``rich.console.Console().print``."""
    from rich.console import Group as Stack
    from rich.text import Text

    parts: list[RenderableType] = []
    for group in summary.groups:
        parts.append(_ConsoleTable(group))
        colours = {"lower": "green", "higher": "red"}
        parts.extend(
            Text(
                f"{arm.label}: {wording.verdict(arm, group.reference)}",
                style=colours.get(wording.colour(arm.paired), ""),
            )
            for arm in group.arms
            if arm.paired
        )
        if group.baseline is None:
            parts.append(Text(wording.group_verdict(group)))
        parts.extend(Text(text, style="yellow") for text in caveat_texts(group))
        parts.append(Text(""))
    parts.extend(Text(text, style="dim") for text in _legends(summary))
    return Stack(*parts)


class _ConsoleTable:
    """A group's table, or a paragraph per arm if the console is too narrow, so that no number is truncated."""

    def __init__(self, group: Group):
        self.title = group.title
        short = "error %" if group.metric.name == "error" else group.metric.heading
        self.headings = ("runs", short, "diff", "95 % interval", "p", "train s", "backward")
        self.rows = [(arm.label, self._numbers(arm, group)) for arm in group.arms]

    def _numbers(self, arm: Arm, group: Group) -> tuple[str, ...]:
        paired = arm.paired
        return (
            formats.short_runs(arm),
            formats.error(arm),
            formats.difference(paired),
            formats.signed_interval(paired.moments.t, paired.metric) if paired else "",
            formats.p_value(paired.p_holm) if paired else "",
            formats.cost(arm, "seconds"),
            formats.backward(arm, group),
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.table import Table
        from rich.text import Text

        title = Text(self.title, style="bold")
        label = max(min(len(label), NARROWEST_LABEL) for label, _ in self.rows)
        columns = zip(self.headings, *(numbers for _, numbers in self.rows), strict=True)
        if label + sum(2 + max(map(len, column)) for column in columns) > options.max_width:
            yield title
            for label, numbers in self.rows:
                said = (f"{head} {number}" for head, number in zip(self.headings, numbers, strict=True) if number)
                yield Text(f"{label}: {', '.join(said)}")
            return
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("method", overflow="fold", min_width=label)
        for heading in self.headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for label, numbers in self.rows:
            table.add_row(Text(label), *numbers)
        yield table


def print_table(summary: Summary) -> None:
    """Print tables and verdicts on standard output; lines are wrapped for a terminal, but not for a pipe."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 1000
    console(width=wide).print(console_table(summary))


def print_numbers(summary: Summary, as_json: bool) -> None:
    """Print the tables and verdicts, or all numbers as JSON, on standard output."""
    if as_json:
        print(json.dumps(to_json(summary)))
    else:
        print_table(summary)


def _legends(summary: Summary) -> list[str]:
    return list(dict.fromkeys(wording.legend(group.metric) for group in summary.groups))


def to_json(summary: Summary) -> dict[str, Any]:
    """Return everything except the curves as plain values."""
    return {
        "verdict": wording.headline(summary),
        "runs": summary.runs,
        "diverged": summary.diverged,
        "failed": summary.failed,
        "groups": [
            {
                "title": group.title,
                "settings": group.settings,
                "baseline": group.baseline,
                "verdict": wording.group_verdict(group),
                "metric": vars(group.metric),
                "caveats": caveat_texts(group),
                "methods": [_arm_json(arm, group) for arm in group.arms],
                "views": [_view_json(view, group) for view in group.views],
            }
            for group in summary.groups
        ],
    }


def to_markdown(summary: Summary) -> str:
    """Return the report in Markdown: verdict, tables, equal-budget views, settings, environment, command."""
    lines = [
        "# batchtrim comparison",
        "",
        cell(wording.sentence(wording.headline(summary))),
        "",
        wording.counts(summary),
        "",
    ]
    for group in summary.groups:
        lines += [f"## {cell(group.title)}", "", *markdown_table(group, group.arms), ""]
        for arm in group.arms:
            if arm.paired:
                lines.append(f"* **{cell(arm.label)}**: {cell(wording.verdict(arm, group.reference))}")
        lines += [f"* {cell(text)}" for text in caveat_texts(group)]
        lines += ["", wording.legend(group.metric), ""]
        for view in group.views:
            lines += [f"### {wording.view_title(view)}", "", wording.view_note(view), ""]
            if view.budget is not None:
                lines += [*markdown_table(group, view.arms, cost=False), ""]
        lines += ["### Settings", ""]
        lines += [f"* {cell(name)}: {cell(value)}" for name, value in group.settings.items()]
        command = " ".join(wording.command(group).splitlines())  # a single line cannot close the block that contains it
        lines += ["", "Run it again:", "", "```", command, "```", ""] if command else [""]
    if environment := wording.environment(summary):
        lines += ["## Environment", "", *(f"* {cell(name)}: {cell(value)}" for name, value in environment.items())]
    return "\n".join(lines) + "\n"


def to_csv(summary: Summary) -> str:
    """Return one line per method and view: settings, mean, spread, intervals, differences, tests, cost, verdict."""
    lines = [
        {**group.settings, "view": name, **_flat(arm, group)}
        for group in summary.groups
        for name, arms in [
            ("as run", group.arms),
            *((wording.view_title(view), view.arms) for view in group.views if view.budget is not None),
        ]
        for arm in arms
    ]
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, fieldnames=list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _arm_json(arm: Arm, group: Group) -> dict[str, Any]:
    paired = arm.paired
    return {
        "label": arm.label,
        **arm.settings,
        arm.metric.field: {**vars(arm.moments), "by_seed": {str(seed): error for seed, error in arm.errors.items()}},
        "diverged": list(arm.diverged),
        "failed": list(arm.failed),
        "cost": arm.cost,
        "paired": paired
        and {
            **{name: value for name, value in vars(paired).items() if name != "metric"},
            "moments": vars(paired.moments),
            "finding": paired.verdict.value,
            "verdict": wording.verdict(arm, group.reference),
        },
    }


def _view_json(view: View, group: Group) -> dict[str, Any]:
    methods = [_arm_json(arm, group) for arm in view.arms]
    return {"name": view.name, "budget": view.budget, "note": wording.view_note(view), "methods": methods}


def _flat(arm: Arm, group: Group) -> dict[str, Any]:
    """Return an arm as one line of CSV."""
    paired, spread = arm.paired, arm.moments
    return {
        **{name: value for name, value in arm.settings.items() if name != "method_params"},
        "label": arm.label,
        "n": spread.n,
        "diverged": len(arm.diverged),
        "failed": len(arm.failed),
        arm.metric.field: spread.mean,
        "std": spread.std,
        **_ends("t", spread.t),
        **_ends("bootstrap", spread.bootstrap),
        "pairs": paired and paired.moments.n,
        "difference": paired and paired.moments.mean,
        **_ends("difference_t", paired and paired.moments.t),
        **_ends("difference_bootstrap", paired and paired.moments.bootstrap),
        "p_t": paired and paired.p_t,
        "p_wilcoxon": paired and paired.p_wilcoxon,
        "p_holm": paired and paired.p_holm,
        "detectable": paired and paired.detectable,
        **arm.cost,
        "verdict": paired and wording.verdict(arm, group.reference),
    }


def _ends(name: str, interval: tuple[float, float] | None) -> dict[str, float | None]:
    return {f"{name}_low": interval and interval[0], f"{name}_high": interval and interval[1]}


def markdown_table(group: Group, arms: Iterable[Arm], cost: bool = True) -> list[str]:
    metric = group.metric
    heads = [
        "method",
        "runs",
        metric.heading,
        f"difference{',' if metric.unit else ''}{metric.unit}",
        "95 % interval",
        "p (Holm)",
        "p (Wilcoxon)",
    ]
    heads += ["train s", "backward"] if cost else []
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for arm in arms:
        paired = arm.paired
        cells = [cell(arm.label), formats.runs(arm), formats.error(arm), formats.difference(paired)]
        cells += [formats.signed_interval(paired.moments.t, metric) if paired else ""]
        cells += [formats.p_value(paired.p_holm), formats.p_value(paired.p_wilcoxon)] if paired else ["", ""]
        cells += [formats.cost(arm, "seconds"), formats.backward(arm, group)] if cost else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def cell(value: object) -> str:
    """Escape text so that it cannot break a Markdown table or turn into markup."""
    text = str(value).replace("\n", " ")
    for mark in "\\|<>*_`[]":
        text = text.replace(mark, "\\" + mark)
    return text


def by_method(arms: Iterable[Arm]) -> dict[str, list[Arm]]:
    """Return all arms of each method: a method may have several, with different settings."""
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        found.setdefault(arm.settings["method"], []).append(arm)
    return found


def of_arms(arms: Sequence[Arm], text: Callable[[Arm], str]) -> str:
    """Return the text of a method's only arm, or of each arm with the settings that distinguish it."""
    if len(arms) == 1:
        return text(arms[0])
    named = ((arm.label.removeprefix(arm.settings["method"]).strip(" ()"), text(arm)) for arm in arms)
    return "<br>".join(f"{cell(name)}: {said}" for name, said in named if said)
