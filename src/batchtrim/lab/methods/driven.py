"""Methods that a :class:`batchtrim.Trimmer` alone can drive: they work with your own training function.

The others choose the rows of an epoch, train a second network or transform the loss, which only the lab's own loop
does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from batchtrim import Trimmer
from batchtrim.lab.methods.base import Method
from batchtrim.lab.methods.table import METHODS, find_method

__all__ = ["driven_methods", "trimmer_for"]


class _NeedsMore(Exception):
    """A method asked for something that only the lab's own loop knows."""


@dataclass(frozen=True)
class _Info:
    """The settings of a run whose data only its training function sees."""

    epochs: int
    seed: int
    keep: Callable[[float], float]

    def __getattr__(self, name: str) -> Any:
        raise _NeedsMore(name)


def trimmer_for(
    method: str, params: Mapping[str, Any], *, epochs: int, seed: int, keep: Callable[[float], float]
) -> Trimmer:
    """Return the trimmer of a method; its clock counts ``epochs``.

    Raises:
        ValueError: the method is unknown, or a trimmer alone cannot drive it.
    """
    row = find_method(method)
    try:
        built = row.build(_Info(epochs, seed, keep), dict(params))  # type: ignore[arg-type]
        reason = "" if type(built) is Method else _first_line(type(built))
    except _NeedsMore as error:
        built, reason = None, f"It needs to know the run's {error}."
    if built is None or reason:
        raise ValueError(
            f"expected a method that a Trimmer drives ({', '.join(driven_methods())}), got {method!r}. {reason} "
            "The lab's own loop does that: batchtrim compare --dataset."
        )
    return built.trim


def driven_methods() -> list[str]:
    """Return the names of the methods that a trimmer alone drives."""
    found = []
    for name, row in METHODS.items():
        try:
            built = row.build(_Info(2, 0, lambda progress: 1.0), row.check_params({}))  # type: ignore[arg-type]
        except _NeedsMore:
            continue
        if type(built) is Method:
            found.append(name)
    return found


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "It does more than choose from a batch.").splitlines()[0]
