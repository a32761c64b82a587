"""Claims written down beside their runs, and what the runs say of each: supported, not supported, or not decidable.

A folder of records holds ``runs.jsonl`` and ``claims.toml``, best written before the runs are done::

    title = "Digits, every method"
    note = "What a reader has to know."
    effect = 0.2                     # the smallest difference of interest, in points of test error

    [[claim]]
    text = "Trimming lowers the final test error."
    method = "trim"                  # a list makes one finding of each
    against = "full"
    says = "lower"                   # or "higher", or "same"

``engine`` and ``against_engine`` tell arms of one method apart. A claim is read in every group of runs that share all
settings but method and seed, paired by seed; p-values are Holm-corrected over the findings of a group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchtrim._checks import check_choice, check_positive, describe
from batchtrim.lab import records
from batchtrim.lab.analyse import comparison, inference
from batchtrim.lab.analyse.comparison import Arm, Group
from batchtrim.lab.analyse.inference import Moments
from batchtrim.lab.files import load_toml
from batchtrim.lab.present import tables, wording

__all__ = ["Claim", "Finding", "Record", "page", "read"]

SAYS = ("lower", "higher", "same")
SUPPORTED, NOT_SUPPORTED, NOT_DECIDABLE = "supported", "not supported", "not decidable"
_INTRODUCTION = """\
# Results

Each claim below was written into the `claims.toml` of its record together with the difference that matters, and is
judged from the runs beside it, paired by seed.

* *Supported*: the difference claimed is there (paired t-test, p < 0.05 after Holm's correction over the claims).
* *Not supported*: it is there the other way round, or the 95 % interval rules out a difference
  of the size that matters.
* *Not decidable*: neither, with this many seeds. The smallest difference that the design could have seen (with 80 %
  power) stands beside it.

Made by `batchtrim claims records --out docs/results.md`.
"""
_KEYS = ("text", "method", "against", "says", "engine", "against_engine")


@dataclass(frozen=True)
class Claim:
    """That ``method`` has a lower, higher or the same test error as ``against``; see the module for the rest."""

    text: str
    method: str
    against: str
    says: str
    engine: str | None = None
    against_engine: str | None = None


@dataclass(frozen=True)
class Finding:
    """What the pairs of one group say of a claim.

    Attributes:
        status: supported, not supported or not decidable. ``difference``: of test errors in [0, 1], method minus the
            other, over the pairs. ``p``: paired t-test, Holm-corrected. ``detectable``: the smallest difference the
            design could have seen, with 80 % power at the 0.05 level; None where that cannot be said.
    """

    claim: Claim
    group: str
    status: str
    difference: Moments
    p: float | None
    detectable: float | None


@dataclass(frozen=True)
class Record:
    """A folder of records, read: its title and note, the effect of interest in [0, 1], tables and findings."""

    folder: Path
    title: str
    note: str
    effect: float
    groups: tuple[Group, ...]
    findings: tuple[Finding, ...]


def read(folder: str | Path) -> Record:
    """Judge the claims of a folder from its runs.

    Raises:
        ValueError, TypeError: claims.toml is not what the module says. FileNotFoundError: a file is missing.
    """
    folder = Path(folder)
    title, note, effect, claims = _load(folder / "claims.toml")
    groups = comparison.summarize(records.read(folder)).groups
    findings = [found for group in groups for found in _judge_group(claims, group, effect)]
    for claim in claims:
        if not any(found.claim == claim for found in findings):
            raise ValueError(
                f"expected runs of {claim.method!r} and {claim.against!r} in {folder}, got none of one of them for "
                f"the claim {claim.text!r}."
            )
    return Record(folder, title, note, effect, groups, tuple(findings))


def judge(says: str, difference: Moments, p: float | None, effect: float) -> str:
    """The status of a claim.

    Supported is a difference in the direction claimed that the test finds; not supported is one the other way, or an
    interval that rules out a difference of ``effect`` in the direction claimed. "Same" is supported where the whole
    interval lies within ``effect`` of zero, and not where it lies outside.
    """
    if difference.n < inference.MIN_PAIRS or difference.mean is None or difference.t is None:
        return NOT_DECIDABLE
    low, high = difference.t
    if says == "same":
        if -effect <= low and high <= effect:
            return SUPPORTED
        return NOT_SUPPORTED if low > effect or high < -effect else NOT_DECIDABLE
    if says == "higher":
        low, high = -high, -low
    found = p is not None and p < inference.ALPHA
    if found and high < 0:
        return SUPPORTED
    return NOT_SUPPORTED if (found and low > 0) or low > -effect else NOT_DECIDABLE


def page(folders: Sequence[str | Path]) -> str:
    """A Markdown page on all records: the claims first, then each record's tables."""
    found = [read(folder) for folder in folders]
    lines = [_INTRODUCTION]
    for record in found:
        name = record.folder.name
        topic = re.sub(r"^\d{4}-\d\d-\d\d-", "", name)  # a record is named by its date first
        lines += [f"## {record.title}", ""]
        matters = f"`records/{name}`; a difference of {inference.points(record.effect)} points matters here."
        lines += [f"{matters} {record.note}".rstrip()]
        lines += ["", *_findings_table(record), ""]
        for group in record.groups:
            lines += [f"### {group.title} ({topic})", "", *tables.markdown_table(group, group.arms), ""]
        lines += [wording.LEGEND, ""]
    return "\n".join(lines).rstrip() + "\n"


def _findings_table(record: Record) -> list[str]:
    several = len(record.groups) > 1
    heads = ["status", "claim", *(["where"] if several else []), "seeds", "difference, points (95 % interval)", "p"]
    heads += ["could have seen"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for found in record.findings:
        cells = [f"**{found.status}**", _claim_words(found.claim), *([tables.cell(found.group)] if several else [])]
        cells += [str(found.difference.n)]
        cells += [f"{wording.signed(found.difference.mean)} ({wording.signed_interval(found.difference.t)})"]
        cells += [wording.p_value(found.p), wording.percent(found.detectable)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _claim_words(claim: Claim) -> str:
    arms = [f"`{claim.method}`", f"`{claim.against}`"]
    for place, engine in enumerate((claim.engine, claim.against_engine)):
        arms[place] += f" (engine {engine})" if engine else ""
    return f"{tables.cell(claim.text)} {arms[0]} against {arms[1]}: {claim.says}"


def _load(path: Path) -> tuple[str, str, float, list[Claim]]:
    values = load_toml(path)
    effect = check_positive("effect", values.get("effect"), "The smallest difference of interest, in points.") / 100
    tables = values.get("claim")
    if not isinstance(tables, list) or not tables:
        raise ValueError(
            f"expected `claim` to be tables, each under a line [[claim]], got {describe(tables)} in {path}."
        )
    claims = [claim for table in tables for claim in _claims(table, path)]
    return str(values.get("title", path.parent.name)), str(values.get("note", "")), effect, claims


def _claims(table: Mapping[str, Any], path: Path) -> list[Claim]:
    strange = [name for name in table if name not in _KEYS]
    missing = [name for name in _KEYS[:4] if name not in table]
    if strange or missing:
        what = f"{strange[0]!r} beside them" if strange else f"none called {missing[0]!r}"
        raise ValueError(
            f"expected a claim to have {', '.join(_KEYS[:4])} (and engine, against_engine), got {what} in {path}."
        )
    check_choice("says", table["says"], SAYS)
    methods = table["method"] if isinstance(table["method"], list) else [table["method"]]
    return [Claim(**{**table, "method": method}) for method in methods]


def _judge_group(claims: Sequence[Claim], group: Group, effect: float) -> list[Finding]:
    found = []
    for claim in claims:
        mine, other = _arm(group, claim.method, claim.engine), _arm(group, claim.against, claim.against_engine)
        if mine is None or other is None:
            continue
        values = [mine.errors[seed] - other.errors[seed] for seed in mine.errors if seed in other.errors]
        spread = inference.moments(values)
        found.append(
            Finding(claim, group.title, NOT_DECIDABLE, spread, inference.paired_t(values), inference.detectable(spread))
        )
    corrected = inference.holm([each.p for each in found])
    return [
        replace(each, p=p, status=judge(each.claim.says, each.difference, p, effect))
        for each, p in zip(found, corrected, strict=True)
    ]


def _arm(group: Group, method: str, engine: str | None) -> Arm | None:
    for arm in group.arms:
        if arm.settings["method"] == method and engine in (None, arm.settings.get("engine")):
            return arm
    return None
