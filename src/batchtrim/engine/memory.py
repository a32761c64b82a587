"""Find the parts of a batch that share memory: with one another, with the model, or within themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchtrim._checks import without_values

__all__ = ["SharedMemory", "clones", "is_array", "touching", "version_of", "write_values"]


@dataclass
class _Part:
    """A tensor or array, and the addresses of its first byte and past its last one. ``place``: where in the batch."""

    value: Any
    start: int
    end: int
    place: str = ""


class SharedMemory:
    """The parts of a batch whose memory is also that of another part, of a tensor of the model, or twice their own.

    A forward that writes into one changes the other too. Rows that are cut are copies, so there it would not.

    Args:
        x, y: what inputs and targets hold, by its place in them.
        batch_dim: the dimension of the tensors in ``x`` that holds the batch.
        held: the model's tensors.
    """

    def __init__(
        self, x: Mapping[str, Any], y: Mapping[str, Any], batch_dim: int = 0, held: Iterable[Tensor] = ()
    ) -> None:
        self._own = list(_parts_of(x, y, batch_dim))
        parts = [*self._own, *(part for tensor in held if (part := _part(tensor)) is not None)] if self._own else []
        together = {id(part) for group in _groups(parts) if len(group) > 1 for part in group}
        self._others = [part for part in parts if id(part) in together]
        self._shared = [part for part in self._own if id(part) in together or _repeats_memory(part.value)]
        self._noted = [(version_of(part.value), _copy(part.value)) for part in self._shared]

    def written(self) -> str | None:
        """Return which part was written into since construction, and what it shares its memory with; or None."""
        for part, (version, copy) in zip(self._shared, self._noted, strict=True):
            if version_of(part.value) != version or not _equal(part.value, copy):
                if _repeats_memory(part.value):
                    return f"`{part.place}`, whose elements share memory"
                for other in self._others:
                    if other is not part and _overlap(part, other):
                        return f"`{part.place}`, which shares memory with " + (
                            f"`{other.place}`" if other.place else "a tensor that the model holds"
                        )
        return None


def is_array(value: Any) -> bool:
    """True for a NumPy array that can be written into. Does not import NumPy."""
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.flags.writeable


def write_values(tensor: Tensor, values: Tensor) -> None:
    """Write values into a tensor past autograd, and give it their shape.

    Torch refuses to write into a tensor that was expanded, as it is.
    """
    if tensor.shape != values.shape:
        with torch.no_grad():
            tensor.resize_(values.shape)
    dense = tensor.layout == torch.strided and not tensor.is_nested
    repeated = [dim for dim in range(tensor.ndim) if tensor.stride(dim) == 0 and tensor.shape[dim] > 1] if dense else []
    for dim in repeated:
        tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.data.copy_(values)


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """Return a copy of each tensor; those that share memory do so in the copy, as far as no graph keeps them apart."""
    found = {}
    for group in _groups([part for tensor in tensors if (part := _part(tensor)) is not None]):
        alike = {(part.value.untyped_storage().data_ptr(), part.value.element_size()) for part in group}
        graph = torch.is_grad_enabled() and any(part.value.requires_grad for part in group)
        if len(alike) > 1 or graph or not (len(group) > 1 or _repeats_memory(group[0].value)):
            continue
        first, size = group[0], alike.pop()[1]
        end = max(part.end for part in group)
        whole = (
            first.value.detach().as_strided([(end - first.start) // size], [1], first.value.storage_offset()).clone()
        )
        for part in group:
            value, offset = part.value, (part.start - first.start) // size
            found[id(value)] = whole.view(value.dtype).as_strided(value.shape, value.stride(), offset)
    return [found[id(tensor)] if id(tensor) in found else tensor.clone() for tensor in tensors]


def _parts_of(x: Mapping[str, Any], y: Mapping[str, Any], batch_dim: int) -> Iterator[_Part]:
    seen = set()
    for name, given, dim in (("x", x, batch_dim), ("y", y, 0)):
        for place, value in given.items():
            if (id(value), dim) not in seen and (part := _part(value, f"{name}{place}")) is not None:
                seen.add((id(value), dim))  # the same tensor is cut once for each dimension
                yield part


def _part(value: Any, place: str = "") -> _Part | None:
    """Return where a tensor or array lies, or None for one of no elements, and for what is neither."""
    try:
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_nested or without_values(value) or not value.data_ptr():
                return None
            start, item = value.data_ptr(), value.element_size()
            strides = [stride * item for stride in value.stride()]
        elif is_array(value):
            start, item, strides = value.__array_interface__["data"][0], value.itemsize, value.strides
        else:
            return None
    except (RuntimeError, NotImplementedError):  # a tensor of torch.func, or of a class without memory of its own
        return None
    steps = [(size - 1) * stride for size, stride in zip(value.shape, strides, strict=True)]
    if 0 in value.shape:
        return None
    return _Part(value, start + sum(min(0, s) for s in steps), start + sum(max(0, s) for s in steps) + item, place)


def _groups(parts: list[_Part]) -> list[list[_Part]]:
    """Return the parts in groups whose addresses overlap, each in the order of its addresses."""
    found: list[list[_Part]] = []
    end = 0
    for part in sorted(parts, key=lambda each: each.start):
        if not found or part.start >= end:
            found.append([])
        found[-1].append(part)
        end = max(end, part.end)
    return found


def touching(named: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the name of each tensor whose addresses another one reaches into, after the name of that one."""
    for group in _groups([part for name, value in named.items() if (part := _part(value, name)) is not None]):
        furthest = group[0]
        for part in group[1:]:
            yield furthest.place, part.place
            furthest = max(furthest, part, key=lambda each: each.end)


def _overlap(part: _Part, other: _Part) -> bool:
    """Return True if two parts have an element in common, not only addresses between elements, as two columns do."""
    if part.end <= other.start or other.end <= part.start:
        return False
    a, b = part.value, other.value
    same = isinstance(a, Tensor) and isinstance(b, Tensor) and a.element_size() == b.element_size()
    if not same or (part.start - other.start) % a.element_size():
        return True
    start, size = min(part.start, other.start), a.element_size()
    marks = torch.zeros((max(part.end, other.end) - start) // size, dtype=torch.bool)
    marks.as_strided(a.shape, a.stride(), (part.start - start) // size).fill_(True)
    return bool(marks.as_strided(b.shape, b.stride(), (other.start - start) // size).any())


def _repeats_memory(value: Any) -> bool:
    """Return True if elements of a tensor or array lie at the same address, as those of an expanded one do."""
    strides = value.stride() if isinstance(value, Tensor) else value.strides
    reach = 1 if isinstance(value, Tensor) else value.itemsize
    for stride, size in sorted(zip(map(abs, strides), value.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += (size - 1) * stride
    return False


def version_of(value: Any) -> int:
    """Return the number that a write in place raises (but not one through ``.data``); 0 if torch does not count."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value.copy()


def _equal(value: Any, copy: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(((value == copy) | ((value != value) & (copy != copy))).all())
    return value.tobytes() == copy.tobytes()
