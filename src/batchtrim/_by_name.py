"""Arguments that are given by position and have to be named."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from batchtrim._checks import describe

__all__ = ["by_name"]

P = ParamSpec("P")
T = TypeVar("T")


def by_name(function: Callable[P, T]) -> Callable[P, T]:
    """Say what to write where arguments that a function or a method takes by name alone are given by position."""
    parameters = list(inspect.signature(function).parameters.values())
    placed = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    named = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    most = len(placed)
    options = any(each.kind is each.VAR_KEYWORD for each in parameters)
    in_order = len(named) == 1 or (function.__name__ == "__init__" and not options)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if len(args) > most:
            name = _name_of(function, args[0] if placed[0] == "self" else None)
            raise TypeError(_message(name, placed, named, args[most:], in_order))
        return function(*args, **kwargs)

    return checked


def _name_of(function: Callable[..., Any], instance: object) -> str:
    if instance is None:
        return function.__name__
    kind = type(instance).__name__
    return kind if function.__name__ in ("__init__", "__call__") else f"{kind}.{function.__name__}"


def _message(name: str, placed: Sequence[str], named: Sequence[str], given: Sequence[object], in_order: bool) -> str:
    """Return the error's text. ``in_order``: the values are probably meant for the names in their order."""
    said = f"expected the arguments after `{placed[-1]}` of {name} by name, got {len(given)} by position"
    if in_order:
        written = [f"{each}={describe(value)}" for each, value in zip(named, given, strict=False)]
        more = "" if len(named) == 1 else f" The first names are {', '.join(named[:5])}."
        return f"{said}. Did you mean {', '.join(written)}?{more}"
    order = [each for each in placed if each != "self"]
    before = f" By position: {', '.join(order)}." if len(order) > 1 else ""
    return f"{said}: {', '.join(map(describe, given))}. The names are {', '.join(named)}.{before}"
