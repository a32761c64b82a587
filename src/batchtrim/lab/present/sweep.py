"""A sweep over schedules and ends: its headline, and a grid for each method with the best cell marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchtrim.lab.analyse.comparison import Arm, Group
from batchtrim.lab.present import formats, tables, wording

LEAST = 4  # cells; with fewer, the table of methods is enough


@dataclass(frozen=True)
class GridCell:
    """The arm of a schedule and a final keep fraction; ``best`` marks those with the best mean."""

    main: str
    small: str
    colour: str
    best: bool


@dataclass(frozen=True)
class Grid:
    """A method's arms: schedules as rows, final keep fractions as columns. ``said``: a line on the best."""

    method: str
    ends: tuple[str, ...]
    rows: tuple[tuple[str, tuple[GridCell | None, ...]], ...]
    said: str


def grids(group: Group) -> list[Grid]:
    """Return a grid for each method that was run with several schedules and ends; none for other comparisons."""
    scheduled = [
        arm
        for arm in group.arms
        if arm.settings.get("schedule") is not None and arm.settings.get("keep_end") is not None
    ]
    return [grid for name, arms in tables.by_method(scheduled).items() if (grid := _grid(name, arms)) is not None]


def _grid(method: str, arms: Sequence[Arm]) -> Grid | None:
    cells = {(arm.settings["schedule"], arm.settings["keep_end"]): arm for arm in arms}
    schedules = list(dict.fromkeys(schedule for schedule, _ in cells))
    ends = sorted({end for _, end in cells})
    if len(cells) < LEAST or len(cells) < len(arms) or min(len(schedules), len(ends)) < 2:
        return None
    best = wording.best_of(arms)
    return Grid(
        method,
        tuple(f"{end:g}" for end in ends),
        tuple((schedule, tuple(_cell(cells.get((schedule, end)), best) for end in ends)) for schedule in schedules),
        _best_said(best, len(cells)),
    )


def _cell(arm: Arm | None, best: Sequence[Arm]) -> GridCell | None:
    if arm is None:
        return None
    colour = wording.colour(arm.paired) if arm.paired else ""
    return GridCell(formats.error(arm), formats.difference(arm.paired), colour, arm in best)


def _best_said(best: Sequence[Arm], of: int) -> str:
    """Return a sentence on the best of several arms, with a warning about picking it."""
    if not best:
        return "No run finished."
    arm, metric = best[0], best[0].metric
    if len(best) > 1:
        return f"{len(best)} of {of} share the best mean of {metric.title}."
    against = f", {formats.difference(arm.paired)}{metric.unit} against the baseline" if arm.paired else ""
    lost = f", over the {len(arm.errors)} of {len(arm.runs)} runs that did not diverge" if arm.diverged else ""
    return (
        f"Best: {wording.place(arm)}, {metric.title} {formats.error(arm)}{against}{lost}. Picked out of {of} on the "
        "test set, so it looks better than it is: confirm it on fresh seeds."
    )
