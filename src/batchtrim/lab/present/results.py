"""The page of results in Markdown: the claims of every record, judged from its runs, then its tables.

Its drawings are written to a folder beside it, one per problem: test error against backward samples, and against
training time if that was measured with nothing else running.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchtrim.lab.analyse.claims import EvidenceRecord, Finding
from batchtrim.lab.analyse.comparison import Arm, Group
from batchtrim.lab.files import write_whole, writing
from batchtrim.lab.present import charts, formats, svg, tables, wording

DRAWINGS = "drawings/results"
LONGEST_NAME = 120
GAINS = ("trim", "loss_mass", "ordered_sgd")
"""Methods whose gain is shown with its interval beside the training error of plain training."""
SEVERAL = 3
"""How many problems any other method needs for its gain to be shown."""


@dataclass(frozen=True)
class _Axis:
    cost: str
    words: str
    those: str
    suffix: str


_AXES = (_Axis("samples_backward", "backward samples", "those", ""), _Axis("seconds", "training time", "that", "-time"))

_INTRODUCTION = """\
# Results

The `claims.toml` of each record states its claims and the smallest difference of interest. Each claim is judged from
the runs in the same folder, paired by seed.

* *Supported*: the test finds the claimed difference (paired t-test, p < 0.05 after Holm's correction over the claims).
* *Not supported*: the test finds a difference in the other direction, or the 95 % interval excludes a difference as
  large as the smallest of interest.
* *Not worse* by a margin, which was fixed before the runs: supported if the same test finds the difference below the
  margin. A claim that also limits the backward samples or the training time is not supported if more were used.
* *Not decidable*: neither, with this many seeds. The table shows the smallest difference that could have been detected
  with 80 % power.

Made by `batchtrim claims`.
"""


def write(records: Sequence[EvidenceRecord], out: Path) -> None:
    """Write the page, and its drawings into a folder beside it."""
    files = {out: page(records)} | {out.parent / DRAWINGS / name: each for name, each in drawings(records).items()}
    for path, text in files.items():
        with writing(path, "The records are unchanged. Pass a writable page: --out PAGE."):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file, text=text: file.write(text.encode()))


def page(records: Sequence[EvidenceRecord]) -> str:
    """Return a Markdown page on all records: for each, the claims and then the tables."""
    names = _drawing_names(records)
    lines = [_INTRODUCTION, f"*Tables of methods.* {wording.LEGEND}", "", *_gains(records)]
    for record in records:
        folder, topic = record.folder.resolve(), _topic(record)
        lines += [f"## {record.title}", ""]
        said = f"`{folder.parent.name}/{folder.name}`. The smallest difference of interest is "
        lines += [f"{said}{formats.points(record.effect)} points. {record.note}".rstrip()]
        lines += ["", *_findings_table(record), ""]
        for group in record.groups:
            lines += [f"### {tables.cell(group.title)} ({topic})", "", *tables.markdown_table(group, group.arms), ""]
            for axis in _AXES:
                if name := names.get((id(group), axis.cost)):
                    lines += [f"![Test error against {axis.words}, {tables.cell(group.title)}]({DRAWINGS}/{name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _share(share: float, limit: float) -> str:
    """Return a share in percent, with as many decimals as tell it from a limit that it exceeds."""
    exact = (digits for digits in range(4) if share <= limit or round(share, 2 + digits) > limit)
    return f"{share:.{next(exact, 4)}%}"


def _topic(record: EvidenceRecord) -> str:
    return re.sub(r"^\d{4}-\d\d-\d\d-", "", record.folder.name)  # a record's name starts with its date


def _drawing_name(record: EvidenceRecord, group: Group, axis: _Axis) -> str:
    """Return the file name of a group's drawing; "" if there is too little to draw."""
    if len(_drawn(group, axis)) < 3 or (axis.cost == "seconds" and not record.timed):
        return ""
    title = re.sub(r"[^a-z0-9]+", "-", group.title.lower()).strip("-")
    if len(title) > LONGEST_NAME:  # a path; file systems allow 255 bytes
        title = f"{title[:LONGEST_NAME]}-{hashlib.sha256(group.title.encode()).hexdigest()[:8]}"
    return f"{_topic(record)}-{title}{axis.suffix}.svg"


def _drawing_names(records: Sequence[EvidenceRecord]) -> dict[tuple[int, str], str]:
    """Return a file name for each drawing, by the group's identity and the cost; equal ones get a number."""
    names: dict[tuple[int, str], str] = {}
    taken: Counter[str] = Counter()
    for record in records:
        for group, axis in itertools.product(record.groups, _AXES):
            if name := _drawing_name(record, group, axis):
                taken[name] += 1
                number = f"-{taken[name]}" if taken[name] > 1 else ""
                names[id(group), axis.cost] = f"{name.removesuffix('.svg')}{number}.svg"
    return names


def _drawn(group: Group, axis: _Axis) -> list[Arm]:
    return [arm for arm in group.arms if arm.cost.get(axis.cost) and arm.moments.mean is not None]


def drawings(records: Sequence[EvidenceRecord]) -> dict[str, str]:
    """Return the page's drawings, SVG by file name."""
    css = "\n".join(_css())
    found, names = {}, _drawing_names(records)
    for record in records:
        for group, axis in itertools.product(record.groups, _AXES):
            if name := names.get((id(group), axis.cost)):
                found[name] = str(_drawing(group, axis)).replace(">", f"><style>\n{css}\n</style>", 1) + "\n"
    return found


def _drawing(group: Group, axis: _Axis) -> str:
    arms = _drawn(group, axis)
    most = next((arm for arm in arms if arm is group.reference), max(arms, key=lambda arm: arm.cost[axis.cost]))
    full = most.cost[axis.cost]
    points = [
        charts.Point(
            arm.label, 0 if arm is group.reference else 1 + place % svg.COLOURS, arm.cost[axis.cost] / full,
            arm.moments.mean or 0.0, arm.moments.t,
        )
        for place, arm in enumerate(arms)
    ]  # fmt: skip
    return charts.scatter(
        points, x_label=f"{axis.words}, of {axis.those} of {most.label}", y_label="test error %",
        x_fmt=lambda x: f"{x:.0%}", fmt=lambda y: f"{100 * y:.3g}",
        title=f"Test error against {axis.words}: {group.title}",
    )  # fmt: skip


def _css() -> list[str]:
    """Return the lines of the page's style sheet that charts use, for a separate drawing."""
    lines = (Path(__file__).parent / "page.css").read_text(encoding="utf-8").splitlines()
    end = lines.index("* { box-sizing: border-box; }")
    font = 'svg { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }'
    return [*lines[:end], font, *(line for line in lines[end:] if line.startswith((".s0", ".s5", "svg")))]


def _gains(records: Sequence[EvidenceRecord]) -> list[str]:
    """Return two tables of each method's gain; problems are ordered by plain training's training error."""
    problems = []
    for record in records:
        for group in record.groups:
            full = next((arm for arm in group.arms if arm.label == "full"), None)
            left = [error for error in map(_training_error, full.runs) if error is not None] if full else []
            if left and (others := tables.by_method(_compared(group))):
                mean = sum(left) / len(left)
                problem = [f"{tables.cell(group.title)} ({_topic(record)})", str(len(left)), formats.percent(mean)]
                problems.append((mean, problem, others))
    problems.sort(key=lambda each: each[:2])
    counts = Counter(name for *_, others in problems for name in others)
    further = sorted(name for name, count in counts.items() if count >= SEVERAL and name not in GAINS)
    if not any(counts[name] for name in GAINS):
        return []
    lines = [
        "## When does trimming help?", "",
        "Difference in test error from plain training, in points (95 % interval); below zero is better. Problems are "
        "ordered by the training error at the end of plain training, measured with augmentation in training mode.", "",
        *_table_of_gains(problems, GAINS, _gain), "",
    ]  # fmt: skip
    if further:
        lines += [
            f"Other methods, where {SEVERAL} problems or more have them; **bold** if the 95 % interval excludes 0:",
            "",
        ]
        lines += [*_table_of_gains(problems, further, _short_gain), ""]
    return lines


def _compared(group: Group) -> list[Arm]:
    """Return the arms of a group that another method than plain training made, with the exact engine."""
    return [arm for arm in group.arms if arm.settings.get("engine") == "exact" and arm.paired is not None]


def _table_of_gains(
    problems: Sequence[tuple[float, list[str], Mapping[str, list[Arm]]]],
    names: Sequence[str],
    show: Callable[[Arm], str],
) -> list[str]:
    heads = ["problem", "seeds", "training error of plain training, %", *(f"`{name}`" for name in names)]
    rows = [
        [*problem, *(tables.of_arms(others.get(name, ()), show) or formats.UNKNOWN for name in names)]
        for _, problem, others in problems
        if any(name in others for name in names)
    ]
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(cells)} |" for cells in rows)]


def _training_error(row: Mapping[str, Any]) -> float | None:
    curve = (row.get("curve") or {}).get("train_error") or []
    return curve[-1] if row["status"] == "finished" and curve else None


def _gain(arm: Arm) -> str:
    if arm.paired is None or arm.paired.moments.mean is None:
        return ""
    return f"{formats.signed(arm.paired.moments.mean)} ({formats.signed_interval(arm.paired.moments.t)})"


def _short_gain(arm: Arm) -> str:
    if arm.paired is None or arm.paired.moments.mean is None:
        return ""
    said, interval = formats.signed(arm.paired.moments.mean), arm.paired.moments.t
    return f"**{said}**" if interval is not None and (interval[0] > 0 or interval[1] < 0) else said


def _findings_table(record: EvidenceRecord) -> list[str]:
    several = len(record.groups) > 1
    heads = ["status", "claim", *(["where"] if several else []), "seeds", "difference, points (95 % interval)", "p"]
    heads += ["detectable"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for found in record.findings:
        said = f"{tables.cell(found.claim.text)} {wording.claim(found.claim)}"
        used = ((found.claim.backward, found.backward), (found.claim.time, found.time))
        shares = " and ".join(_share(share, limit) for limit, share in used if limit is not None and share is not None)
        said += f" (it used {shares})" if shares else ""
        cells = [f"**{found.status.value}**", said, *([tables.cell(found.group)] if several else [])]
        cells += [_seeds(found)]
        cells += [f"{formats.signed(found.difference.mean)} ({formats.signed_interval(found.difference.t)})"]
        cells += [formats.p_value(found.p), formats.percent(found.detectable)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _seeds(found: Finding) -> str:
    """Return the number of pairs, and the number missing because a run diverged."""
    lost = f" ({len(found.diverged)} diverged)" if found.diverged else ""
    return f"{found.difference.n}{lost}"
