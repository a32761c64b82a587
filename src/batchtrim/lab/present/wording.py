"""Every sentence on a comparison, the same on the console, in Markdown and on pages."""

from __future__ import annotations

import collections
import math
import shlex
from collections.abc import Iterable
from typing import Any

from batchtrim._checks import describe
from batchtrim.lab.analyse.claims import Claim
from batchtrim.lab.analyse.comparison import Arm, Group, Paired, Summary, Verdict, View
from batchtrim.lab.analyse.inference import MIN_PAIRS
from batchtrim.lab.metric import ERROR, Metric
from batchtrim.lab.present import formats
from batchtrim.lab.run.config import ARM_SETTINGS, SETTINGS

MOST_NAMED = 4  # arms that a verdict lists by name, if some are the same method
MOST_TIMED = 4  # methods whose seconds are listed in a sentence
LEGEND = (
    "Test error: mean ± standard deviation over seeds. Difference: method minus baseline on the same seed, in points "
    "of error, below zero is better. The 95 % interval is not corrected. p: paired t-test, Holm-corrected over the "
    "methods of the table."
)
TERMS = (
    "Backward samples: for how many samples the backward pass was computed, over the whole training. Holm: with "
    "several methods in a table every p is raised, so that the chance of one false finding among all of them stays at "
    "5 %. A difference that could not have been seen reliably is that of one test, before Holm. Wilcoxon: a test of "
    "the same pairs by their ranks alone."
)


def legend(metric: Metric) -> str:
    """Return an explanation of a metric's table."""
    if metric == ERROR:
        return LEGEND
    sign = "above" if metric.higher_is_better else "below"
    points = ", in points" if metric.in_percent else ""
    return (
        f"Mean ± standard deviation of {metric.title} over seeds. Difference: method minus baseline on the same "
        f"seed{points}, {sign} zero is better. The 95 % interval is not corrected. p: paired t-test, Holm-corrected "
        "over the methods of the table."
    )


KINDS = {Verdict.LOWER: "lower", Verdict.HIGHER: "higher", Verdict.NOT_SEEN: "same", Verdict.SAME: "same"}
"""The direction of a verdict; other verdicts have none."""
FINDINGS = {"lower": "lower", "higher": "higher", "same": "no difference seen", "none": "no verdict"}
CONTROL = ": full_equal_compute is the control that finishes its training on the smaller budget."
VIEWS = {
    "samples_backward": ("Equal backward samples", "backward samples"),
    "seconds": ("Equal training time", "seconds of training"),
}


def kind(paired: Paired | None) -> str:
    """Return the direction of a comparison: lower, higher, same or none."""
    return KINDS.get(paired.verdict, "none") if paired else "none"


def colour(paired: Paired | None) -> str:
    """Return the CSS class of a comparison: "lower" if the method is better, "higher" if it is worse."""
    way = kind(paired)
    if paired is None or not paired.metric.higher_is_better:
        return way
    return {"lower": "higher", "higher": "lower"}.get(way, way)


def _found(way: str, metric: Metric) -> str:
    """Return the direction of a comparison with its metric: lower error."""
    return f"{FINDINGS[way]} {metric.name}" if way in ("lower", "higher") else FINDINGS[way]


def finding(paired: Paired) -> str:
    """Return the finding over the pairs as a phrase."""
    n, mean, verdict, metric = paired.moments.n, paired.moments.mean or 0.0, paired.verdict, paired.metric
    by = f"{metric.number(abs(mean))}{metric.unit}"
    way = "lower" if mean < 0 else "higher"
    return {
        Verdict.LOWER: f"{way} {metric.name} by {by}",
        Verdict.HIGHER: f"{way} {metric.name} by {by}",
        Verdict.NOT_SEEN: f"no difference seen; a difference under {metric.number(paired.detectable or 0.0)}"
        f"{metric.unit} could not have been seen reliably",
        Verdict.SAME: f"the same {metric.name} on every seed",
        Verdict.SHIFTED: f"exactly {by} {way} on every seed: no spread, so no test",
        Verdict.TOO_FEW: f"too few seeds to tell: {n} pair{'s' if n > 1 else ''}, {MIN_PAIRS} or more are needed",
        Verdict.NO_PAIRS: "no seed in common with the baseline",
        Verdict.ALL_DIVERGED: "every run diverged",
    }[verdict]


def verdict(arm: Arm, reference: Arm | None) -> str:
    """Return an arm's verdict against the baseline, naming diverged runs of either; "" if nothing is compared."""
    if arm.paired is None or reference is None:
        return ""
    said = finding(arm.paired)
    if arm.paired.verdict is Verdict.ALL_DIVERGED:
        return f"{said} ({len(arm.diverged)} of {len(arm.diverged)})"
    if failed := [each.label for each in (arm, reference) if each.failed and not each.errors and not each.diverged]:
        return f"every run of {' and of '.join(failed)} failed"
    lost = [
        f"{len(each.diverged)} of {len(each.errors) + len(each.diverged)} runs"
        f"{' of ' + each.label if each is reference else ''} diverged"
        f" (seed{'s' if len(each.diverged) > 1 else ''} {', '.join(map(str, each.diverged))})"
        for each in (arm, reference)
        if each.diverged
    ]
    n = arm.paired.moments.n
    over = f"over the {n} pairs that finished: " if n > 1 else "over the one pair that finished: " if n else ""
    return "; ".join([*lost, f"{over}{said}"]) if lost else said


def group_verdict(group: Group) -> str:
    """Return the verdict on a group in one line."""
    compared = [arm for arm in group.arms if arm.paired is not None]
    if not compared:
        return _nothing_compared(group.arms, group.against)
    if len(compared) == 1:
        return f"{compared[0].label}: {verdict(compared[0], group.reference)}"
    if all(arm.paired and arm.paired.verdict is Verdict.TOO_FEW for arm in compared):
        return finding(max((arm.paired for arm in compared if arm.paired), key=lambda paired: paired.moments.n))
    if len(compared) > MOST_NAMED and len({arm.settings["method"] for arm in compared}) < len(compared):
        return _sweep_verdict(compared, group.metric)
    labels: dict[str, list[str]] = {name: [] for name in FINDINGS}
    for arm in compared:
        labels[kind(arm.paired)].append(arm.label + _some_diverged(arm))
    return "; ".join(f"{_found(name, group.metric)}: {', '.join(each)}" for name, each in labels.items() if each)


def _sweep_verdict(compared: list[Arm], metric: Metric) -> str:
    """Return how often each method was lower, higher or neither over its schedules, and its best arm of several."""
    lines = []
    for method in dict.fromkeys(str(arm.settings["method"]) for arm in compared):
        arms = [arm for arm in compared if arm.settings["method"] == method]
        tally = collections.Counter(kind(arm.paired) for arm in arms)
        if len(arms) == 1:
            lines.append(f"{method}: {_found(kind(arms[0].paired), metric)}")
            continue
        found = ", ".join(f"{_found(name, metric)} in {count}" for name, count in tally.items())
        best = best_of(arms)
        said = ""
        if len(best) == 1:
            alone = [place(arm) for arm in arms].count(place(best[0])) == 1
            said = f" (best: {place(best[0]) if alone else best[0].label}{_some_diverged(best[0])})"
        lines.append(f"{method}: {found} of {len(arms)}{said}")
    return "; ".join(lines)


def _some_diverged(arm: Arm) -> str:
    """Return a remark on an arm whose mean is over fewer seeds than it was run with."""
    return " (some diverged)" if arm.diverged and arm.errors else ""


def best_of(arms: Iterable[Arm]) -> list[Arm]:
    """Return the arm with the best mean, or all that share it; none if no run finished."""
    means = [(arm, arm.moments.mean) for arm in arms if arm.moments.mean is not None]
    if not means:
        return []
    first = max if means[0][0].metric.higher_is_better else min
    best = first(mean for _, mean in means)
    return [arm for arm, mean in means if math.isclose(mean, best, rel_tol=1e-12)]


def place(arm: Arm) -> str:
    """Return an arm's place in a sweep: cosine to 0.2."""
    schedule, end = arm.settings.get("schedule"), arm.settings.get("keep_end")
    return f"{schedule} to {end:g}" if schedule is not None and end is not None else arm.label


def headline(summary: Summary) -> str:
    """Return the verdict on all groups in one line: how often each method was lower, higher or neither."""
    if not isinstance(summary, Summary):
        raise TypeError(f"expected `summary` to be what compare or summarize returns, got {describe(summary)}.")
    if len(summary.groups) == 1:
        return group_verdict(summary.groups[0])
    arms = [arm for group in summary.groups for arm in group.arms]
    counts: dict[str, collections.Counter[str]] = {}
    for arm in arms:
        if arm.paired is not None:
            counts.setdefault(str(arm.settings["method"]), collections.Counter())[kind(arm.paired)] += 1
    if not counts:
        return _nothing_compared(arms, summary.against)
    metrics = {group.metric.name for group in summary.groups}
    metric = summary.groups[0].metric if len(metrics) == 1 else Metric("value")
    lines = []
    for method, tally in counts.items():
        found = [f"{_found(name, metric)} in {count} of {tally.total()}" for name, count in tally.items()]
        lines.append(f"{method}: {', '.join(found)}")
    return f"against {summary.against} in {len(summary.groups)} settings: {'; '.join(lines)}"


def _nothing_compared(arms: Iterable[Arm], against: str) -> str:
    if against in {arm.settings["method"] for arm in arms}:
        return f"runs of '{against}' alone, so nothing to compare with"
    return f"no runs of the baseline '{against}', so nothing to compare with"


def view_title(view: View) -> str:
    """Return the heading of a comparison at an equal budget."""
    return VIEWS[view.name][0]


def view_note(view: View) -> str:
    """Return an explanation of how the errors of a view were read."""
    if view.apart:
        (ended, first), (begun, second) = view.apart
        return (
            f"No budget in common: {ended}, seed {first}, ended before the first evaluation of {begun}, seed {second}. "
            "More epochs, or evaluations earlier in training, give one."
        )
    if view.budget is None:
        why = "No run finished" if view.missing == "no run" else "Not every run has a curve"
        return f"{why}, so no budget in common can be read."
    budget = f"{view.budget:,.0f}" if view.budget >= 100 else f"{view.budget:.3g}"
    configs = [row["config"] for arm in view.arms for row in arm.runs]
    own = any("task" in config for config in configs)  # it has a learning rate of its own, and not this control
    decays = not own and any(config.get("lr_schedule") != "constant" for config in configs)
    return (
        f"Read at {budget} {VIEWS[view.name][1]}, the largest budget at which every finished run had been evaluated, "
        "on a straight line between the evaluations before and after it. A run with a larger total is read before its "
        f"{'learning rate has fallen' if decays else 'training has ended'}, which counts against it"
        + ("." if own else CONTROL)
    )


def claim(claim: Claim) -> str:
    """Return a claim's two sides in Markdown, with the settings that identify their arms: `trim` (engine shared)."""
    sides = []
    for method, chosen in ((claim.method, claim.settings), (claim.against, claim.against_settings)):
        named = ", ".join(f"{name} {value}" for name, value in chosen.items())
        sides.append(f"`{method}`" + (f" ({named})" if named else ""))
    by = "" if claim.margin is None else f" by {formats.points(claim.margin)} points"
    limits = ((claim.backward, "backward samples"), (claim.time, "training time"))
    most = " and ".join(f"{share:.0%} of its {what}" for share, what in limits if share is not None)
    return f"{sides[0]} against {sides[1]}: {claim.says}{by}" + (f", with at most {most}" if most else "")


def better(metric: Metric) -> str:
    """Return a sentence on which direction of a metric is better, and how it is compared."""
    return f"{capital(metric.better)} {metric.name} is better; differences are paired by seed."


def capital(text: str) -> str:
    """Return the text with a capital letter."""
    return text[:1].upper() + text[1:]


def sentence(text: str) -> str:
    """Return the text with a full stop."""
    return text.rstrip(".") + "."


def counts(summary: Summary) -> str:
    """Return the number of runs, and how many diverged or failed."""
    text = f"{summary.runs} run{'s' if summary.runs != 1 else ''}"
    if summary.diverged:
        text += f", {summary.diverged} diverged (named, and not in the means)"
    if summary.failed:
        text += f", {summary.failed} failed with an error and left out"
    return text + "."


def times(group: Group) -> str:
    """Return a run's mean seconds of training and testing; for many methods, those of testing only."""
    timed = [arm for arm in group.arms if "seconds" in arm.cost and arm.cost.get("seconds_eval")]
    if len(timed) > MOST_TIMED:
        low, high = (formats.amount(each(arm.cost["seconds_eval"] for arm in timed)) for each in (min, max))
        return f"Testing adds {low} to {high} seconds to a run."
    parts = [
        f"{arm.label} {formats.amount(arm.cost['seconds'])} + {formats.amount(arm.cost['seconds_eval'])}"
        for arm in timed
    ]
    return f"Seconds for a run, training + testing: {', '.join(parts)}." if parts else ""


def environment(summary: Summary) -> dict[str, str]:
    """Return versions and hardware; if runs differ, all values."""
    seen: dict[str, list[str]] = {}
    for row in summary.rows:
        for name, value in (row.get("environment") or {}).items():
            if str(value) not in seen.setdefault(name, []):
                seen[name].append(str(value))
    started = sorted(row["started"] for row in summary.rows if row.get("started"))
    dates = {"first run started": started[0], "last run started": started[-1]} if started else {}
    return {name: ", ".join(values) for name, values in seen.items()} | dates


_NOT_TYPED = ("device", *(name for name, each in SETTINGS.items() if not each.help))
"""Settings that the command omits: the device depends on the machine, and the others have no option."""


def command(group: Group) -> str:
    """Return the command that repeats this group; runs already recorded in the folder are skipped.

    "" for another program's results.
    """
    if "epochs" not in group.settings:
        return ""
    settings: dict[str, Any] = {
        name: value for name, value in group.settings.items() if value is not None and name not in _NOT_TYPED
    }
    for name in ARM_SETTINGS:
        values = list(dict.fromkeys(arm.settings.get(name) for arm in group.arms if name != "method_params"))
        given = ",".join(str(value) for value in values if value is not None)
        if given:
            settings["methods" if name == "method" else name] = given
    seeds = group.seeds
    counted = seeds == tuple(range(len(seeds)))
    settings["seeds"] = len(seeds) if counted else ",".join(map(str, seeds)) + ("," if len(seeds) == 1 else "")
    flags = {name: settings.pop(name) for name, value in list(settings.items()) if isinstance(value, bool)}
    words = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in settings.items()]
    words += [flag for name, value in flags.items() if (flag := _flag(name, value))]
    params: dict[str, list[str]] = {}
    for arm in group.arms:
        for name, value in (arm.settings.get("method_params") or {}).items():
            values = params.setdefault(f"{arm.settings['method']}.{name}", [])
            if str(value) not in values:
                values.append(str(value))
    words += [f"--param {shlex.quote(name + '=' + ','.join(values))}" for name, values in params.items()]
    return "batchtrim compare " + " ".join(words)


def _flag(name: str, value: bool) -> str:
    """Return the flag that sets this value; "" if omitting it does."""
    if name == "higher_is_better":
        return "--higher-is-better" if value else "--lower-is-better"
    return f"--{name.replace('_', '-')}" if value else ""
