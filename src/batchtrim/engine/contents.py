"""Values that change in place and can be put back: copy one, compare two copies, write a copy back."""

from __future__ import annotations

import enum
import io
import os
import random
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any, cast

import torch
from torch import Tensor

from batchtrim.engine.memory import is_array, write_values

__all__ = [
    "copy_of",
    "in_double",
    "is_numpy_generator",
    "is_numpy_generator_class",
    "is_rare",
    "put_back",
    "relative_difference",
    "same_contents",
    "same_value",
]

# immutable values whose repr tells them apart
_WRITTEN_IN_FULL = (
    Fraction, Decimal, date, time, timedelta, enum.Enum, range, slice, torch.dtype, torch.device, PurePath,
)  # fmt: skip


def is_numpy_generator(value: Any) -> bool:
    """True for a ``Generator``, ``RandomState`` or ``BitGenerator`` of NumPy. Does not import it."""
    return is_numpy_generator_class(type(value))


def is_numpy_generator_class(cls: type) -> bool:
    """True for the classes of NumPy's generators of random numbers."""
    numpy: Any = sys.modules.get("numpy.random")
    return numpy is not None and issubclass(cls, (numpy.Generator, numpy.RandomState, numpy.BitGenerator))


def is_rare(cls: type) -> bool:
    """True for a class of a rarely imported module; :func:`copy_of` and :func:`put_back` know its objects."""
    return cls is memoryview or any(issubclass(cls, each) for each in _rare())


def _rare() -> Iterator[type]:
    """Yield those classes that are imported: mapped files, C data, contexts of decimal numbers."""
    for module, name in (("mmap", "mmap"), ("_ctypes", "_SimpleCData"), ("_ctypes", "Structure"), ("_ctypes", "Union"),
                         ("_ctypes", "Array"), ("decimal", "Context")):  # fmt: skip
        if module in sys.modules:
            yield getattr(sys.modules[module], name)


def _numpy_state(value: Any) -> Any:
    """Return the state of one of NumPy's generators; a RandomState has a normal number left over, too."""
    if hasattr(value, "get_state"):
        return value.get_state(legacy=False)
    return getattr(value, "bit_generator", value).state


def _set_numpy_state(value: Any, state: Any) -> None:
    """Give one of NumPy's generators a state that it had."""
    if hasattr(value, "set_state"):
        value.set_state(state)
    else:
        getattr(value, "bit_generator", value).state = state


def relative_difference(exact: Tensor, other: Tensor) -> float:
    """Return ``||exact - other|| / ||exact||`` over the entries that differ; NaN is NaN. Return inf if shapes differ.

    Numbers that are not rounded (integers, bool, quantised) are the same or infinitely far apart, as is a sparse tensor
    with other entries. Tensors on the device "meta" have no values: their difference is 0.
    """
    if _kind(exact) != _kind(other):
        return float("inf")
    if exact.is_meta:
        return 0.0
    if exact.is_nested or exact.layout != torch.strided:
        ours, theirs = _stored(exact), _stored(other)
        return max(map(relative_difference, ours, theirs), default=0.0) if len(ours) == len(theirs) else float("inf")
    if not (exact.is_floating_point() or exact.is_complex()):
        return 0.0 if torch.equal(exact, other) else float("inf")
    exact, other = in_double(exact), in_double(other)
    same = (exact == other) | (exact.isnan() & other.isnan())
    if same.all():
        return 0.0
    scale = float(exact[exact.isfinite()].norm())
    difference = float((exact - other)[~same].norm())
    return difference / scale if scale else difference


def in_double(value: Tensor) -> Tensor:
    """Return a tensor in double precision; one of complex numbers stays complex."""
    return value.to(torch.complex128) if value.is_complex() else value.double()


def _kind(value: Tensor) -> tuple[Any, ...]:
    shape = None if value.is_nested else value.shape
    return shape, value.is_meta, value.is_nested, value.layout, value.is_complex()


def _stored(value: Tensor) -> Sequence[Tensor]:
    """Return the dense tensors that a sparse or nested one, or one of MKL-DNN's, holds."""
    if value.is_nested:
        return value.unbind()
    if value.layout == torch.sparse_coo:
        value = value.coalesce()
        return value.indices(), value.values()
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return value.crow_indices(), value.col_indices(), value.values()
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return value.ccol_indices(), value.row_indices(), value.values()
    return (value.to_dense(),)


def same_value(a: Any, b: Any, apart: float, deep: int = 4) -> bool:
    """Return True if two values are the same up to rounding of tensors; objects are not entered.

    Args:
        apart: how far tensors may differ, relative to their norm.
        deep: levels of containers to enter.
    """
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _kind(a) == _kind(b) and relative_difference(a.detach(), b.detach()) <= apart
    if type(a) is not type(b):  # True is not 1, and 1 is not 1.0
        return False
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(a, numpy.generic):
        return a.dtype == b.dtype and _same_array(numpy.asarray(a), numpy.asarray(b), apart)
    base: Any
    for base in (float, complex):  # as written, 0.0 is not -0.0, and NaN is NaN
        if isinstance(a, base):
            return base.__repr__(a) == base.__repr__(b)
    for base in (int, str, bytes):  # past an == of the value's own class
        if isinstance(a, base):
            return base.__eq__(a, b)
    if isinstance(a, (tuple, frozenset, list, dict, set, deque)) or (
        numpy is not None and isinstance(a, numpy.ndarray)
    ):
        return not deep or same_contents(a, b, apart, deep - 1)
    return not isinstance(a, _WRITTEN_IN_FULL) or repr(a) == repr(b)


def same_contents(a: Any, b: Any, apart: float, deep: int = 4) -> bool:
    """Return True if two copies of one thing's contents are the same up to rounding of tensors."""
    if isinstance(a, dict):  # the state of a NumPy generator too
        if len(a) != len(b) or not _same_keys(list(a), list(b)):
            return False
        return all(same_value(*pair, apart, deep) for pair in zip(a.values(), b.values(), strict=True))
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(same_value(*pair, apart, deep) for pair in zip(a, b, strict=True))
    if isinstance(a, (set, frozenset)):
        return len(a) == len(b) and _members(a) == _members(b)
    if hasattr(a, "dtype") and hasattr(a, "tobytes"):
        return _same_array(a, b, apart)
    if isinstance(a, array):
        return a.tobytes() == b.tobytes()
    return same_value(a, b, apart, deep) if isinstance(a, Tensor) else bool(a == b)


def _same_keys(a: list[Any], b: list[Any]) -> bool:
    return all(x is y or (type(x) is type(y) and (x == y or x != x)) for x, y in zip(a, b, strict=True))


def _members(values: Any) -> set[Any]:
    """Return the members of a set that are plain values, as written; of others, only their number is compared."""
    return {(type(each), repr(each)) for each in values if isinstance(each, (int, float, complex, str, bytes, tuple))}


def _same_array(a: Any, b: Any, apart: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.hasobject:
        return a.dtype.names is not None or same_contents(a.ravel().tolist(), b.ravel().tolist(), apart)
    if a.tobytes() == b.tobytes():
        return True
    if a.dtype.kind != "f":  # of a record, what lies between its fields may differ
        return a.dtype.names is not None and bool((a == b).all())
    numpy: Any = sys.modules["numpy"]
    return bool((((a == b) & (numpy.signbit(a) == numpy.signbit(b))) | ((a != a) & (b != b))).all())


def copy_of(value: Any) -> Any:
    """Return a copy of what may change in place; of a container, only its entries."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if is_numpy_generator(value):
        return _numpy_state(value)
    if isinstance(value, (io.StringIO, io.BytesIO)):
        return value.__getstate__()  # its text or bytes, and the position
    if isinstance(value, type(os.environ)):
        return dict(value)
    if isinstance(value, memoryview):
        return value.tobytes()
    if is_rare(type(value)):
        return _copy_of_rare(value)
    if isinstance(value, dict):
        return dict(_base(value).items(value))
    if isinstance(value, (list, deque)):
        return list(_base(value).__iter__(value))
    return value[:] if isinstance(value, (bytearray, array)) else value.copy()


def put_back(value: Any, copy: Any) -> None:
    """Write a copy that :func:`copy_of` returned back."""
    if isinstance(value, Tensor):
        write_values(value, copy)
    elif isinstance(value, torch.Generator):
        value.set_state(copy)
    elif isinstance(value, random.Random):
        value.setstate(copy)
    elif is_numpy_generator(value):
        _set_numpy_state(value, copy)
    elif is_array(value):
        if value.shape != copy.shape:
            value.resize(copy.shape, refcheck=False)
        value[...] = copy
    elif isinstance(value, (io.StringIO, io.BytesIO)):
        cast(Any, value).__setstate__(copy)
    elif isinstance(value, (bytearray, array)):
        if value != copy:  # one with a memoryview cannot change its size
            value[:] = copy
    elif isinstance(value, type(os.environ)):
        _put_back_variables(value, copy)
    elif isinstance(value, memoryview):
        value.cast("B")[:] = copy
    elif is_rare(type(value)):
        _put_back_rare(value, copy)
    elif isinstance(value, (list, deque)):
        _base(value).clear(value)
        _base(value).extend(value, copy)
    elif isinstance(value, dict):
        _base(value).clear(value)
        for name, each in copy.items():
            _base(value).__setitem__(value, name, each)
    else:
        value.clear()
        value.update(copy)


def _base(value: Any) -> Any:
    """Return the class of Python's own that holds a container's entries: a subclass may make others of them."""
    return next(each for each in (list, deque, OrderedDict, dict) if isinstance(value, each))


def _put_back_variables(value: Any, copy: dict[str, str]) -> None:
    for name in [name for name in value if name not in copy]:
        del value[name]
    for name, text in copy.items():
        if value.get(name) != text:
            value[name] = text


_OF_DECIMAL = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")


def _copy_of_rare(value: Any) -> Any:
    if type(value).__module__ == "decimal" or hasattr(value, "clear_flags"):
        return [getattr(value, name) for name in _OF_DECIMAL], dict(value.flags), dict(value.traps)
    if hasattr(value, "tell"):  # a mapped file
        return value[:], value.tell()
    return bytes(value)


def _put_back_rare(value: Any, copy: Any) -> None:
    if type(value).__module__ == "decimal" or hasattr(value, "clear_flags"):
        for name, was in zip(_OF_DECIMAL, copy[0], strict=True):
            setattr(value, name, was)
        for signals, noted in ((value.flags, copy[1]), (value.traps, copy[2])):
            for signal, was in noted.items():
                signals[signal] = was
    elif hasattr(value, "tell"):
        if value[:] != copy[0]:
            value[:] = copy[0]
        value.seek(copy[1])
    else:
        ctypes: Any = sys.modules["ctypes"]
        ctypes.memmove(ctypes.addressof(value), copy, len(copy))
