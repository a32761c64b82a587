"""The page of results: every record's claims with what the runs say of them, then its tables, in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from batchtrim.lab.analyse import claims
from batchtrim.lab.analyse.claims import Finding, Record
from batchtrim.lab.present import tables, wording

_INTRODUCTION = """\
# Results

Each claim below was written into the `claims.toml` of its record together with the difference that matters, and is
judged from the runs beside it, paired by seed.

* *Supported*: the difference claimed is there (paired t-test, p < 0.05 after Holm's correction over the claims).
* *Not supported*: it is there the other way round, or the 95 % interval rules out a difference
  of the size that matters.
* *Not worse* by a margin, which was fixed before the runs, is supported where the same test finds the difference
  below it. Where a claim says how many backward samples may be taken, more of them make it not supported.
* *Not decidable*: neither, with this many seeds. The smallest difference that the design could have seen (with 80 %
  power) stands beside it.

Made by `batchtrim claims records --out docs/results.md`.
"""


def page(folders: Sequence[str | Path]) -> str:
    """A Markdown page on all records: the claims first, then each record's tables."""
    lines = [_INTRODUCTION]
    for record in map(claims.read, folders):
        name = record.folder.name
        topic = re.sub(r"^\d{4}-\d\d-\d\d-", "", name)  # a record is named by its date first
        lines += [f"## {record.title}", ""]
        matters = f"`records/{name}`; a difference of {wording.points(record.effect)} points matters here."
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
        said = f"{tables.cell(found.claim.text)} {wording.claim(found.claim)}"
        if found.claim.backward is not None and found.backward is not None:
            said += f" (it took {found.backward:.0%})"
        cells = [f"**{found.status.value}**", said, *([tables.cell(found.group)] if several else [])]
        cells += [_seeds(found)]
        cells += [f"{wording.signed(found.difference.mean)} ({wording.signed_interval(found.difference.t)})"]
        cells += [wording.p_value(found.p), wording.percent(found.detectable)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _seeds(found: Finding) -> str:
    """How many pairs there are, and how many a diverged run has cost."""
    lost = f" ({len(found.diverged)} diverged)" if found.diverged else ""
    return f"{found.difference.n}{lost}"
