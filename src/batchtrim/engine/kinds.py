"""Classify objects by their class: which are copied, entered or followed, and which cannot be put back."""

from __future__ import annotations

import enum
import functools
import io
import os
import random
import sys
import threading
import weakref
from argparse import Namespace
from array import array
from collections import ChainMap, UserDict, UserList
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextvars import ContextVar
from functools import partial
from types import (
    BuiltinMethodType,
    FunctionType,
    MappingProxyType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim.engine.contents import is_numpy_generator_class, is_rare
from batchtrim.engine.names import CONTAINERS, FIXED, TOOLS, is_installed

__all__ = ["WRAPPERS", "Kind", "changed_by", "is_entered", "kind_of"]

WRAPPERS = ("batchtrim.criteria", "batchtrim.losses")  # around a user's loss; they have no state of their own
# Classes whose objects are places for values, of the standard library and one of torch's that draws numbers.
_PLACES = (
    SimpleNamespace, Namespace, threading.local, UserDict, UserList, ChainMap, threading.Semaphore, threading.Event,
    weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet, torch.quasirandom.SobolEngine,
)  # fmt: skip
_OF_PLACES = frozenset(("configparser", "contextlib", "csv", "hmac", "multiprocessing", "queue", "sched", "tempfile"))
_OF_LIBRARIES = (
    "torch.distributions", "torch.amp", "torch.optim.lr_scheduler", "torch._library.custom_ops", "scipy.stats",
)  # fmt: skip
# Classes whose objects cannot be put back, by module: the methods by which they change. A prefix may end in a dot.
_HASH = frozenset(("update",))
_PACKS = frozenset(("compress", "decompress", "flush"))
_FILE = frozenset(("write", "writelines", "truncate", "seek", "read", "readline", "readlines", "readinto", "file"))
_CHANGED_BY = {
    "_hashlib": _HASH, "_blake2": _HASH, "_md5": _HASH, "_sha1": _HASH, "_sha2": _HASH, "_sha256": _HASH,
    "_sha512": _HASH, "_sha3": _HASH, "_hmac": _HASH, "zlib": _PACKS, "_bz2": _PACKS, "_lzma": _PACKS, "_io": _FILE,
    "_sre.SRE_Scanner": frozenset(("match", "search")),
    "_queue.SimpleQueue": frozenset(("put", "get", "put_nowait", "get_nowait")),
    "sqlite3.Connection": frozenset(("execute", "executemany", "executescript", "cursor", "commit", "rollback")),
    "_contextvars.Context": frozenset(("run",)),
    "_pickle.Pickler": frozenset(("dump",)), "_pickle.Unpickler": frozenset(("load",)),
    "numpy.random.bit_generator.SeedSequence": frozenset(("spawn",)),
}  # fmt: skip


class Kind(enum.Enum):
    """The treatment of an object. ``IN_PLACE``: it is copied, and the copy is written back."""

    NOTHING = enum.auto()
    MODULE = enum.auto()
    CLASS = enum.auto()
    FILE = enum.auto()
    TENSOR = enum.auto()
    CONTAINER = enum.auto()
    ARRAY = enum.auto()
    IN_PLACE = enum.auto()
    CALLABLE = enum.auto()
    BOUND = enum.auto()
    CACHE = enum.auto()
    REFERENCE = enum.auto()
    THROUGH = enum.auto()
    CHANGING = enum.auto()
    ITERATOR = enum.auto()
    VARIABLE = enum.auto()
    OPTIMIZER = enum.auto()
    OBJECT = enum.auto()


_BY_BASE: list[tuple[Any, Kind]] = [
    (nn.Module, Kind.MODULE),
    (type, Kind.CLASS),
    (ModuleType, Kind.FILE),
    (Tensor, Kind.TENSOR),
    ((tuple, frozenset, *CONTAINERS), Kind.CONTAINER),
    ((bytearray, array), Kind.ARRAY),
    ((torch.Generator, random.Random, io.StringIO, io.BytesIO, type(os.environ)), Kind.IN_PLACE),
    ((FunctionType, MethodType, partial), Kind.CALLABLE),
    ((BuiltinMethodType, MethodWrapperType), Kind.BOUND),
    (functools._lru_cache_wrapper, Kind.CACHE),
    ((weakref.ref, *weakref.ProxyTypes), Kind.REFERENCE),
    ((MappingProxyType, type({}.keys()), type({}.values()), type({}.items())), Kind.THROUGH),
    (ContextVar, Kind.VARIABLE),
    (torch.optim.Optimizer, Kind.OPTIMIZER),
    (torch.autocast, Kind.NOTHING),  # what it notes, it notes anew at each entry
]


@functools.lru_cache(4096)
def kind_of(cls: type) -> Kind:
    """Return what is done with the objects of a class."""
    if cls in FIXED:
        return Kind.NOTHING
    for bases, kind in _BY_BASE:
        if issubclass(cls, bases):
            return kind
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and issubclass(cls, numpy.ndarray):
        return Kind.ARRAY
    if is_numpy_generator_class(cls) or is_rare(cls):
        return Kind.IN_PLACE
    if changed_by(cls):
        return Kind.CHANGING
    if f"{cls.__module__}.{cls.__name__}" == "_csv.writer" or issubclass(cls, _c_pointers()):
        return Kind.THROUGH  # its file, and what a pointer keeps alive
    if issubclass(cls, (Iterator, Coroutine, AsyncIterator)) and not issubclass(cls, io.IOBase):
        return Kind.ITERATOR
    return Kind.OBJECT


def _c_pointers() -> tuple[type, ...]:
    return (sys.modules["_ctypes"]._Pointer,) if "_ctypes" in sys.modules else ()  # type: ignore[attr-defined]


@functools.lru_cache(4096)
def changed_by(cls: type) -> frozenset[str]:
    """Return the methods by which objects change whose state cannot be put back; none for the other classes."""
    for base in cls.__mro__[:-1]:
        found = _CHANGED_BY.get(base.__module__) or _CHANGED_BY.get(f"{base.__module__}.{base.__name__}")
        if found and not issubclass(base, BaseException) and base.__name__ not in ("_IOBase", "_RawIOBase"):
            return found
    return frozenset()


@functools.lru_cache(4096)
def is_entered(cls: type, own: bool) -> bool:
    """Return True if the attributes of an object are searched; ``own``: a module holds it."""
    if cls.__module__ in WRAPPERS or issubclass(cls, _PLACES) or cls.__module__.startswith(_OF_LIBRARIES):
        return True
    top = cls.__module__.partition(".")[0]
    return top in _OF_PLACES or (top not in TOOLS and (own or not is_installed(cls.__module__)))
