"""Arguments that are given by position and have to be named."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from batchtrim._checks import describe

__all__ = ["by_name"]

P = ParamSpec("P")
T = TypeVar("T")


def by_name(function: Callable[P, T]) -> Callable[P, T]:
    """Say what to write where arguments that a method takes by name alone are given by position."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    placed = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    named = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        given = args[1 + len(placed) :]
        if given:
            written = [f"{name}={describe(value)}" for name, value in zip(named, given, strict=False)]
            raise TypeError(
                f"expected all after `{placed[-1]}` of {type(args[0]).__name__} by name, got {len(given)} by position. "
                f"Did you mean {', '.join(written)}? The first names are {', '.join(named[:5])}."
            )
        return function(*args, **kwargs)

    return checked
