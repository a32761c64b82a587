"""The README's table, one row per problem, written between two marks so that a command can rewrite it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from batchtrim.lab.analyse.claims import EvidenceRecord
from batchtrim.lab.analyse.comparison import Arm, Group
from batchtrim.lab.files import write_whole, writing
from batchtrim.lab.present import tables, wording

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

    If a problem is in several records, the last one counts, and one with missing runs only if there is no other. Rows
    are ordered by plain training's error.
    Cells: plain training's error, mean ± standard deviation in percent; then differences from it in points, with the
    95 % interval and the share of backward samples.
    """
    rows: dict[str, tuple[float, str]] = {}
    for record in sorted(records, key=lambda record: (not record.partial, str(record.folder))):
        rows |= {_title(group): row for group in record.groups if (row := _row(group)) is not None}
    heads = ["problem", "seeds", "`full`, error %", *(f"`{name}`, points" for name in METHODS)]
    return "\n".join(
        [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(row for _, row in sorted(rows.values()))]
    )


def _title(group: Group) -> str:
    size = group.settings.get("train_size")
    return group.title + (f", {size:,} images" if size else "")


def _row(group: Group) -> tuple[float, str] | None:
    full = next((arm for arm in group.arms if arm.label == "full"), None)
    arms = tables.by_method(arm for arm in group.arms if arm.settings.get("engine", "exact") == "exact")
    if full is None or full.moments.mean is None or full.moments.n < FEWEST:
        return None
    if not any(_cell(arm, full) for name in ("trim", "loss_mass") for arm in arms.get(name, ())):
        return None
    error = f"{wording.percent(full.moments.mean)} ± {wording.percent(full.moments.std)}"
    cells = [tables.cell(_title(group)), str(full.moments.n), error]
    cells += [tables.of_arms(arms.get(name, ()), functools.partial(_cell, full=full)) for name in METHODS]
    return full.moments.mean, f"| {' | '.join(cells)} |"


def _cell(arm: Arm, full: Arm) -> str:
    if arm.paired is None or arm.paired.moments.n < FEWEST:
        return ""
    used, of = arm.cost.get("samples_backward"), full.cost.get("samples_backward")
    share = f"; {100 * used / of:.0f} %" if used and of else ""
    return f"{wording.signed(arm.paired.moments.mean)} ({wording.signed_interval(arm.paired.moments.t)}{share})"
