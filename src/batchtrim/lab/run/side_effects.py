"""Notice what a training function changes outside of itself: networks, generators and data that it did not make.

The next run in the same process then starts from there, so that results depend on the order of the runs.
"""

from __future__ import annotations

import functools
import gc
import random
import sys
import types
import weakref
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchtrim.lab.task.fingerprint import content_of

__all__ = ["SideEffects"]

MOST_ENTRIES = 1000  # of a list or a dictionary: larger ones hold data, and looking would take time
MOST_BYTES = 1 << 24  # of an array that is read whole
_CACHE: Any = type(functools.cache(print))


class SideEffects:
    """The networks, tensors, arrays and generators that a function finds in its module, its closure or its object.

    Networks, and weights outside of one, are seen wherever they are kept: in functools.cache, in another module, in the
    closure of a function that the function calls.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        found = list(_found(function))
        self._before = [(name, value, _state(value)) for name, value in found]
        self._hidden = [(weakref.ref(each), _state(each)) for each in _networks({id(each) for _, each in found})]

    def changed(self) -> list[str]:
        """Return the names of those that were changed since, in place; of hidden ones the kind."""
        names = [name for name, value, state in self._before if _state(value) != state]
        for reference, state in self._hidden:
            value = reference()
            if value is not None and _state(value) != state:
                names.append(f"a network kept from before ({type(value).__name__})")
        return list(dict.fromkeys(names))


def _found(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a function can change, by name; of a list, a dictionary or a cache its entries, under its name."""
    seen: set[int] = set()
    for name, value in _names(function):
        for each in [value, *_entries(value)]:
            if id(each) not in seen and _state(each) is not None:
                seen.add(id(each))
                yield name, each


def _entries(value: Any) -> Collection[Any]:
    if type(value) is _CACHE:
        return _cached(value)
    if not isinstance(value, dict | list | tuple) or len(value) > MOST_ENTRIES:
        return [value]
    return value.values() if isinstance(value, dict) else value


def _cached(function: Any) -> list[Any]:
    """Return what functools.cache or functools.lru_cache has kept of a function's results."""
    found: list[Any] = []
    for held in gc.get_referents(function):  # a table of them; with a limit, the results themselves as well
        found += held.values() if isinstance(held, dict) else [held]
    return found


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


def _networks(known: Collection[int]) -> list[Any]:
    """Return every network of this process, and the weights that are in none, but those whose id is known."""
    kinds = {Tensor, nn.Parameter, *_kinds_of_module()}  # a proxy that is asked what it is imports what it stands for
    alive = [each for each in gc.get_objects() if type(each) in kinds]
    modules = [each for each in alive if isinstance(each, nn.Module) and "_parameters" in vars(each)]  # made completely
    weights = [each for each in alive if isinstance(each, Tensor) and each.requires_grad and each.is_leaf]
    inside = {id(part) for module in modules for part in _parts(module)}
    return [each for each in (*modules, *weights) if id(each) not in inside and id(each) not in known]


def _kinds_of_module() -> set[type]:
    found, waiting = set(), [nn.Module]
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found.add(kind)
            waiting += type.__subclasses__(kind)
    return found


def _checksum(array: np.ndarray) -> int:
    """Return a checksum of an array; of a large one, of evenly spaced entries. A tensor counts its changes instead."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.flat
    return zlib.crc32(np.ascontiguousarray(flat[:: max(1, array.nbytes // MOST_BYTES)]).view(np.uint8).data)


def _parts(module: nn.Module) -> Iterator[Any]:
    own = vars(module)
    yield from own.get("_modules", {}).values()
    yield from own.get("_parameters", {}).values()


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written into; None if torch does not count it."""
    return None if is_lazy(tensor) or tensor.is_inference() else tensor._version


class _Order:
    """The order of a list's entries. It differs only if the same entries are in another one, as after a shuffle.

    Many a list only collects results.
    """

    def __init__(self, entries: list[Any]) -> None:
        self.entries = list(map(id, entries))

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, _Order)
        return self.entries == other.entries or sorted(self.entries) != sorted(other.entries)

    __hash__ = None  # type: ignore[assignment]


def _state_of_table(value: Any) -> object:
    """Return the state of a data frame's numbers; of a series likewise."""
    frame = value if value.ndim == 2 else value.to_frame()
    columns = [frame.iloc[:, place].to_numpy() for place in range(frame.shape[1])]
    return list(map(str, frame.columns)), [each.shape if each.dtype.hasobject else _checksum(each) for each in columns]


def _state(value: Any) -> object:
    """Return what differs after an object was changed in place; None if it is not watched."""
    if isinstance(value, nn.Module):
        return [_version(each) for each in (*value.parameters(), *value.buffers())]
    if isinstance(value, Tensor):
        return _version(value)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if type(value) is np.ndarray:  # not one mapped from a file
        return None if value.dtype.hasobject else _checksum(value)
    if type(value) is list:
        return _Order(value)
    if (pandas := sys.modules.get("pandas")) and isinstance(value, (pandas.DataFrame, pandas.Series)):
        return _state_of_table(value)
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    return value.getstate() if type(value) is random.Random else None
