"""Keep schedules: the fraction of each batch to keep, as a function of training progress.

A schedule is a plain callable from a number in [0, 1] to a keep fraction in (0, 1]. The number is ``progress``, the
fraction of training that is done. Only :class:`by_accuracy` takes the running training accuracy instead; it sets
``reads = "accuracy"``. Schedules have no state: the clock is in :class:`batchtrim.Trimmer`.

They are small frozen dataclasses with lower-case names, so that ``repr`` prints the expression that makes them.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import FunctionType
from typing import Any, ClassVar

from batchtrim._checks import check_keep, check_part, check_progress, describe, is_number, plain, takes

__all__ = ["Schedule", "by_accuracy", "constant", "cosine", "join", "linear", "piecewise", "step"]

# Names of a function's argument that say it counts, where it would get a share.
_COUNTED = ("epoch", "epochs", "step", "steps", "iteration", "iterations")


class Schedule:
    """Base class of the schedules here. Any callable of progress works too; this class says what a schedule reads."""

    reads: ClassVar[str] = "progress"  # or "accuracy"
    needs_total: ClassVar[bool] = True  # False if the keep fraction does not depend on progress

    def __call__(self, progress: float, /) -> float:
        """Return the keep fraction, in (0, 1], at ``progress`` in [0, 1]."""
        raise TypeError(f"{type(self).__name__} is an abstract schedule; use one of {', '.join(__all__[1:])}.")


@dataclass(frozen=True)
class constant(Schedule):
    """The same keep fraction from start to end: ``q(p) = keep``.

    The author's code keeps ``0.5 * (a * b)`` of the batch under this name; here it is ``keep`` itself.

    Args:
        keep: fraction of the batch, in (0, 1].

    Example:
        >>> constant(0.5)(0.9)
        0.5
    """

    keep: float
    needs_total: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep("keep", self.keep))

    def __call__(self, progress: float, /) -> float:
        _part(progress)
        return self.keep


@dataclass(frozen=True)
class linear(Schedule):
    """A straight line: ``q(p) = start + (end - start) * p``. The defaults are the paper's schedule.

    Source: Fassold, arXiv 2110.13058. With E epochs numbered 0..E-1 and ``p = e / (E - 1)``, the first epoch trains
    on all samples and the last one on the hardest fifth.

    Args:
        start: fraction kept at the start of training, in (0, 1].
        end: fraction kept at the end, in (0, 1].

    Example:
        >>> schedule = linear(1.0, 0.2)
        >>> schedule(0.0), schedule(0.5), schedule(1.0)
        (1.0, 0.6, 0.2)
    """

    start: float = 1.0
    end: float = 0.2

    def __post_init__(self) -> None:
        _check_ends(self)

    def __call__(self, progress: float, /) -> float:
        return _lerp(self.start, self.end, _part(progress))


@dataclass(frozen=True)
class cosine(Schedule):
    """Half a cosine: ``q(p) = end + (start - end) * (1 + cos(pi * p)) / 2``. Slow at both ends, fast between.

    Args:
        start: fraction kept at the start of training, in (0, 1].
        end: fraction kept at the end, in (0, 1].

    Example:
        >>> round(cosine(1.0, 0.2)(0.5), 6)
        0.6
    """

    start: float = 1.0
    end: float = 0.2

    def __post_init__(self) -> None:
        _check_ends(self)

    def __call__(self, progress: float, /) -> float:
        return _lerp(self.start, self.end, (1.0 - math.cos(math.pi * _part(progress))) / 2.0)


@dataclass(frozen=True)
class step(Schedule):
    """Steps: ``start`` until the first boundary, then the keep fraction of the last boundary passed.

    Args:
        boundaries: progress in [0, 1] -> keep fraction from there on.
        start: fraction kept before the first boundary.

    Example:
        >>> schedule = step({0.5: 0.6, 0.75: 0.3})
        >>> schedule(0.49), schedule(0.5), schedule(1.0)
        (1.0, 0.6, 0.3)
    """

    boundaries: Mapping[float, float]
    start: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", _check_points("boundaries", self.boundaries))
        object.__setattr__(self, "start", check_keep("start", self.start))

    def __call__(self, progress: float, /) -> float:
        return _last_passed(self.boundaries, self.start, _part(progress))


@dataclass(frozen=True)
class piecewise(Schedule):
    """Straight lines between given points; constant before the first and after the last.

    Args:
        points: progress in [0, 1] -> keep fraction at that point.

    Example:
        >>> schedule = piecewise({0.0: 1.0, 0.5: 0.8, 1.0: 0.2})
        >>> schedule(0.25), schedule(0.75)
        (0.9, 0.5)
    """

    points: Mapping[float, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _check_points("points", self.points))

    def __call__(self, progress: float, /) -> float:
        progress, places, keeps = _part(progress), list(self.points), list(self.points.values())
        after = bisect_right(places, progress)
        if after in (0, len(places)):
            return keeps[0] if after == 0 else keeps[-1]
        left, right = places[after - 1], places[after]
        return _lerp(keeps[after - 1], keeps[after], (progress - left) / (right - left))


@dataclass(frozen=True)
class join(Schedule):
    """One schedule after another; each sees its own part of training as progress 0 to 1.

    Args:
        schedules: two or more schedules of progress.
        at: the progress at which each next schedule takes over; increasing, one fewer than ``schedules``.

    Example:
        >>> schedule = join([constant(1.0), linear(1.0, 0.2)], at=[0.5])
        >>> schedule(0.25), schedule(0.75), schedule(1.0)
        (1.0, 0.6, 0.2)
    """

    schedules: Sequence[Callable[[float], float]]
    at: Sequence[float]
    _edges: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("schedules", "at"):
            if not isinstance(getattr(self, name), Sequence):
                raise TypeError(f"expected `{name}` to be a list, got {describe(getattr(self, name))}.")
        schedules = tuple(as_schedule(schedule, "schedules") for schedule in self.schedules)
        at = tuple(check_progress("at", place) for place in self.at)
        if len(schedules) < 2 or len(at) != len(schedules) - 1:
            raise ValueError(
                "expected two or more `schedules`, and one place fewer in `at`, "
                f"got {len(schedules)} schedules and {len(at)} places."
            )
        edges = (0.0, *at, 1.0)
        if any(left >= right for left, right in pairwise(edges)):
            raise ValueError(f"expected `at` to rise strictly between 0 and 1, got {list(at)}.")
        if any(getattr(schedule, "reads", "progress") != "progress" for schedule in schedules):
            raise ValueError("expected `schedules` to be schedules of progress, got one driven by accuracy.")
        object.__setattr__(self, "schedules", schedules)
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "_edges", edges)

    def __call__(self, progress: float, /) -> float:
        progress = _part(progress)
        part = bisect_right(self.at, progress)
        left, right = self._edges[part], self._edges[part + 1]
        return self.schedules[part]((progress - left) / (right - left))


@dataclass(frozen=True)
class by_accuracy(Schedule):
    """Keep less as training accuracy rises: ``start``, then the fraction of the highest level reached.

    Source: Ordered SGD, arXiv 1907.04371, whose levels are the default: everything, a half from 80 % training
    accuracy on, a quarter from 90 %, an eighth from 95 %, a sixteenth from 99.5 %. The authors' scripts also decay the
    learning rate once at 99.5 %; the caller has to do that. Pass the accuracy with ``trim.step(accuracy=...)``.

    Args:
        levels: running training accuracy in [0, 1] -> keep fraction from there on.
        start: fraction kept below the first level.

    Example:
        >>> schedule = by_accuracy()
        >>> schedule(0.5), schedule(0.8), schedule(0.996)
        (1.0, 0.5, 0.0625)
    """

    levels: Mapping[float, float] = field(default_factory=lambda: {0.8: 1 / 2, 0.9: 1 / 4, 0.95: 1 / 8, 0.995: 1 / 16})
    start: float = 1.0
    reads: ClassVar[str] = "accuracy"
    needs_total: ClassVar[bool] = False

    def __post_init__(self) -> None:
        hint = "A level is an accuracy, a fraction and not a percentage."
        object.__setattr__(self, "levels", _check_points("levels", self.levels, hint))
        object.__setattr__(self, "start", check_keep("start", self.start))

    def __call__(self, accuracy: float, /) -> float:
        return _last_passed(self.levels, self.start, check_part("accuracy", accuracy))


def as_schedule(keep: Any, name: str = "keep") -> Callable[[float], float]:
    """Return ``keep`` as a schedule: a callable of progress unchanged, a number as :class:`constant`."""
    if is_number(keep := plain(keep)):
        return constant(check_keep(name, keep))
    trimmer = hasattr(keep, "expected_keep")
    if (counted := _first_argument(keep)) in _COUNTED:
        raise TypeError(
            f"expected `{name}` to be a callable of progress, from 0 to 1, got one of `{counted}`. Write it in "
            f"terms of progress, the fraction of training done; if `{counted}` is that, rename it to progress."
        )
    if callable(keep) and not isinstance(keep, type) and takes(keep, 1) and not trimmer:
        return keep  # pyright: ignore[reportReturnType]
    cure = "Pass its schedule." if trimmer else "For the paper's schedule pass batchtrim.linear(1.0, 0.2)."
    raise TypeError(
        f"expected `{name}` to be a schedule, a number in (0, 1] or a callable of progress, got {describe(keep)}. "
        f"{cure}"
    )


def _first_argument(function: Any) -> str:
    """Return the name of a plain function's first argument."""
    if not isinstance(function, FunctionType):
        return ""
    return next(iter(inspect.signature(function).parameters), "")


def progress_at(steps: int, total: int | None) -> float:
    """Return progress after ``steps`` (epochs or batches): ``min(1, steps / (total - 1))``; 0 if total is 1 or unknown.

    Example:
        >>> progress_at(0, 5), progress_at(2, 5), progress_at(9, 5), progress_at(0, 1)
        (0.0, 0.5, 1.0, 0.0)
    """
    return 0.0 if total is None or total == 1 else min(1.0, steps / (total - 1))


def _part(progress: float) -> float:
    """Return progress, checked to be a number in [0, 1]; schedules may be called directly."""
    return progress if isinstance(progress, float) and 0.0 <= progress <= 1.0 else check_progress("progress", progress)


def _lerp(start: float, end: float, part: float) -> float:
    # Computed from the nearer end, so that both ends are exact: 1.0 + (0.2 - 1.0) is 0.19999999999999996.
    return start + (end - start) * part if part <= 0.5 else end - (end - start) * (1.0 - part)


def _last_passed(points: Mapping[float, float], start: float, place: float) -> float:
    passed = bisect_right(list(points), place)
    return list(points.values())[passed - 1] if passed else start


def _check_ends(schedule: linear | cosine) -> None:
    object.__setattr__(schedule, "start", check_keep("start", schedule.start))
    object.__setattr__(schedule, "end", check_keep("end", schedule.end))


def _check_points(name: str, points: Any, hint: str = "Progress is the share of training done.") -> dict[float, float]:
    if not isinstance(points, Mapping) or not points:
        raise TypeError(f"expected `{name}` to be a mapping such as {{0.5: 0.6, 0.75: 0.3}}, got {describe(points)}.")
    keys = [check_part(f"{name} key", place, hint) for place in points]
    keeps = [check_keep(f"{name}[{place}]", keep) for place, keep in points.items()]
    return dict(sorted(zip(keys, keeps, strict=True)))
