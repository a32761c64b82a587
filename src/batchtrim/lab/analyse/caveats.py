"""Reasons to trust a comparison less: missing pairs, unused seeds, programs that changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from batchtrim.lab.analyse.inference import MIN_PAIRS

if TYPE_CHECKING:
    from batchtrim.lab.analyse.comparison import Arm, Group

__all__ = ["Caveat", "Kind", "caveats"]

MIN_ALIKE = 3  # values equal to the last bit for this many seeds are no coincidence


class Kind(Enum):
    """The kind of a caveat."""

    ARM_LACKS = "arm lacks"
    """The arm has no finished run for seeds of the baseline."""
    BASELINE_LACKS = "baseline lacks"
    """The baseline has none for seeds of the arm."""
    ONE_SEED = "one seed"
    """The task seeded torch with one number for several seeds of the arm."""
    UNPAIRED = "unpaired"
    """The task seeded torch with other numbers than in the baseline's runs of the same seeds."""
    ALIKE = "alike"
    """Every seed of the arm gave the same value, to the last bit."""
    UNUSED = "unused"
    """The arm dropped samples, and yet every seed gave the baseline's value, to the last bit."""
    TWICE = "twice"
    """The arm gave the values and curves of another one, named in ``note``, and both count in the correction of p."""
    FEW = "few"
    """Fewer pairs than a verdict needs: of one arm of several, or of all that are compared."""
    SOURCES = "sources"
    """Several versions of the user's program, or of a module beside it, made the runs of the group."""
    NOTED = "noted"
    """A note made during the run, on its data, its schedule or the process."""


@dataclass(frozen=True)
class Caveat:
    """A reason to trust a comparison less.

    Attributes:
        arm: label of the arm; "" if it concerns the group.
        seeds: the seeds concerned.
        number: of pairs left, of versions, or the seed that was used.
        note: as recorded; for versions, the module, or "" for the program itself; the label of another arm.
    """

    kind: Kind
    arm: str
    seeds: tuple[int, ...]
    number: int
    note: str = ""


def caveats(group: Group) -> tuple[Caveat, ...]:
    """Return the caveats on the group's verdict."""
    found = (_few, _missing_pairs, _seeds, _unpaired, _unused, _twice, _sources, _notes)
    return tuple(itertools.chain.from_iterable(each(group) for each in found))


def _few(group: Group) -> Iterator[Caveat]:
    compared = [(arm.label, arm.paired.moments.n) for arm in group.arms if arm.paired and arm.paired.moments.n]
    few = [(label, n) for label, n in compared if n < MIN_PAIRS]
    if len(few) > 1 and len(few) == len(compared):
        yield Caveat(Kind.FEW, "", (), max(n for _, n in few))
        return
    for label, n in few:
        yield Caveat(Kind.FEW, label if len(compared) > 1 else "", (), n)


def _missing_pairs(group: Group) -> Iterator[Caveat]:
    reference = group.reference
    if reference is None:
        return
    for arm in group.arms:
        if arm is reference:
            continue
        pairs = len(arm.errors.keys() & reference.errors.keys())
        for kind, mine, other in ((Kind.ARM_LACKS, arm, reference), (Kind.BASELINE_LACKS, reference, arm)):
            lacking = tuple(sorted(set(other.errors) - set(mine.errors) - set(mine.diverged)))
            if lacking:
                yield Caveat(kind, arm.label, lacking, pairs)


def _seeds(group: Group) -> Iterator[Caveat]:
    for arm in group.arms:
        used: dict[int, list[int]] = {}
        for row in arm.runs:
            used.setdefault(int(row.get("torch_seed", row["config"]["seed"])), []).append(int(row["config"]["seed"]))
        shared = next(((seed, found) for seed, found in used.items() if len(found) > 1), None)
        if shared is not None:
            yield Caveat(Kind.ONE_SEED, arm.label, tuple(sorted(shared[1])), shared[0])
        elif _same_on_every_seed(arm):
            yield Caveat(Kind.ALIKE, arm.label, tuple(arm.errors), 0)


def _unpaired(group: Group) -> Iterator[Caveat]:
    seeds = {arm.label: {int(row["config"]["seed"]): row.get("torch_seed") for row in arm.runs} for arm in group.arms}
    base = seeds.get(group.baseline or "", {})
    for label, mine in seeds.items():
        other = tuple(seed for seed in mine if seed in base and mine[seed] != base[seed])
        if other:
            yield Caveat(Kind.UNPAIRED, label, other, 0)


def _same_on_every_seed(arm: Arm) -> bool:
    return _is_task(arm) and len(arm.errors) >= MIN_ALIKE and len(set(arm.errors.values())) == 1


def _unused(group: Group) -> Iterator[Caveat]:
    for arm in group.arms:
        paired = arm.paired
        if paired is None or not _is_task(arm) or len(paired.differences) < MIN_ALIKE or any(paired.differences):
            continue
        dropped = arm.cost.get("samples_backward", 0.0) < arm.cost.get("samples_forward", 0.0)
        if dropped and not _same_on_every_seed(arm):
            yield Caveat(Kind.UNUSED, arm.label, paired.seeds, 0)


def _twice(group: Group) -> Iterator[Caveat]:
    compared = [(arm, _courses(arm)) for arm in group.arms if arm.paired]
    for (arm, mine), (other, others) in itertools.combinations(compared, 2):
        seeds = sorted(mine.keys() & others.keys())
        alike = all(mine[seed] == others[seed] for seed in seeds)
        several = len(seeds) >= MIN_ALIKE and len(set(arm.errors.values())) > 1
        if alike and several and arm.settings["engine"] == other.settings["engine"]:
            yield Caveat(Kind.TWICE, arm.label, tuple(seeds), 0, other.label)


def _courses(arm: Arm) -> dict[int, object]:
    """Return the result of each finished seed with its curves, but for times."""
    curves = {int(row["config"]["seed"]): row.get("curve") or {} for row in arm.runs}
    return {
        seed: (error, {name: values for name, values in curves[seed].items() if name != "seconds"})
        for seed, error in arm.errors.items()
    }


def _is_task(arm: Arm) -> bool:
    return any("task" in row["config"] for row in arm.runs)


def _sources(group: Group) -> Iterator[Caveat]:
    found: dict[str, set[str]] = {}
    for arm in group.arms:
        for row in arm.runs:
            environment = row.get("environment") or {}
            helpers = environment.get("helpers")
            files = {"": environment.get("source"), **(helpers if isinstance(helpers, dict) else {})}
            for file, source in files.items():
                if source:
                    found.setdefault(file, set()).add(str(source))
    for file, sources in found.items():
        if len(sources) > 1:
            yield Caveat(Kind.SOURCES, "", (), len(sources), file)


def _notes(group: Group) -> Iterator[Caveat]:
    """Yield one caveat per arm and note; one for the whole group if all its runs have the note."""
    found: dict[str, list[tuple[str, int]]] = {}
    runs = 0
    for arm in group.arms:
        for row in arm.runs:
            runs += 1
            for note in row.get("notes") or ():
                found.setdefault(str(note), []).append((arm.label, int(row["config"]["seed"])))
    for note, places in found.items():
        if len(places) == runs:
            yield Caveat(Kind.NOTED, "", (), 0, note)
            continue
        for label in dict.fromkeys(label for label, _ in places):
            yield Caveat(Kind.NOTED, label, tuple(sorted(seed for each, seed in places if each == label)), 0, note)
