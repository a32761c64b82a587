"""Notice what a training function changes outside of itself: a network, a generator or a tensor that it did not make.

The next run in the same process then starts from there, so that results depend on the order of the runs.
"""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchtrim.lab.task.fingerprint import content_of

__all__ = ["SideEffects"]

MOST_ENTRIES = 1000  # of a list or a dictionary: larger ones hold data, and looking would take time


class SideEffects:
    """The networks, tensors and generators that a function finds in its module, its closure or its object."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._before = [(name, value, _state(value)) for name, value in _found(function)]

    def changed(self) -> list[str]:
        """Return the names of those that were changed since, in place."""
        return list(dict.fromkeys(name for name, value, state in self._before if _state(value) != state))


def _found(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a function can change, by name; of a list or a dictionary its entries, under its name."""
    seen: set[int] = set()
    for name, value in _names(function):
        several = isinstance(value, dict | list | tuple) and len(value) <= MOST_ENTRIES
        entries = value.values() if several and isinstance(value, dict) else value if several else [value]
        for each in list(entries):
            if id(each) not in seen and _state(each) is not None:
                seen.add(id(each))
                yield name, each


def _names(function: Any) -> Iterator[tuple[str, Any]]:
    while isinstance(function, functools.partial):
        yield from function.keywords.items()
        yield from ((type(each).__name__, each) for each in function.args)
        function = function.func
    if isinstance(function, types.MethodType):
        owner, function = function.__self__, function.__func__
    else:
        owner = None if isinstance(function, types.FunctionType) else function
    yield from getattr(owner, "__dict__", {}).items()
    if isinstance(function, types.FunctionType):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            yield name, content_of(cell)
        yield from list(function.__globals__.items())


def _state(value: Any) -> object:
    """Return what differs after an object was changed in place; None if it is not watched."""
    if isinstance(value, nn.Module):
        return [each._version for each in (*value.parameters(), *value.buffers()) if not each.is_inference()]
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    return value.getstate() if type(value) is random.Random else None
