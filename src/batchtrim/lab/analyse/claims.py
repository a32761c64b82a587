"""Judge claims written down beside their runs: supported, not supported, or not decidable.

A folder of records holds ``runs.jsonl`` and ``claims.toml``, best written before the runs are done::

    title = "Digits, every method"
    note = "What a reader should know."
    effect = 0.2                     # the smallest difference of interest, in points of test error
    partial = true                   # only while runs are missing: claims without runs are then not decidable

    [[claim]]
    text = "Trimming lowers the final test error."
    method = "trim"                  # a list gives one finding for each
    against = "full"
    says = "lower"                   # or "higher", "same", or "not worse"

    [[claim]]
    text = "Loss mass costs no error, at half the backward samples or less."
    method = "loss_mass"
    against = "full"
    says = "not worse"
    margin = 0.3                     # points, at most; fixed before the first run
    backward = 50                    # optional: at most this percentage of the other's backward samples
    time = 80                        # optional: at most this percentage of the other's training time

Training times are valid only if nothing else ran on the machine. ``alone.jsonl`` holds such runs, of one seed or more,
with the same settings, done one after another; their times then replace those of ``runs.jsonl``. A claim with a limit
on time is not decidable without them.

A claim may also name any setting of a run or parameter of a method. It picks one of several arms of the method
(``keep_end = 0.5``, ``engine = "shared"``), or limits the claim to some groups (``optimizer = "sgd"``). With
``against_`` in front, it picks the arm of the other side. A claim is judged, paired by seed, in every group of runs
that share all settings but method and seed; p-values are Holm-corrected over the findings of a group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from batchtrim._checks import check_choice, check_positive, describe, nearest
from batchtrim.lab import records
from batchtrim.lab.analyse import comparison, inference
from batchtrim.lab.analyse.comparison import Arm, Group
from batchtrim.lab.analyse.inference import Moments
from batchtrim.lab.files import load_toml
from batchtrim.lab.methods.table import METHODS
from batchtrim.lab.metric import ERROR
from batchtrim.lab.run.config import ARM_SETTINGS, SETTINGS, without_places
from batchtrim.lab.run.settings import Role

__all__ = ["ALONE", "Claim", "EvidenceRecord", "Finding", "Status", "judge", "read"]

ALONE = "alone.jsonl"
"""The file of a record whose runs had the machine to themselves."""
SAYS = ("lower", "higher", "same", "not worse")
_KEYS = ("text", "method", "against", "says")
_LIMITS = ("margin", "backward", "time")


class Status(Enum):
    """The status of a claim, judged from the runs."""

    SUPPORTED = "supported"
    NOT_SUPPORTED = "not supported"
    NOT_DECIDABLE = "not decidable"


@dataclass(frozen=True)
class Claim:
    """A claim: ``method`` has a lower, higher, the same or no worse test error than ``against``.

    Attributes:
        margin: how much higher the error may be and still count as "not worse", in [0, 1]; only for such claims.
        backward: the largest share of the other's backward samples that it may use; None if unlimited.
        time: the largest share of the other's training time that it may take; None if unlimited.
        settings: of the arm of ``method``.
        against_settings: of the other.
        shared: of the groups it applies to.
    """

    text: str
    method: str
    against: str
    says: str
    margin: float | None = None
    backward: float | None = None
    time: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    against_settings: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """A claim judged in one group of runs.

    Attributes:
        difference: of test errors in [0, 1], method minus the other, over the pairs.
        diverged: seeds without a pair, because a run of either side diverged.
        p: paired t-test, Holm-corrected; for "not worse", of the differences minus the margin.
        backward: backward samples divided by the other's, means of the finished runs; None if unknown.
        time: training time divided by the other's, both with nothing else running; None if unknown.
        detectable: the smallest difference that the design could have detected, with 80 % power at the 0.05 level; None
            if unknown.
    """

    claim: Claim
    group: str
    status: Status
    difference: Moments
    diverged: tuple[int, ...]
    p: float | None
    detectable: float | None
    backward: float | None = None
    time: float | None = None


@dataclass(frozen=True)
class EvidenceRecord:
    """A record of evidence as read: title and note, the effect of interest in [0, 1], tables and findings.

    Attributes:
        timed: True if training times were taken with nothing else running. Arms without such a run have no times.
        partial: True if runs are still missing.
    """

    folder: Path
    title: str
    note: str
    effect: float
    groups: tuple[Group, ...]
    findings: tuple[Finding, ...]
    timed: bool = False
    partial: bool = False


def read(folder: str | Path) -> EvidenceRecord:
    """Judge the claims of a folder from its runs.

    Raises:
        ValueError, TypeError: claims.toml is not as described in this module. FileNotFoundError: a file is missing.
    """
    folder = Path(folder)
    title, note, effect, partial, claims = _load(folder / "claims.toml")
    groups = comparison.summarize(records.read_results(folder)).groups
    other = next((group.metric.name for group in groups if group.metric != ERROR), None)
    if other is not None:
        raise ValueError(
            f"expected claims on test errors, `effect` being in points, got runs compared by {other} in {folder}. "
            f"For a report on them, without claims: batchtrim report {folder}"
        )
    alone = folder / ALONE
    if alone.exists():
        groups = _timed(groups, alone)
    findings = [found for group in groups for found in _judge_group(claims, group, effect, alone.exists())]
    for claim in claims:
        if not any(found.claim == claim for found in findings):
            if partial and claim.method in METHODS and claim.against in METHODS:
                nothing = inference.moments([])
                findings.append(Finding(claim, "no runs yet", Status.NOT_DECIDABLE, nothing, (), None, None))
                continue
            there = dict.fromkeys(arm.label for group in groups for arm in group.arms)
            raise ValueError(
                f"expected a comparison of {claim.method!r} with {claim.against!r} in {folder}, got none that fits the "
                f"claim {claim.text!r}. There are runs of {', '.join(there)}."
                + "".join(nearest(name, METHODS) for name in (claim.method, claim.against) if name not in METHODS)
            )
    return EvidenceRecord(folder, title, note, effect, groups, tuple(findings), alone.exists(), partial)


def _timed(groups: Sequence[Group], file: Path) -> tuple[Group, ...]:
    """Return the groups with their training times replaced by those of the runs in a file."""
    alone = comparison.summarize(records.read_results(file)).groups
    times = [
        (without_places(group.settings), arm.settings, arm.cost["seconds"])
        for group in alone
        for arm in group.arms
        if "seconds" in arm.cost
    ]

    def timed(group: Group, arm: Arm) -> Arm:
        mine = without_places(group.settings), arm.settings
        found = [seconds for shared, settings, seconds in times if (shared, settings) == mine]
        cost = {name: value for name, value in arm.cost.items() if name != "seconds"}
        return replace(arm, cost=cost | ({"seconds": found[0]} if found else {}))

    return tuple(replace(group, arms=tuple(timed(group, arm) for arm in group.arms)) for group in groups)


def judge(says: str, difference: Moments, p: float | None, effect: float, margin: float = 0.0) -> Status:
    """Return the status of a claim.

    A claim is supported if the test finds a difference in the claimed direction. It is not supported if the test finds
    one in the other direction, or if the interval rules out a difference of ``effect`` in the claimed direction. "Same"
    is supported if the whole interval lies within ``effect`` of zero, and not supported if it lies outside. "Not worse"
    is supported if the test finds the difference below ``margin``, and not supported if the whole interval is above.
    """
    if difference.n < inference.MIN_PAIRS or difference.mean is None or difference.t is None:
        return Status.NOT_DECIDABLE
    low, high = difference.t
    if says == "same":
        if -effect <= low and high <= effect:
            return Status.SUPPORTED
        return Status.NOT_SUPPORTED if low > effect or high < -effect else Status.NOT_DECIDABLE
    if says == "not worse":
        # without a p-value the interval has no width: all differences are equal
        if high < margin and (p is None or p < inference.ALPHA):
            return Status.SUPPORTED
        return Status.NOT_SUPPORTED if low > margin else Status.NOT_DECIDABLE
    if says == "higher":
        low, high = -high, -low
    found = p is not None and p < inference.ALPHA
    if found and high < 0:
        return Status.SUPPORTED
    return Status.NOT_SUPPORTED if (found and low > 0) or low > -effect else Status.NOT_DECIDABLE


def _status(found: Finding, effect: float) -> Status:
    """Return the status from the errors, and from the limits on backward samples and time if the claim has them."""
    claim = found.claim
    status = judge(claim.says, found.difference, found.p, effect, claim.margin or 0.0)
    limits = [(used, most) for used, most in ((found.backward, claim.backward), (found.time, claim.time)) if most]
    if not limits or found.difference.n < inference.MIN_PAIRS:
        return status
    if any(used is not None and used > most for used, most in limits):
        return Status.NOT_SUPPORTED
    return Status.NOT_DECIDABLE if any(used is None for used, _ in limits) else status


_TOP = ("title", "note", "effect", "partial", "claim")


def _load(path: Path) -> tuple[str, str, float, bool, list[Claim]]:
    try:
        return _parsed(load_toml(path), path)
    except (ValueError, TypeError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{error} That is in {path}.") from error


def _parsed(values: Mapping[str, Any], path: Path) -> tuple[str, str, float, bool, list[Claim]]:
    strange = next((name for name in values if name not in _TOP), None)
    if strange is not None:
        raise ValueError(f"expected {', '.join(_TOP)} in {path}, got {strange!r}.{nearest(strange, _TOP)}")
    effect = check_positive("effect", values.get("effect"), "The smallest difference of interest, in points.") / 100
    tables = values.get("claim")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ValueError(
            f"expected `claim` to be tables, each under a line [[claim]], got {describe(tables)} in {path}."
        )
    claims = [claim for table in tables for claim in _claims(table, path)]
    partial = values.get("partial", False)
    if not isinstance(partial, bool):
        raise TypeError(f"expected `partial` to be true or false, got {describe(partial)} in {path}.")
    return str(values.get("title", path.parent.name)), str(values.get("note", "")), effect, partial, claims


def _claims(table: Mapping[str, Any], path: Path) -> list[Claim]:
    methods: Any = table.get("method")
    methods = methods if isinstance(methods, list) else [methods]
    known = (*_KEYS, *_LIMITS)
    strange = [key for key in table if key not in known and not all(_place(key, table, each) for each in methods)]
    missing = [name for name in _KEYS if name not in table]
    if strange or missing:
        what = f"{strange[0]!r} beside them" if strange else f"none called {missing[0]!r}"
        near = nearest(strange[0], [name for name in (*SETTINGS, *_KEYS) if name != strange[0]]) if strange else ""
        raise ValueError(
            f"expected a claim to have {', '.join(_KEYS)} and settings of runs, got {what} in {path}.{near}"
        )
    check_choice("says", table["says"], SAYS)
    if (table["says"] == "not worse") != ("margin" in table):
        raise ValueError(
            f"expected `margin`, in points, with a claim that says 'not worse' and with no other, got "
            f"{describe(table.get('margin'))} with {table['says']!r} in {path}."
        )
    for name in _LIMITS:
        if name in table:
            check_positive(name, table[name], "In points." if name == "margin" else "In percent.")
    if not methods:
        raise ValueError(f"expected at least one `method` in a claim, got an empty list in {path}.")
    for method in (*methods, table["against"]):
        if not isinstance(method, str):
            raise TypeError(f"expected the methods of a claim to be names, got {describe(method)} in {path}.")
    if len(set(methods)) < len(methods):  # p-values would be corrected for a finding too many
        raise ValueError(f"expected each `method` of a claim once, got {describe(methods)} in {path}.")
    return [_claim(table, method) for method in methods]


def _claim(table: Mapping[str, Any], method: str) -> Claim:
    """Return the claim about one method, with its settings assigned to arm, other arm and group."""
    picked: dict[str, dict[str, Any]] = {"settings": {}, "against_settings": {}, "shared": {}}
    for key, value in table.items():
        if place := _place(key, table, method):
            picked[place][key.removeprefix("against_")] = value
    limits = {name: table[name] / 100 for name in _LIMITS if name in table}
    claim = Claim(table["text"], method, table["against"], table["says"], **limits)
    return replace(claim, **picked)


def _place(key: str, table: Mapping[str, Any], method: object) -> str:
    """Return which settings of a :class:`Claim` a key belongs to; "" if none."""
    name = key.removeprefix("against_")
    place, owner = ("settings", method) if name == key else ("against_settings", table.get("against"))
    if name in ARM_SETTINGS[1:] or name in _parameters(owner):
        return place
    return "shared" if key in SETTINGS and SETTINGS[key].role in (Role.GROUP, Role.DATA) else ""


def _parameters(method: object) -> tuple[str, ...]:
    return tuple(METHODS[method].params) if isinstance(method, str) and method in METHODS else ()


def _judge_group(claims: Sequence[Claim], group: Group, effect: float, timed: bool) -> list[Finding]:
    found = []
    for claim in claims:
        if any(group.settings.get(name) != value for name, value in claim.shared.items()):
            continue
        mine = _arm(group, claim, claim.method, claim.settings, "")
        other = _arm(group, claim, claim.against, claim.against_settings, "against_")
        if mine is None or other is None:
            continue
        if mine is other:
            raise ValueError(f"expected two arms for the claim {claim.text!r}, got {mine.label!r} on both sides.")
        values = [mine.errors[seed] - other.errors[seed] for seed in mine.errors if seed in other.errors]
        spread = inference.moments(values)
        margin = claim.margin or 0.0
        p, seen = inference.paired_t([value - margin for value in values]), inference.detectable(spread)
        diverged = tuple(sorted({*mine.diverged, *other.diverged}))
        spent = _ratio(mine, other, "samples_backward"), _ratio(mine, other, "seconds") if timed else None
        found.append(Finding(claim, group.title, Status.NOT_DECIDABLE, spread, diverged, p, seen, *spent))
    corrected = inference.holm([each.p for each in found])
    tested = [replace(each, p=p) for each, p in zip(found, corrected, strict=True)]
    return [replace(each, status=_status(each, effect)) for each in tested]


def _ratio(mine: Arm, other: Arm, cost: str) -> float | None:
    """Return a cost divided by the other's."""
    spent, full = (arm.cost.get(cost) for arm in (mine, other))
    return spent / full if spent is not None and full else None


def _arm(group: Group, claim: Claim, method: str, chosen: Mapping[str, Any], prefix: str) -> Arm | None:
    """Return the single arm of a method with the given settings; None if this group has none."""
    arms = [
        arm
        for arm in group.arms
        if arm.settings["method"] == method and all(value == _value(arm, name) for name, value in chosen.items())
    ]
    if len(arms) > 1:
        names = [name for name in (*ARM_SETTINGS, *_parameters(method)) if name not in ("method", "method_params")]
        telling = next(name for name in names if any(_value(arm, name) != _value(arms[0], name) for arm in arms))
        raise ValueError(
            f"expected the claim {claim.text!r} to name one arm of {method!r}, got {len(arms)} in {group.title}: "
            f"{'; '.join(arm.label for arm in arms)}. "
            f"Tell them apart, as in: {prefix}{telling} = {json.dumps(_value(arms[0], telling))}"
        )
    return arms[0] if arms else None


def _value(arm: Arm, name: str) -> Any:
    """Return a setting of an arm, or a parameter of its method."""
    return arm.settings[name] if name in arm.settings else (arm.settings["method_params"] or {}).get(name)
