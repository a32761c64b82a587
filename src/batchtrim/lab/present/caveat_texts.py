"""Word the caveats of a comparison; see :mod:`batchtrim.lab.analyse.caveats`."""

from __future__ import annotations

from collections.abc import Sequence

from batchtrim.lab.analyse.caveats import Caveat, Kind, caveats
from batchtrim.lab.analyse.comparison import Group
from batchtrim.lab.analyse.inference import MIN_PAIRS

__all__ = ["caveat_texts"]

MOST_SEEDS = 8
FEW_SEEDS = 5


def caveat_texts(group: Group) -> list[str]:
    """Return a sentence for each caveat of the group."""
    return [_text(each, group) for each in caveats(group)]


def _text(caveat: Caveat, group: Group) -> str:
    arm, seeds, number = caveat.arm, _seeds(caveat.seeds), caveat.number
    compared = f"compared on the {number} pair{'s' if number != 1 else ''} that {'are' if number != 1 else 'is'} there"
    compared = compared if number else "not compared, since no pair is there"
    return {
        Kind.ARM_LACKS: f"{arm} has no finished run with {seeds}: {compared}.",
        Kind.BASELINE_LACKS: f"The baseline {group.baseline} has no finished run with {seeds} of {arm}: {compared}.",
        Kind.ONE_SEED: (
            f"{arm}: runs with {seeds} were all seeded with {number} by the task. Their spread is not that of "
            "training: draw from run.seed."
        ),
        Kind.UNPAIRED: (
            f"{arm}: the task seeded {seeds} otherwise than for {group.baseline}, so these pairs share no random "
            "numbers, and other differences than the method's are in them: draw from run.seed."
        ),
        Kind.ALIKE: (
            f"{arm}: the same value on every seed, to the last bit. Does the task draw from another seed than run.seed?"
        ),
        Kind.UNUSED: (
            f"{arm} dropped samples, and gave the value of {group.baseline} on every seed, to the last bit. Does the "
            "task step on the loss that run.trim returns?"
        ),
        Kind.TWICE: (
            f"{arm} and {caveat.note} gave the same value on every seed, to the last bit, and are corrected for as two "
            "methods. Do their options mean the same? Then leave one out."
        ),
        Kind.FEW: (
            f"{f'{arm}: ' if arm else ''}{number} {'seed' if number == len(group.seeds) else 'pair'}"
            f"{'s are' if number != 1 else ' is'} too few: no verdict is given below {MIN_PAIRS}, and an interval over "
            f"two pairs is thirteen times as wide as their spread.{_more(group)}"
        ),
        Kind.SOURCES: (
            f"The runs were made by {number} versions of {caveat.note or 'the program'}. To compare one version, pass "
            "another --out."
        ),
        Kind.NOTED: f"{f'{arm}, {seeds}: ' if arm else ''}{caveat.note}.",
    }[caveat.kind]


def _more(group: Group) -> str:
    """Return how many seeds to run, with the option if the lab made the runs; "" if there are as many."""
    if len(group.seeds) >= FEW_SEEDS:
        return ""
    return f" Five seeds are a start{': --seeds 5' if 'epochs' in group.settings else ''}."


def _seeds(seeds: Sequence[int]) -> str:
    listed = ", ".join(map(str, seeds[:MOST_SEEDS])) + (
        f" and {len(seeds) - MOST_SEEDS} more" * (len(seeds) > MOST_SEEDS)
    )
    return f"seed{'s' if len(seeds) != 1 else ''} {listed}"
