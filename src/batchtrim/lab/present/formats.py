"""The numbers of a comparison as text, the same on the console, in Markdown and on pages."""

from __future__ import annotations

from batchtrim.lab.analyse.comparison import Arm, Group, Paired
from batchtrim.lab.metric import ERROR, Metric

UNKNOWN = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def points(value: float, digits: int = 2) -> str:
    """Return a difference of errors in percentage points: 0.0123 is 1.23."""
    return f"{100 * value:.{digits}f}"


def percent(value: float | None, digits: int = 2, metric: Metric = ERROR, spread: float | None = None) -> str:
    """Return a metric's number: an error in percent, without the sign; others with decimals by their spread."""
    return UNKNOWN if value is None else metric.number(value, digits, spread)


def signed(value: float | None, digits: int = 2, metric: Metric = ERROR, spread: float | None = None) -> str:
    """Return a difference, of errors in points, with a real minus sign."""
    if value is None:
        return UNKNOWN
    text = metric.number(abs(value), digits, spread)
    if float(text) == 0:
        return text
    return (MINUS if value < 0 else "+") + text


def error(arm: Arm) -> str:
    """Return mean ± standard deviation of the metric; test errors in percent."""
    mean, std, metric = arm.moments.mean, arm.moments.std, arm.metric
    if std is None:
        return percent(mean, 2, metric)
    return f"{percent(mean, 2, metric, std)} ± {percent(std, 2, metric, std)}"


def runs(arm: Arm) -> str:
    """Return how many runs finished, diverged and failed."""
    lost = [f"{len(seeds)} {word}" for seeds, word in ((arm.diverged, "diverged"), (arm.failed, "failed")) if seeds]
    return ", ".join([str(arm.moments.n), *lost])


def short_runs(arm: Arm) -> str:
    """Return how many runs finished, such as 4/5 if one did not."""
    tried = arm.moments.n + len(arm.diverged) + len(arm.failed)
    return str(tried) if tried == arm.moments.n else f"{arm.moments.n}/{tried}"


def difference(paired: Paired | None) -> str:
    """Return the mean paired difference; of errors in points."""
    return signed(paired.moments.mean, 2, paired.metric, _half(paired.moments.t)) if paired else ""


def interval(ends: tuple[float, float] | None, metric: Metric = ERROR) -> str:
    """Return the ends of an interval of the metric; of errors in percent."""
    return UNKNOWN if ends is None else " to ".join(percent(each, 2, metric, _half(ends)) for each in ends)


def signed_interval(ends: tuple[float, float] | None, metric: Metric = ERROR) -> str:
    """Return the ends of an interval of differences; of errors in points."""
    return UNKNOWN if ends is None else " to ".join(signed(each, 2, metric, _half(ends)) for each in ends)


def _half(ends: tuple[float, float] | None) -> float | None:
    """Return half the width of an interval."""
    return (ends[1] - ends[0]) / 2 if ends else None


def p_value(p: float | None) -> str:
    """Return a p-value with three decimals; below that, <0.001."""
    if p is None:
        return UNKNOWN
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def amount(value: float) -> str:
    """Return a count or a time in three digits and a letter: 1.2M."""
    value = float(f"{value:.3g}")  # 999.6 is 1k
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def cost(arm: Arm, name: str) -> str:
    """Return a cost, averaged over finished runs."""
    return amount(arm.cost[name]) if name in arm.cost else UNKNOWN


def backward(arm: Arm, group: Group) -> str:
    """Return the backward samples, as a share of plain training's if that is the baseline."""
    reference = group.reference
    if reference is not None and reference.settings["method"] != "full":
        reference = None
    return share(arm, reference, "samples_backward")


def share(arm: Arm, reference: Arm | None, name: str) -> str:
    """Return a cost as a percentage of the baseline's; the cost itself if the baseline has none."""
    if name not in arm.cost or reference is None or not reference.cost.get(name):
        return cost(arm, name)
    return f"{100 * arm.cost[name] / reference.cost[name]:.0f} %"
