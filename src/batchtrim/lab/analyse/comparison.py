"""What a set of finished runs says: paired comparisons with intervals, and a verdict in words.

Runs that differ in nothing but method and seed form a group; inside it every method is compared with the baseline,
seed by seed, because two runs of one seed share data order, augmentation and initial weights. Errors are fractions in
[0, 1] throughout; a *point* is one percentage point of error. Differences are method minus baseline: below zero means
fewer errors than the baseline.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from batchtrim.lab.analyse.inference import (
    ALPHA,
    MIN_PAIRS,
    NO_SPREAD,
    Moments,
    detectable,
    holm,
    moments,
    paired_t,
    points,
    wilcoxon,
)

__all__ = ["Arm", "Group", "Paired", "Summary", "View", "summarize"]

# What makes a method's arm; all other settings but the seed make the group. Threads change nothing that is learnt.
ARM_SETTINGS = ("method", "method_params", "keep_start", "keep_end", "schedule", "engine")
NOT_IN_GROUP = (*ARM_SETTINGS, "seed", "threads")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Paired:
    """A method against the baseline over the seeds where both finished.

    Attributes:
        seeds, differences: one per pair, method minus baseline. ``p_t``: paired t-test, two-sided. ``p_wilcoxon``:
            signed-rank test, exact; with n pairs it cannot fall below 2 / 2^n, so five seeds never reach 0.05.
        p_holm: ``p_t`` corrected for the number of methods in the group. ``detectable``: the true difference that
            this number of pairs with this spread finds in 80 % of cases at the 0.05 level, before the correction.
        verdict: in words.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    moments: Moments
    p_t: float | None
    p_wilcoxon: float | None
    p_holm: float | None
    detectable: float | None
    verdict: str


@dataclass(frozen=True)
class Arm:
    """All runs of one method with one set of parameters.

    Attributes:
        label: the method's name, with the settings that tell it from other arms of the same method.
        runs: finished and diverged rows, by seed. ``errors``: test error by seed of those that finished.
        diverged, failed: seeds of runs that diverged, and of runs that an exception ended.
        cost: means over the finished runs of seconds, seconds_eval, samples_forward, samples_backward and steps.
        paired: None for the baseline, and where there is none.
    """

    label: str
    settings: dict[str, Any]
    runs: tuple[Row, ...]
    errors: dict[int, float]
    diverged: tuple[int, ...]
    failed: tuple[int, ...]
    moments: Moments
    cost: dict[str, float]
    paired: Paired | None = None


@dataclass(frozen=True)
class View:
    """The comparison read at one budget that every method reached.

    Attributes:
        name: "samples_backward" or "seconds". ``budget``: the largest that every finished run reached; None where
            a run has no curve. ``note``: how errors were read. ``arms``: as in the group, errors read at the budget.
    """

    name: str
    title: str
    budget: float | None
    note: str
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Group:
    """Arms that differ in method alone; ``settings`` are what they share."""

    title: str
    settings: dict[str, Any]
    baseline: str | None
    arms: tuple[Arm, ...]
    views: tuple[View, ...]
    verdict: str

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed that any arm ran, diverged and failed ones included."""
        return tuple(sorted({seed for arm in self.arms for seed in (*arm.errors, *arm.diverged, *arm.failed)}))


@dataclass(frozen=True)
class Summary:
    """All groups of a record file; ``verdict`` is the headline."""

    groups: tuple[Group, ...]
    runs: int
    diverged: int
    failed: int
    verdict: str
    rows: tuple[Row, ...] = field(repr=False, default=())


def summarize(rows: Iterable[Row], baseline: str = "full") -> Summary:
    """Group rows of ``runs.jsonl``, compare every method with the baseline by seed, and say what was seen.

    Args:
        rows: as read from the record file; where a key comes twice, the last counts.
        baseline: name of the method to compare with.

    Raises:
        ValueError: there are no rows.

    Notes:
        A diverged run has no error and takes part in no mean, but it is counted and named in the verdict. A failed one
        (an exception, not a property of the method) is counted and left out.
    """
    latest = {str(row["key"]): row for row in rows}
    if not latest:
        raise ValueError("expected at least one finished run, got none. Is this the folder a comparison wrote to?")
    grouped: dict[str, list[Row]] = {}
    for row in latest.values():
        shared = {name: value for name, value in row["config"].items() if name not in NOT_IN_GROUP}
        grouped.setdefault(json.dumps(shared, sort_keys=True, default=str), []).append(row)
    settings = [
        {name: value for name, value in members[0]["config"].items() if name not in NOT_IN_GROUP}
        for members in grouped.values()
    ]
    titles = _titles(settings)
    groups = tuple(
        _group(title, shared, members, baseline)
        for title, shared, members in zip(titles, settings, grouped.values(), strict=True)
    )
    statuses = [row["status"] for row in latest.values()]
    return Summary(
        groups=groups,
        runs=len(latest),
        diverged=statuses.count("diverged"),
        failed=statuses.count("failed"),
        verdict=_headline(groups, baseline),
        rows=tuple(latest.values()),
    )


def error_at(row: Row, budget: float, axis: str) -> float | None:
    """Test error of a run when it had spent ``budget`` of ``axis`` ("samples_backward" or "seconds").

    Read on the straight line between the two evaluations around the budget; None before the first of them, because
    nothing was measured there.
    """
    spent, errors = spent_curve(row, axis)
    if not spent or budget < spent[0] * (1 - 1e-9):
        return None
    return float(np.interp(budget, spent, errors))


def spent_curve(row: Row, axis: str) -> tuple[list[float], list[float]]:
    """What a run had spent by each evaluation, and the test error there; evaluations that gave no number left out."""
    curve = row.get("curve") or {}
    if axis == "seconds" or curve.get(axis):
        spent = list(curve.get(axis) or [])
    else:  # older rows: spread the total over epochs by the fraction kept in each
        keep = np.nan_to_num(np.asarray(curve.get("keep") or [], dtype=np.float64), nan=1.0)
        total = keep.sum()
        spent = (row[axis] * keep.cumsum() / total).tolist() if total > 0 else []
    points = [(x, y) for x, y in zip(spent, curve.get("test_error") or [], strict=False) if _is_number(y)]
    return [x for x, _ in points], [y for _, y in points]


def _group(title: str, settings: dict[str, Any], rows: list[Row], baseline: str) -> Group:
    members: dict[str, list[Row]] = {}
    for row in rows:
        arm = {name: row["config"].get(name) for name in ARM_SETTINGS}
        members.setdefault(json.dumps(arm, sort_keys=True, default=str), []).append(row)
    chosen = [{name: rows[0]["config"].get(name) for name in ARM_SETTINGS} for rows in members.values()]
    arms = [
        _arm(label, picked, rows)
        for label, picked, rows in zip(_arm_labels(chosen), chosen, members.values(), strict=True)
    ]
    arms.sort(key=lambda arm: arm.settings["method"] != baseline)  # stable: the baseline first, the rest as they ran
    reference = arms[0] if arms[0].settings["method"] == baseline else None
    compared = _compare(arms, reference)
    return Group(
        title=title,
        settings=settings,
        baseline=reference.label if reference else None,
        arms=compared,
        views=tuple(_view(name, arms, reference) for name in ("samples_backward", "seconds")),
        verdict=_group_verdict(compared, baseline),
    )


def _arm(label: str, settings: dict[str, Any], rows: list[Row]) -> Arm:
    by_seed = {row["config"]["seed"]: row for row in sorted(rows, key=lambda row: row["config"]["seed"])}
    finished = {seed: row for seed, row in by_seed.items() if row["status"] == "finished"}
    errors = {seed: float(row["test_error"]) for seed, row in finished.items()}
    names = ("seconds", "seconds_eval", "samples_forward", "samples_backward", "steps")
    return Arm(
        label=label,
        settings=settings,
        runs=tuple(row for row in by_seed.values() if row["status"] != "failed"),
        errors=errors,
        diverged=tuple(seed for seed, row in by_seed.items() if row["status"] == "diverged"),
        failed=tuple(seed for seed, row in by_seed.items() if row["status"] == "failed"),
        moments=moments(list(errors.values())),
        cost={name: float(np.mean([row[name] for row in finished.values()])) for name in names} if finished else {},
    )


def _compare(arms: Sequence[Arm], reference: Arm | None) -> tuple[Arm, ...]:
    """The arms with their paired comparison to ``reference``, p-values corrected over all of them."""
    if reference is None:
        return tuple(arms)
    others = [arm for arm in arms if arm is not reference]
    shared = [[seed for seed in arm.errors if seed in reference.errors] for arm in others]
    differences = [
        [arm.errors[seed] - reference.errors[seed] for seed in seeds] for arm, seeds in zip(others, shared, strict=True)
    ]
    raw = [paired_t(values) for values in differences]
    compared = {}
    for arm, seeds, values, p_t, p_holm in zip(others, shared, differences, raw, holm(raw), strict=True):
        spread = moments(values)
        paired = Paired(tuple(seeds), tuple(values), spread, p_t, wilcoxon(values), p_holm, detectable(spread), "")
        compared[arm.label] = replace(paired, verdict=_verdict(arm, paired, reference))
    return tuple(replace(arm, paired=compared.get(arm.label)) for arm in arms)


def _verdict(arm: Arm, paired: Paired, reference: Arm) -> str:
    attempted = len(arm.errors) + len(arm.diverged)
    if arm.diverged and not arm.errors:
        return f"every run diverged ({attempted} of {attempted})"
    words = _finding(paired)
    lost = [
        f"{len(each.diverged)} of {len(each.errors) + len(each.diverged)} runs"
        f"{' of ' + each.label if each is reference else ''} diverged"
        f" (seed{'s' if len(each.diverged) > 1 else ''} {', '.join(map(str, each.diverged))})"
        for each in (arm, reference)
        if each.diverged
    ]
    return "; ".join([*lost, f"over the {paired.moments.n} pairs that finished: {words}"]) if lost else words


def _finding(paired: Paired) -> str:
    n, mean, p = paired.moments.n, paired.moments.mean, paired.p_holm
    if mean is None:
        return "no seed in common with the baseline"
    by = f"{points(abs(mean))} points {'lower' if mean < 0 else 'higher'}"
    if n < MIN_PAIRS:
        return f"too few seeds to tell: {n} pair{'s' if n > 1 else ''}, five or more are needed"
    if not paired.moments.std:
        if abs(mean) < NO_SPREAD:
            return "the same error on every seed"
        return f"exactly {by} on every seed: no spread, so no test"
    if p is not None and p < ALPHA:
        return f"{'lower' if mean < 0 else 'higher'} error by {points(abs(mean))} points"
    assert paired.detectable is not None
    return (
        f"no difference seen; a difference under {points(paired.detectable)} points could not have been seen reliably"
    )


def _group_verdict(arms: Sequence[Arm], baseline: str) -> str:
    compared = [arm for arm in arms if arm.paired is not None]
    if not compared:
        return _nothing_compared([arm.settings["method"] for arm in arms], baseline)
    if len(compared) == 1:
        return f"{compared[0].label}: {compared[0].paired.verdict}"  # type: ignore[union-attr]
    kinds: dict[str, list[str]] = {"lower error": [], "higher error": [], "no difference seen": [], "no verdict": []}
    for arm in compared:
        assert arm.paired is not None
        kind = next((kind for kind in kinds if kind in arm.paired.verdict), "no verdict")
        kinds[kind].append(arm.label + (" (some diverged)" if arm.diverged and arm.errors else ""))
    return "; ".join(f"{kind}: {', '.join(labels)}" for kind, labels in kinds.items() if labels)


def _nothing_compared(methods: Sequence[Any], baseline: str) -> str:
    if baseline in methods:
        return f"runs of '{baseline}' alone, so nothing to compare with"
    return f"no runs of the baseline '{baseline}', so nothing to compare with"


def _headline(groups: Sequence[Group], baseline: str) -> str:
    if len(groups) == 1:
        return groups[0].verdict
    counts: dict[str, dict[str, int]] = {}
    for group in groups:
        for arm in group.arms:
            if arm.paired is not None:
                kinds = ("lower error", "higher error", "no difference seen")
                kind = next((kind for kind in kinds if kind in arm.paired.verdict), "no verdict")
                tally = counts.setdefault(str(arm.settings["method"]), {})
                tally[kind] = tally.get(kind, 0) + 1
    if not counts:
        return _nothing_compared([arm.settings["method"] for group in groups for arm in group.arms], baseline)
    lines = [
        f"{method}: {', '.join(f'{kind} in {count} of {sum(tally.values())}' for kind, count in tally.items())}"
        for method, tally in counts.items()
    ]
    return f"against {baseline} in {len(groups)} settings: {'; '.join(lines)}"


def _view(name: str, arms: Sequence[Arm], reference: Arm | None) -> View:
    """Every arm's error at the largest budget that all finished runs reached."""
    title, unit = {
        "samples_backward": ("Equal samples backward", "samples backward"),
        "seconds": ("Equal training time", "seconds of training"),
    }[name]
    finished = [row for arm in arms for row in arm.runs if row["status"] == "finished"]
    ends = [spent[-1] if spent else None for spent, _ in (spent_curve(row, name) for row in finished)]
    budget = min((end for end in ends if end is not None), default=None)
    if budget is None or None in ends:
        return View(name, title, None, "Not every run has a curve, so no budget in common can be read.", tuple(arms))
    read = []
    for arm in arms:
        found = {row["config"]["seed"]: error_at(row, budget, name) for row in arm.runs if row["status"] == "finished"}
        errors = {seed: error for seed, error in found.items() if error is not None}
        read.append(replace(arm, errors=errors, moments=moments(list(errors.values())), paired=None))
    matched = read[arms.index(reference)] if reference is not None else None
    note = (
        f"Read at {budget:,.0f} {unit}, the largest budget that every run reached, on a straight line between the "
        "evaluations before and after it. A run with a larger total is read before its learning rate has fallen, "
        "which counts against it: full_equal_compute is the control that is trained to the end on the smaller budget."
    )
    return View(name, title, budget, note, _compare(read, matched))


def _titles(settings: list[dict[str, Any]]) -> list[str]:
    """Data set, model and optimizer, and what else tells groups apart that have these in common."""
    named = ("dataset", "model", "optimizer")
    titles = []
    for each in settings:
        alike = [other for other in settings if all(other.get(name) == each.get(name) for name in named)]
        extra = [f"{name} {each[name]}" for name in _varying(alike, exclude=named) if each.get(name) is not None]
        titles.append(", ".join([*(str(each[name]) for name in named if name in each), *extra]))
    return titles


def _arm_labels(settings: list[dict[str, Any]]) -> list[str]:
    """The method's name; where several arms share it, with the settings in which they differ."""
    labels = []
    for each in settings:
        flat = [_flat(other) for other in settings if other["method"] == each["method"]]
        mine = _flat(each)
        parts = [f"{name} {_short(mine.get(name))}" for name in _varying(flat, exclude=("method",))]
        labels.append(f"{each['method']} ({', '.join(parts)})" if parts else str(each["method"]))
    return labels


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    params = settings.get("method_params") or {}
    return {name: value for name, value in settings.items() if name != "method_params"} | dict(params)


def _varying(settings: list[dict[str, Any]], exclude: Sequence[str] = ()) -> list[str]:
    names = list(dict.fromkeys(name for each in settings for name in each if name not in exclude))
    return [name for name in names if len({json.dumps(each.get(name), default=str) for each in settings}) > 1]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
