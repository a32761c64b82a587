"""How the report words its numbers: the same on the console, in Markdown and on the page."""

from __future__ import annotations

import shlex
from typing import Any

from batchtrim.lab.analyse.comparison import Arm, Group, Paired, Summary
from batchtrim.lab.analyse.inference import points

UNKNOWN = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
LEGEND = (
    "Test error: mean ± standard deviation over seeds. Difference: method minus baseline on the same seed, in points "
    "of error, below zero is better. p: paired t-test, Holm-corrected over the methods of the table."
)


def kind(verdict: str) -> str:
    """Which way a verdict goes: lower, higher, same or none."""
    for word, name in (("lower error", "lower"), ("higher error", "higher"), ("no difference", "same")):
        if word in verdict:
            return name
    return "same" if verdict == "the same error on every seed" else "none"


def sentence(text: str) -> str:
    """With a capital letter, unless a method's name comes first, and a full stop."""
    return text.rstrip(".") + "."


def counts(summary: Summary) -> str:
    """How many runs there were, and what became of those that did not finish."""
    text = f"{summary.runs} run{'s' if summary.runs != 1 else ''}"
    if summary.diverged:
        text += f", {summary.diverged} diverged (counted and named, in no mean)"
    if summary.failed:
        text += f", {summary.failed} failed with an error and left out"
    return text + "."


def percent(value: float | None, digits: int = 2) -> str:
    """An error as percent, without the sign: 0.0213 is 2.13."""
    return UNKNOWN if value is None else points(value, digits)


def signed(value: float | None, digits: int = 2) -> str:
    """A difference in points, with a real minus sign."""
    if value is None:
        return UNKNOWN
    text = points(abs(value), digits)
    if float(text) == 0:
        return text
    return (MINUS if value < 0 else "+") + text


def error(arm: Arm) -> str:
    """Mean and standard deviation of the test error in percent."""
    mean, std = arm.moments.mean, arm.moments.std
    return percent(mean) if std is None else f"{percent(mean)} ± {percent(std)}"


def runs(arm: Arm) -> str:
    """How many runs finished, and what became of the others."""
    lost = [f"{len(seeds)} {word}" for seeds, word in ((arm.diverged, "diverged"), (arm.failed, "failed")) if seeds]
    return ", ".join([str(arm.moments.n), *lost])


def short_runs(arm: Arm) -> str:
    """How many runs finished, of how many where some did not: 4/5."""
    tried = arm.moments.n + len(arm.diverged) + len(arm.failed)
    return str(tried) if tried == arm.moments.n else f"{arm.moments.n}/{tried}"


def difference(paired: Paired | None) -> str:
    """Mean paired difference in points."""
    return signed(paired.moments.mean) if paired else ""


def interval(ends: tuple[float, float] | None) -> str:
    """Two ends of an interval of errors, in percent."""
    return UNKNOWN if ends is None else f"{percent(ends[0])} to {percent(ends[1])}"


def signed_interval(ends: tuple[float, float] | None) -> str:
    """Two ends of an interval of differences, in points."""
    return UNKNOWN if ends is None else f"{signed(ends[0])} to {signed(ends[1])}"


def p_value(p: float | None) -> str:
    """Three decimals, and no pretence below them."""
    if p is None:
        return UNKNOWN
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def amount(value: float) -> str:
    """A count or a time in at most four figures and a letter: 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def cost(arm: Arm, name: str) -> str:
    """Mean over finished runs."""
    return amount(arm.cost[name]) if arm.cost else UNKNOWN


def backward(arm: Arm, group: Group) -> str:
    """Samples that went backward, as a share of plain training's where that is the baseline."""
    reference = next((each for each in group.arms if each.label == group.baseline), None)
    if reference is not None and reference.settings["method"] != "full":
        reference = None
    return share(arm, reference, "samples_backward")


def share(arm: Arm, reference: Arm | None, name: str) -> str:
    """A cost as a percentage of the baseline's, or in full where that has none."""
    if not arm.cost or reference is None or not reference.cost.get(name):
        return cost(arm, name)
    return f"{100 * arm.cost[name] / reference.cost[name]:.0f} %"


def environment(summary: Summary) -> dict[str, str]:
    """Versions and hardware; where runs differ, every value there was."""
    seen: dict[str, list[str]] = {}
    for row in summary.rows:
        for name, value in (row.get("environment") or {}).items():
            if str(value) not in seen.setdefault(name, []):
                seen[name].append(str(value))
    started = sorted(row["started"] for row in summary.rows if row.get("started"))
    dates = {"first run started": started[0], "last run started": started[-1]} if started else {}
    return {name: ", ".join(values) for name, values in seen.items()} | dates


def command(group: Group) -> str:
    """The command that runs this group again; runs that are recorded in the folder are not done twice."""
    settings: dict[str, Any] = {
        name: value for name, value in group.settings.items() if value is not None and name != "device"
    }
    methods = list(dict.fromkeys(str(arm.settings["method"]) for arm in group.arms))
    settings["methods"] = ",".join(methods)
    for name in ("keep_start", "keep_end", "schedule", "engine"):
        values = list(dict.fromkeys(arm.settings.get(name) for arm in group.arms))
        given = [f"{value:g}" if isinstance(value, float) else str(value) for value in values if value is not None]
        if given:
            settings[name] = ",".join(given)
    seeds = group.seeds
    counted = seeds == tuple(range(len(seeds)))
    settings["seeds"] = len(seeds) if counted else ",".join(map(str, seeds)) + ("," if len(seeds) == 1 else "")
    words = [f"--{name.replace('_', '-')} {shlex.quote(_plain(value))}" for name, value in settings.items()]
    params = {
        f"{arm.settings['method']}.{name}": value
        for arm in group.arms
        for name, value in (arm.settings.get("method_params") or {}).items()
    }
    words += [f"--param {shlex.quote(f'{name}={_plain(value)}')}" for name, value in params.items()]
    return "batchtrim compare " + " ".join(words)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
