"""Decide the verdict on finished runs: paired comparisons, intervals and tests. Numbers and enums, no sentences.

Runs that differ only in method and seed form a group. Within it, every method is compared with the baseline,
seed by seed, because two runs of one seed share data order, augmentation and initial weights. Errors are fractions in
[0, 1] throughout; a *point* is one percentage point of error. Differences are method minus baseline: below zero means
fewer errors than the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np

from batchtrim._checks import check_choice
from batchtrim.lab.analyse import naming, views
from batchtrim.lab.analyse.inference import (
    ALPHA,
    MIN_PAIRS,
    NO_SPREAD,
    Moments,
    detectable,
    holm,
    moments,
    paired_t,
    unit_of,
    wilcoxon,
)
from batchtrim.lab.metric import ERROR, Metric
from batchtrim.lab.records import COSTS, Row, check_result, latest_of
from batchtrim.lab.run.config import ARM_SETTINGS, COMPARED, SETTINGS, without_places

__all__ = ["Arm", "Group", "Paired", "Summary", "Verdict", "View", "check_baseline", "summarize", "verdict_of"]


class Verdict(Enum):
    """The verdict on an arm against the baseline; :class:`Paired` holds its numbers."""

    LOWER = "lower"
    """The test finds a lower error than the baseline's."""
    HIGHER = "higher"
    NOT_SEEN = "not seen"
    """The test finds no difference; one below ``detectable`` could not have been seen reliably."""
    SAME = "same"
    """The same error on every seed."""
    SHIFTED = "shifted"
    """The same difference on every seed, to the last bit: no spread, so no test."""
    TOO_FEW = "too few"
    """Fewer than ``MIN_PAIRS`` pairs."""
    NO_PAIRS = "no pairs"
    """No seed in common with the baseline."""
    ALL_DIVERGED = "all diverged"
    """Every run of the arm diverged."""


@dataclass(frozen=True)
class Paired:
    """A method against the baseline, over the seeds for which both finished.

    Attributes:
        seeds, differences: one per pair, method minus baseline.
        p_t: paired t-test, two-sided.
        p_wilcoxon: signed-rank test, exact; with n pairs it cannot fall below 2 / 2^n, so five seeds never reach 0.05.
        p_holm: ``p_t`` corrected for the number of methods in the group.
        detectable: the true difference that this many pairs with this spread would find in 80 % of cases at the 0.05
            level, before the correction.
        verdict: decided by :func:`verdict_of`; :mod:`batchtrim.lab.present.wording` has the sentence.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    moments: Moments
    p_t: float | None
    p_wilcoxon: float | None
    p_holm: float | None
    detectable: float | None
    verdict: Verdict
    metric: Metric = ERROR


@dataclass(frozen=True)
class Arm:
    """All runs of one method with one set of parameters.

    Attributes:
        label: the method's name, with the settings that distinguish it from other arms of the same method.
        runs: finished and diverged rows, by seed.
        errors: by seed, the ``metric`` of those that finished: the test error, unless a task or a table names another.
        diverged, failed: seeds of runs that diverged, and of runs that ended in an exception.
        cost: means over the finished runs of seconds, seconds_eval, samples_forward, samples_backward and steps, each
            if all of them have it.
        paired: None for the baseline, and if there is no baseline.
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
    metric: Metric = ERROR


@dataclass(frozen=True)
class View:
    """The comparison at one budget that every method reached.

    Attributes:
        name: "samples_backward" or "seconds".
        budget: the largest by which every finished run had been evaluated; None if there is none.
        arms: as in the group, with errors at the budget.
        missing: why there is no budget, as in :class:`batchtrim.lab.analyse.views.Missing`; "" if there is one.
        apart: label and seed of a run that had ended, and of one not yet evaluated by then.
    """

    name: str
    budget: float | None
    arms: tuple[Arm, ...]
    missing: str = ""
    apart: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Group:
    """Arms that differ only in method.

    Attributes:
        title: the group's name.
        settings: those that its runs share.
        against: the method asked for as baseline.
        baseline: the label of its arm; None if it has no runs here.
    """

    title: str
    settings: dict[str, Any]
    against: str
    baseline: str | None
    arms: tuple[Arm, ...]
    views: tuple[View, ...]

    @property
    def metric(self) -> Metric:
        """The metric that compares its arms."""
        return Metric.of(self.settings)

    @property
    def reference(self) -> Arm | None:
        """The baseline's arm."""
        return next((arm for arm in self.arms if arm.label == self.baseline), None)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of all arms, those of diverged and failed runs included."""
        return tuple(sorted({seed for arm in self.arms for seed in (*arm.errors, *arm.diverged, *arm.failed)}))


@dataclass(frozen=True)
class Summary:
    """All groups of a record file, compared with the method ``against``."""

    groups: tuple[Group, ...]
    runs: int
    diverged: int
    failed: int
    against: str
    rows: tuple[Row, ...] = field(repr=False, default=())


def summarize(rows: Iterable[Row], baseline: str = "full") -> Summary:
    """Group rows of ``runs.jsonl``, compare every method with the baseline by seed, and decide the verdicts.

    Args:
        rows: as read from the record file; if a key occurs twice, the last row that did not fail counts.
        baseline: name of the method to compare with.

    Raises:
        ValueError: there are no rows, one lacks a field of a result, or two are of one method, seed and settings. The
            message names the key.

    Notes:
        A diverged run has no error and is left out of means, but it is counted and its seed is named. A failed run (an
        exception, not a property of the method) is counted and left out.
    """
    latest = latest_of(_checked(rows))
    if not latest:
        raise ValueError("expected at least one finished run, got none. Is this the folder a comparison wrote to?")
    grouped: dict[str, list[Row]] = {}
    for row in latest:
        grouped.setdefault(naming.key(without_places(_settings(row, shared=True))), []).append(row)
    settings = [_settings(members[0], shared=True) for members in grouped.values()]
    labels = naming.labels([_settings(row, shared=False) for row in latest])
    groups = tuple(
        _group(title, shared, members, baseline, labels)
        for title, shared, members in zip(naming.titles(settings), settings, grouped.values(), strict=True)
    )
    statuses = [row["status"] for row in latest]
    return Summary(
        groups=groups,
        runs=len(latest),
        diverged=statuses.count("diverged"),
        failed=statuses.count("failed"),
        against=baseline,
        rows=tuple(latest),
    )


def check_baseline(rows: Iterable[Row], baseline: str) -> None:
    """Raise a ValueError if no run has the method asked for; the default may be missing, and is then no baseline."""
    if baseline != "full":
        check_choice("baseline", baseline, sorted({row["config"]["method"] for row in rows}))


def _checked(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        check_result(row, f"run {row.get('key')}")
        yield row


def _settings(row: Row, shared: bool) -> dict[str, Any]:
    """Return a run's settings: those that its group shares, or those that define its arm."""
    config = row["config"]
    if shared:
        return {name: value for name, value in config.items() if name not in COMPARED and not _unsaid(name, value)}
    return {name: config.get(name) for name in ARM_SETTINGS}


def _unsaid(name: str, value: Any) -> bool:
    """True for a default that a run may omit: the setting was added after runs had been recorded."""
    return name in SETTINGS and SETTINGS[name].later and value == SETTINGS[name].default


def _group(title: str, shared: dict[str, Any], rows: list[Row], against: str, labels: Mapping[str, str]) -> Group:
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(naming.key(_settings(row, shared=False)), []).append(row)
    arms = [_arm(labels[key], _settings(runs[0], shared=False), runs) for key, runs in members.items()]
    # stable: the baseline first, then as they ran; of several arms of its method, the same one whatever the line order
    arms.sort(key=lambda arm: _place(arm, against))
    reference = arms[0] if arms[0].settings["method"] == against else None
    return Group(
        title=title,
        settings=shared,
        against=against,
        baseline=reference.label if reference else None,
        arms=_compare(arms, reference),
        views=tuple(_view(name, arms, reference) for name in views.BUDGETS),
    )


def _place(arm: Arm, against: str) -> tuple[bool, bool, str]:
    if arm.settings["method"] != against:
        return True, False, ""
    return False, arm.settings["engine"] not in (None, "exact"), naming.key(arm.settings)


def _arm(label: str, settings: dict[str, Any], rows: list[Row]) -> Arm:
    by_seed: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: row["config"]["seed"]):
        seed = row["config"]["seed"]
        if seed in by_seed:
            raise ValueError(
                f"expected one run of {label} with seed {seed} in a comparison, got two of the same settings, with the "
                f"keys {by_seed[seed]['key']} and {row['key']}. Remove one of them."
            )
        by_seed[seed] = row
    finished = {seed: row for seed, row in by_seed.items() if row["status"] == "finished"}
    metric = Metric.of(rows[0]["config"])
    errors = {seed: float(row[metric.field]) for seed, row in finished.items()}
    known = [name for name in COSTS if finished and all(row.get(name) is not None for row in finished.values())]
    return Arm(
        label=label,
        settings=settings,
        runs=tuple(row for row in by_seed.values() if row["status"] != "failed"),
        errors=errors,
        diverged=tuple(seed for seed, row in by_seed.items() if row["status"] == "diverged"),
        failed=tuple(seed for seed, row in by_seed.items() if row["status"] == "failed"),
        moments=_moments(errors.values(), metric),
        cost={name: float(np.mean([row[name] for row in finished.values()])) for name in known},
        metric=metric,
    )


def _compare(arms: Sequence[Arm], reference: Arm | None) -> tuple[Arm, ...]:
    """Return the arms with their paired comparison to ``reference``, p-values corrected over all of them."""
    if reference is None:
        return tuple(arms)
    others = [arm for arm in arms if arm is not reference]
    shared = [[seed for seed in arm.errors if seed in reference.errors] for arm in others]
    differences = [
        [arm.errors[seed] - reference.errors[seed] for seed in seeds] for arm, seeds in zip(others, shared, strict=True)
    ]
    units = [  # of the values compared alone: next to another arm's 1e15, these would be rounding
        _unit([each.errors[seed] for each in (arm, reference) for seed in seeds], reference.metric)
        for arm, seeds in zip(others, shared, strict=True)
    ]
    raw = [paired_t([value / unit for value in values]) for values, unit in zip(differences, units, strict=True)]
    paired = {
        id(arm): _paired(arm, seeds, values, p_t, p_holm, unit)
        for arm, seeds, values, p_t, p_holm, unit in zip(
            others, shared, differences, raw, holm(raw), units, strict=True
        )
    }
    return tuple(replace(arm, paired=paired.get(id(arm))) for arm in arms)


def _unit(values: Collection[float], metric: Metric) -> float:
    """Return the unit that separates spread from rounding: 1 for errors, by size for other metrics."""
    return 1.0 if metric.in_percent else unit_of(values)


def _moments(values: Collection[float], metric: Metric) -> Moments:
    unit = _unit(values, metric)
    return _within(moments([value / unit for value in values]).times(unit), metric, 0.0)


def _paired(
    arm: Arm, seeds: list[int], differences: list[float], p_t: float | None, p_holm: float | None, unit: float
) -> Paired:
    values = [value / unit for value in differences]
    spread = moments(values)
    smallest = detectable(spread)
    verdict = Verdict.ALL_DIVERGED if arm.diverged and not arm.errors else verdict_of(spread, p_holm)
    return Paired(
        seeds=tuple(seeds),
        differences=tuple(differences),
        moments=_within(spread.times(unit), arm.metric, -1.0),
        p_t=p_t,
        p_wilcoxon=wilcoxon(values),
        p_holm=p_holm,
        detectable=None if smallest is None else min(smallest * unit, 1.0 if arm.metric.in_percent else math.inf),
        verdict=verdict,
        metric=arm.metric,
    )


def _within(spread: Moments, metric: Metric, least: float) -> Moments:
    """Return the moments with their t interval cut to possible values: a fraction of the test samples is in [0, 1].

    Args:
        least: the lower end: 0 for a fraction, -1 for a difference of two.
    """
    if not metric.in_percent or spread.t is None:
        return spread
    return replace(spread, t=(max(least, spread.t[0]), min(1.0, spread.t[1])))


def verdict_of(differences: Moments, p: float | None) -> Verdict:
    """Return the verdict on paired differences, method minus baseline, with the corrected p of their t-test."""
    mean = differences.mean
    if mean is None:
        return Verdict.NO_PAIRS
    if differences.n < MIN_PAIRS:
        return Verdict.TOO_FEW
    if not differences.std:
        return Verdict.SAME if abs(mean) < NO_SPREAD else Verdict.SHIFTED
    if p is None or not p < ALPHA:
        return Verdict.NOT_SEEN
    return Verdict.LOWER if mean < 0 else Verdict.HIGHER


def _view(name: str, arms: Sequence[Arm], reference: Arm | None) -> View:
    """Return every arm's error at the largest budget by which all finished runs had been evaluated."""
    finished = [(arm, row) for arm in arms for row in arm.runs if row["status"] == "finished"]
    budget = views.common_budget([row for _, row in finished], name)
    if isinstance(budget, views.Missing):
        apart = (finished[budget.ended], finished[budget.begun]) if budget.kind == "apart" else ()
        runs = tuple((arm.label, int(row["config"]["seed"])) for arm, row in apart)
        return View(name, None, tuple(arms), budget.kind, runs)
    read = []
    for arm in arms:
        found = {row["config"]["seed"]: views.error_at(row, budget, name) for each, row in finished if each is arm}
        errors = {seed: error for seed, error in found.items() if error is not None}
        read.append(replace(arm, errors=errors, moments=_moments(errors.values(), arm.metric), paired=None))
    matched = read[arms.index(reference)] if reference is not None else None
    return View(name, budget, _compare(read, matched))
