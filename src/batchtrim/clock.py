"""The clock of a trimmer: the progress of training, and the keep fraction of its schedule at that point."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from batchtrim._checks import check_choice, check_count, check_part, check_schedule_output
from batchtrim.errors import ChooseLength, ClockPastTotal
from batchtrim.schedules import constant, progress_at

__all__ = ["LENGTHS", "Clock"]

# How to resume from a state that was saved with another total.
LENGTHS = ("stretch", "saved")
# A new clock evaluates its schedule at up to this many points, to find errors before training.
_PROBE_POINTS = 1001


class Clock:
    """A schedule and a count of steps.

    Args:
        schedule: as :func:`batchtrim.schedules.as_schedule` returns it.
        total: steps of the whole training, or None.

    Raises:
        ScheduleOutOfRange: the schedule leaves (0, 1] somewhere.
    """

    def __init__(self, schedule: Callable[[float], float], total: int | None) -> None:
        self.schedule, self.total = schedule, total
        self.reads_accuracy = getattr(schedule, "reads", "progress") == "accuracy"
        self.steps, self.accuracy = 0, 0.0
        self._told = False
        if type(schedule) is not constant:  # which was checked when it was made
            for at in _probe_points(total):
                self._ask(at)
        self.keep = self._at_present()

    @property
    def progress(self) -> float:
        """The fraction of training that is done, in [0, 1]."""
        return progress_at(self.steps, self.total)

    def step(self, n: int, accuracy: float | None) -> None:
        """Advance by n. The first step beyond ``total`` warns if the keep fraction depends on progress."""
        n = check_count("n", n, 0, "It is how many steps to advance. As an event handler: lambda *_: trim.step().")
        if accuracy is not None:
            accuracy = check_part("accuracy", accuracy, "It is a fraction, not a percentage.")
        elif self.reads_accuracy:
            raise ValueError("expected `accuracy`, which drives this schedule, got None. Call step(accuracy=...).")
        else:
            accuracy = self.accuracy
        steps = self.steps + n
        self.keep = self._ask(accuracy if self.reads_accuracy else progress_at(steps, self.total))
        self.steps, self.accuracy = steps, accuracy
        if self.total is not None and self.steps > self.total and not self._told:
            self._tell_overrun()

    def resumed(self, steps: Any, accuracy: Any, saved_total: Any, length: str | None) -> Clock:
        """Return a clock that continues from a saved one.

        Args:
            length: what to do if ``saved_total`` differs; see :meth:`batchtrim.Trimmer.load_state_dict`.
        """
        steps = check_count("state['steps']", steps, minimum=0)
        clock = Clock(self.schedule, self._resumed_total(steps, saved_total, length))
        clock.steps, clock.accuracy = steps, check_part("state['accuracy']", accuracy)
        # with "saved" the user expects training to continue past the total
        clock._told = length == "saved" and clock.total != self.total
        clock.keep = clock._at_present()
        return clock

    def _resumed_total(self, steps: int, saved: Any, length: str | None) -> int | None:
        if length is not None:
            check_choice("length", length, LENGTHS)
        if saved is not None:
            saved = check_count("state['total']", saved)
        if saved == self.total or not self.moves(saved, self.total):
            return self.total
        if length == "saved" and saved is not None:
            return saved
        if length == "stretch" and self.total is not None and steps <= self.total:
            return self.total
        if length == "stretch":
            raise ValueError(
                f"expected `state` of at most total={self.total} steps, which the schedule is stretched over, got "
                f"{steps} steps of total={saved}. Does one of the two count batches and the other epochs?"
            )
        raise ChooseLength(
            f"expected `state` of a trimmer with total={self.total}, got total={saved}. Progress would jump from "
            f"{progress_at(steps, saved):.4g} to {progress_at(steps, self.total):.4g}. Choose one: "
            "load_state_dict(state, length='stretch') stretches the schedule over this training, with one jump; "
            "length='saved' keeps the saved total and stays at the schedule's end beyond it."
        )

    def moves(self, *totals: int | None) -> bool:
        """True if the keep fraction changes with progress, for trainings of these lengths."""
        if not getattr(self.schedule, "needs_total", True):
            return False
        return len({self._ask(at) for total in totals for at in _probe_points(total)}) > 1

    def _tell_overrun(self) -> None:
        self._told = True
        if self.moves(self.total):
            warnings.warn(
                f"expected at most total={self.total} calls of step(), got {self.steps}. The schedule is over, and "
                f"{self.keep:.4g} of each batch is kept from here on. Does `total` count epochs while step() is called "
                "once a batch, or is the epoch's number passed to step(), which advances by what it is given?",
                ClockPastTotal,
                stacklevel=5,
            )

    def _ask(self, at: float) -> float:
        try:
            value = self.schedule(at)
        except Exception as error:
            error.add_note(
                "batchtrim calls a keep schedule with one number in [0, 1]: progress, not an epoch or a step."
            )
            raise
        if type(value) is float and 0.0 < value <= 1.0:  # the usual case, a thousand times for each new clock
            return value
        name = "accuracy" if self.reads_accuracy else "progress"
        return check_schedule_output(self.schedule, f"{name} {at:.4g}", value)

    def _at_present(self) -> float:
        return self._ask(self.accuracy if self.reads_accuracy else self.progress)


@functools.lru_cache(maxsize=8)
def _probe_points(total: int | None) -> tuple[float, ...]:
    """Return the points at which to test a schedule: every step of a short training, a thousand steps of a long one."""
    points = min(total or _PROBE_POINTS, _PROBE_POINTS)
    return tuple(progress_at(i, points) for i in range(points))
