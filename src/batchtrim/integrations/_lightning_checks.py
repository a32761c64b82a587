"""Check the arguments of the Lightning callback, and which trimmer the module has and uses."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from batchtrim._checks import describe
from batchtrim.keeplog import KeepLog
from batchtrim.trimmer import Trimmer

__all__ = ["check_arguments", "check_free", "check_over", "check_used", "keep_all", "mark", "marked"]


_MARK = "of_callback"


def check_arguments(log: Any, keep_log: Any, attribute: Any, intercept: bool, options: dict[str, Any]) -> None:
    """Raise an error for arguments that are wrong, alone or together."""
    if not isinstance(log, bool) or not isinstance(keep_log, (KeepLog, type(None))):
        given = describe(keep_log if isinstance(log, bool) else log)
        raise TypeError(f"expected `log` to be a bool and `keep_log` to be a batchtrim.KeepLog, got {given}.")
    if intercept and (keep_log is not None or options.get("scope", "local") != "local"):
        given = "`keep_log`" if keep_log is not None else "`scope` 'global'"
        raise ValueError(
            f"expected no {given} with `intercept`, got it: the callback knows no ids, and chooses on each rank alone. "
            "Leave `intercept` out, and call self.trim(losses) in training_step."
        )
    if not isinstance(attribute, str) or not attribute.isidentifier():
        raise ValueError(f"expected `attribute` to be the name of an attribute, got {describe(attribute)}.")


def mark(trim: Trimmer) -> Trimmer:
    """Mark a trimmer as made by a callback, which may put another in its place; a copy of it is marked, too."""
    vars(trim)[_MARK] = True
    return trim


def marked(own: Any) -> bool:
    """True if a callback may put a trimmer in place of this attribute: there is none, or a callback made it."""
    return own is None or hasattr(own, _MARK)


def keep_all(module: Any, attribute: str, options: Mapping[str, Any]) -> Trimmer | None:
    """Give the module a trimmer that keeps everything, with statistics of its own; None if it made one itself."""
    if not marked(getattr(module, attribute, None)):
        return None
    keeping = mark(Trimmer(1.0, unit=options.get("unit", "sample")))
    setattr(module, attribute, keeping)
    return keeping


def check_free(module: Any, attribute: str) -> None:
    """Raise an error if the module uses the trimmer's name for something else, or for a trimmer of its own."""
    own = getattr(module, attribute, None)
    if isinstance(own, Trimmer) and not marked(own) and (own.keep < 1.0 or own._clock.moves(own.total)):
        raise ValueError(
            f"expected `attribute` to be free on {type(module).__name__}, got {attribute!r}, a Trimmer of the module's "
            "own, which the callback's would replace. Remove it, or leave the callback out and call trim.step()."
        )
    if not isinstance(own, (Trimmer, type(None))):
        raise ValueError(
            f"expected `attribute` to be free on {type(module).__name__}, got {attribute!r}, which it has for "
            "something else. Take another name, and call that one in training_step."
        )


def check_used(
    module: Any, attribute: str, trim: Trimmer | None, keep_log: KeepLog | None, before: Trimmer | None = None
) -> None:
    """Warn if no step of an epoch called the trimmer; raise an error if none recorded into the keep log.

    Args:
        before: the trimmer that the module had before training.
    """
    name = type(module).__name__
    if trim is not None and trim.last is None and not trim._uncounted:
        cure = (
            f"Return self.{attribute}(losses) of un-reduced losses, or leave the module as it is and use "
            "TrimmingCallback(intercept=True)."
        )
        if before is not None and (before.last is not None or before._uncounted):
            cure = (
                f"It calls the self.{attribute} of before training (setup, configure_model, on_fit_start), which keeps "
                f"everything. Take self.{attribute}, or make a TrimmedForward with it, in on_train_start."
            )
        warnings.warn(
            f"{name}.training_step has not called self.{attribute} in a whole epoch: it trains on everything. {cure}",
            stacklevel=2,
        )
    if keep_log is not None and not keep_log.steps:
        raise ValueError(
            f"expected {name}.training_step to record in the `keep_log`, got none in a whole epoch. "
            f"After self.{attribute}(losses) call self.keep_log.record(self.{attribute}.last, ids=ids)."
        )


def check_over(trim: Trimmer, trainer: Any, unit: str) -> None:
    """Warn if training ended before the schedule did."""
    if trainer.should_stop or trim.progress >= 1.0 or (trim.total or 1) == 1 or not trim._clock.moves(trim.total):
        return
    warnings.warn(
        f"expected training of {trim.total} {unit}s, which the schedule spans, got {trim.steps + 1}. The last batches "
        f"were trained at keep {trim.keep:.4g}: training is shorter than its settings say (max_steps with "
        "clock='epoch', a loader with fewer batches than its length, a batch with more optimizer steps than all "
        "before it).",
        stacklevel=2,
    )
