"""Errors raised by batchtrim: each is a subclass of a builtin error, named after what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = [
    "ApproximateGradient",
    "ChooseLength",
    "ClockPastTotal",
    "EngineFallback",
    "EngineRefused",
    "InstallExtra",
    "NothingToChoose",
    "PassUnreducedLosses",
    "RanksDisagree",
    "ScheduleOutOfRange",
]


class NothingToChoose(UserWarning):
    """Each batch holds a single sample, so trimming keeps all of it whatever the schedule says. Warned once."""

    def __init__(self, batches: int) -> None:
        super().__init__(
            f"expected batches of several samples to choose from, got {batches} of one sample in a row: at least one "
            "sample is kept, so nothing is trimmed. If a padding-free collator packs the batch into one row, choose "
            "tokens with unit='element'; if micro-batches hold one sample each, choose from the whole window with "
            "batchtrim.accumulate."
        )


class PassUnreducedLosses(ValueError):
    """The loss is already averaged, but one loss per sample is needed."""


class ScheduleOutOfRange(ValueError):
    """A keep schedule returned something that is not a fraction in (0, 1]."""


class ChooseLength(ValueError):
    """The state is from a training of another length: choose whether the schedule keeps its length or stretches."""


class ClockPastTotal(UserWarning):
    """A trimmer was stepped more often than its ``total``: the schedule stays at its end. Warned once."""


class InstallExtra(ImportError):
    """An optional library is needed and not installed; the message has the command that installs it."""


class EngineRefused(RuntimeError):
    """An engine cannot compute the right gradient for this model; the message names the module and the reason.

    Attributes:
        selection: the selection already made from the current batch, for another engine to continue with; or None.
    """

    def __init__(self, message: str, selection: Any = None) -> None:
        super().__init__(message)
        self.selection = selection


class ApproximateGradient(UserWarning):
    """A step's gradient may be approximate; the message says how close it is, and what is done. Warned once."""


class EngineFallback(UserWarning):
    """Another engine took over; the message names the module and the reason. Warned once."""


class RanksDisagree(RuntimeError):
    """The processes of one group disagree on a collective selection: their settings or results differ."""


def install_hint(extra: str) -> str:
    """Return how to install an extra, from an index as well as from a clone."""
    return f"Run: pip install 'batchtrim[{extra}]', or in a clone of the repository: pip install -e '.[{extra}]'"


def nearest(name: Any, names: Iterable[str], before: str = "") -> str:
    """Return a hint that names the nearest of ``names``, with a space before it; "" if none is close.

    Args:
        before: what the user has to type before the name.
    """
    import difflib  # late: only a wrong name needs it

    folded = {each.casefold(): each for each in reversed(list(names))}
    near = difflib.get_close_matches(name.casefold(), [*reversed(folded)], n=1) if isinstance(name, str) else []
    return f" Did you mean '{before}{folded[near[0]]}'?" if near else ""
