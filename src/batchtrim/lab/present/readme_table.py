"""The README's table, one row per problem, written between two marks so that a command can rewrite it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batchtrim.lab.analyse.claims import EvidenceRecord
from batchtrim.lab.analyse.comparison import Arm, Group
from batchtrim.lab.files import write_whole, writing
from batchtrim.lab.present import formats, tables

BEGIN, END = "<!-- results -->", "<!-- /results -->"
METHODS = ("random", "full_equal_compute", "trim", "loss_mass", "loss_mass_kept")
"""Methods with a column, besides plain training."""
FEWEST = 3  # seeds


def write(records: Sequence[EvidenceRecord], page: Path) -> None:
    """Replace the text between the marks of a page by the table.

    Raises:
        ValueError: the page lacks the marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"expected {BEGIN} and {END} around the table in {page}, got a page without them.")
    whole = f"{before}{BEGIN}\n\n{table(records)}\n\n{END}{after}"
    with writing(page, "The page is unchanged. Pass a writable one: --table PAGE."):
        write_whole(page, lambda file: file.write(whole.encode()))


def table(records: Sequence[EvidenceRecord]) -> str:
    """Return a row for every problem with runs of plain and trimmed training on at least three seeds.

    If a problem is in several records, the last one counts, and one with missing runs only if there is no other. A
    method that the last one lacks comes from the one before. Rows are ordered by plain training's error.
    Cells: plain training's error, mean ± standard deviation in percent; then differences from plain training in the
    same record, in points, with the 95 % interval, the share of backward samples, and the number of seeds if it is not
    the row's.
    """
    problems: dict[str, list[_Plain]] = {}
    for record in sorted(records, key=lambda record: (not record.partial, str(record.folder)), reverse=True):
        for group in record.groups:
            plain = _plain(group)
            if plain and any(_differences(plain, name) for name in ("trim", "loss_mass")):
                problems.setdefault(_title(group), []).append(plain)
    heads = ["problem", "seeds", "`full`, error %", *(f"`{name}`, points" for name in METHODS)]
    rows = sorted(_row(title, found) for title, found in problems.items())
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(row for _, row in rows)])


def _title(group: Group) -> str:
    size = group.settings.get("train_size")
    return group.title + (f", {size:,} images" if size else "")


@dataclass(frozen=True)
class _Plain:
    """Plain training in a group: its arm and its mean error."""

    group: Group
    arm: Arm
    error: float


def _plain(group: Group) -> _Plain | None:
    """Return plain training; None if it has too few seeds."""
    for arm in group.arms:
        if arm.label == "full" and arm.moments.mean is not None and arm.moments.n >= FEWEST:
            return _Plain(group, arm, arm.moments.mean)
    return None


def _row(title: str, found: Sequence[_Plain]) -> tuple[float, str]:
    """Return plain training's error and the row, from a problem's groups, of which the first counts most."""
    error, moments = found[0].error, found[0].arm.moments
    cells = [tables.cell(title), str(moments.n), f"{formats.percent(error)} ± {formats.percent(moments.std)}"]
    cells += [next(filter(None, (_differences(each, name, moments.n) for each in found)), "") for name in METHODS]
    return error, f"| {' | '.join(cells)} |"


def _differences(plain: _Plain, method: str, seeds: int = 0) -> str:
    arms = tables.by_method(arm for arm in plain.group.arms if arm.settings.get("engine", "exact") == "exact")
    return tables.of_arms(arms.get(method, ()), functools.partial(_cell, plain=plain.arm, seeds=seeds))


def _cell(arm: Arm, plain: Arm, seeds: int) -> str:
    if arm.paired is None or arm.paired.moments.n < FEWEST:
        return ""
    moments = arm.paired.moments
    parts = [formats.signed_interval(moments.t)]
    used, of = arm.cost.get("samples_backward"), plain.cost.get("samples_backward")
    if used and of:
        parts.append(f"{100 * used / of:.0f} %")
    if moments.n != seeds:
        parts.append(f"{moments.n} seeds")
    return f"{formats.signed(moments.mean)} ({'; '.join(parts)})"
