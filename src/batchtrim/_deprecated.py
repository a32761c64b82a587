"""Old forms of calls, which work for one more release with a DeprecationWarning."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from batchtrim.errors import nearest

if TYPE_CHECKING:
    from batchtrim.choice import Choice
    from batchtrim.keeplog import KeepLog

T = TypeVar("T")

_RECORD = "call `log.record(trim.last, ids=ids, outputs=outputs, labels=labels)` after `trim(losses)`"

# Names that were too vague at the top level, and the modules that now hold them.
MOVED = {"above": "batchtrim.selection", "join": "batchtrim.schedules", "step": "batchtrim.schedules"}


def moved(name: str) -> Any:
    """Return the object that was ``batchtrim.<name>``, and warn the caller of the package's ``__getattr__``."""
    home = MOVED[name]
    warnings.warn(
        f"batchtrim.{name} is removed in the next release: use {home}.{name}.", DeprecationWarning, stacklevel=3
    )
    return getattr(importlib.import_module(home), name)


def old_name(module: str, old: str, new: str) -> Any:
    """Return the object that a module used to call ``old``, and warn the caller of its ``__getattr__``."""
    warnings.warn(f"{module}.{old} is removed in the next release: use {new}.", DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module(module), new)


def renamed(old: str, new: str) -> Callable[[type[T]], type[T]]:
    """Return a class decorator: ``old`` still works as the name of the argument and the attribute ``new``."""

    def decorate(kind: type[T]) -> type[T]:
        message = f"{kind.__name__}.{old} is removed in the next release: use {new}."
        make = kind.__init__

        @functools.wraps(make)
        def init(self: T, *args: Any, **given: Any) -> None:
            if old in given:
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                if new in given:
                    raise TypeError(f"expected `{new}` alone, got `{old}`, its old name, as well.")
                given[new] = given.pop(old)
            make(self, *args, **given)

        def get(self: T) -> Any:
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return getattr(self, new)

        kind.__init__ = init
        setattr(kind, old, property(get))
        return kind

    return decorate


def trimmer_log(log: KeepLog | None, unit: str) -> KeepLog | None:
    """Return the argument ``log`` of a Trimmer, with a warning."""
    if log is None:
        return None
    if unit != "sample":
        raise ValueError("expected `unit` 'sample' with a `log`, got 'element'. A KeepLog counts whole samples.")
    warnings.warn(f"Trimmer(log=...) is removed in the next release: {_RECORD}.", DeprecationWarning, stacklevel=4)
    return log


def record_as_before(log: KeepLog | None, last: Choice | None, given: dict[str, Any], call: str) -> None:
    """Record a batch, as ``trim(losses, ids=..., outputs=..., labels=...)`` did."""
    unknown = sorted(given.keys() - {"ids", "outputs", "labels"})
    if unknown:
        cure = nearest(unknown[0], ("rank_by", "mask")) or (
            " Multiply weights into the losses, trim(losses * weights), and give all else to the criterion."
        )
        raise TypeError(f"expected `rank_by` or `mask` beside the losses of {call}, got `{unknown[0]}`.{cure}")
    given = {name: value for name, value in given.items() if value is not None}
    if log is None:
        if given:
            raise ValueError(f"expected no `{next(iter(given))}` without a log, got one. To log the batch, {_RECORD}.")
        return
    if "ids" not in given:
        raise ValueError(
            "expected `ids`, the samples' row numbers in the data set, which the log needs, got None. "
            "Let the data set return its index, or use a trimmer without a log here."
        )
    message = f"{call}(losses, ids=...) is removed in the next release: {_RECORD}."
    warnings.warn(message, DeprecationWarning, stacklevel=4)
    log.record(last, **given)
