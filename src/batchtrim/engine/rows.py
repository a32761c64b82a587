"""Walk through a batch: map its tensors, copy it, cut it to some of its rows, or refuse what cannot be cut."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from batchtrim.engine.memory import clones, is_array, write_values
from batchtrim.errors import EngineRefused

__all__ = ["RowCutter", "batch_size", "copied", "entries", "map_tensors", "restore_values", "tensors_of"]

_TRACES_COPY = torch.__version__ >= TorchVersion("2.13")  # torch.compile takes copy.copy of an object

# Types of values that belong to no row. A list of labels is recognised before its items are visited.
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), slice, enum.Enum, torch.dtype, torch.device)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return ``value`` with every tensor in it replaced by ``function(tensor)``.

    Goes through mappings, lists, tuples, named tuples and dataclasses, and returns each as its own type.
    """
    return _map(lambda _, leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value, "")


def tensors_of(value: Any) -> list[Tensor]:
    """Return every tensor of a batch, in order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)
    return found


def batch_size(x: Any, dim: int) -> int | None:
    """Return the size along dimension ``dim`` of the first tensor in ``x`` that has it; None if none has."""
    return next((tensor.shape[dim] for tensor in tensors_of(x) if tensor.ndim > dim), None)


def entries(value: Any) -> dict[str, Any]:
    """Return what a batch holds, by its place in it, such as ``[0]['mask']``."""
    found: dict[str, Any] = {}
    _map(lambda place, leaf: found.setdefault(place, leaf), value, "")
    return found


def copied(value: Any) -> Any:
    """Return a batch with copies of its tensors and NumPy arrays; what is one tensor or memory is so in the copy."""
    tensors = tensors_of(value)
    copies: dict[int, Any] = dict(zip(map(id, tensors), clones(tensors), strict=True))

    def copied_once(_: str, leaf: Any) -> Any:
        if id(leaf) not in copies and is_array(leaf):
            copies[id(leaf)] = leaf.copy()
        return copies.get(id(leaf), leaf)

    return _map(copied_once, value, "")


def restore_values(value: Any, copy_of_it: Any) -> None:
    """Give a batch's tensors the values they had when :func:`copied` was called."""
    with torch.no_grad():
        for tensor, was in zip(tensors_of(value), tensors_of(copy_of_it), strict=True):
            if tensor.layout == torch.strided and not tensor.is_meta and not torch.equal(tensor, was):
                write_values(tensor, was)


@dataclasses.dataclass
class RowCutter:
    """Cut batches to some of their rows.

    A tensor holds the batch if its batch dimension is as long as the batch. A tensor that had another length in an
    earlier batch never holds it: a constant of shape (C,) stays whole even in a last batch of C samples.

    Attributes:
        batch_dim: the dimension of the tensors in ``x`` that holds the batch; in ``y`` it is the first.
        whole: the positions of tensors known not to hold the batch, such as ``y[1]``.
    """

    batch_dim: int = 0
    whole: set[str] = dataclasses.field(default_factory=set)

    def __call__(self, x: Any, y: Any, rows: Tensor, batch: int, poisoned: Tensor | None = None) -> tuple[Any, Any]:
        """Return copies of the given rows of inputs and targets; tensors that do not hold the batch stay whole.

        Args:
            rows: int64 (k,).
            batch: how many rows there are.
            poisoned: bool (k,), rows whose floating-point numbers are all set to NaN.

        Raises:
            EngineRefused: part of the batch has rows that cannot be identified or taken.
        """
        cut: dict[tuple[int, int], Tensor] = {}
        whole: dict[int, Tensor] = {}

        def walk(value: Any, place: str, dim: int) -> Any:
            def taken(at: str, leaf: Any) -> Any:
                if not isinstance(leaf, Tensor):
                    return _constant(at, leaf, batch)
                if not self._holds(at, leaf, dim, batch):
                    if id(leaf) not in whole:
                        whole[id(leaf)] = leaf.clone()
                    return whole[id(leaf)]
                if (id(leaf), dim) not in cut:
                    cut[id(leaf), dim] = _rows_of(leaf, dim, rows, poisoned)
                return cut[id(leaf), dim]

            return _map(taken, value, place, lambda at, part: self._check_container(at, part, dim, batch))

        inputs = walk(x, "x", self.batch_dim)
        if not cut:
            refuse("x", f"no tensor has the {batch} rows of the losses along dimension {self.batch_dim}")
        return inputs, walk(y, "y", 0)

    def _holds(self, place: str, tensor: Tensor, dim: int, batch: int) -> bool:
        if tensor.is_nested or tensor.layout != torch.strided:
            refuse(place, f"it is a tensor with layout {tensor.layout}")
        own = next((name for name in getattr(tensor, "__dict__", ()) if "dynamo" not in name), None)
        if own is not None and not isinstance(tensor, nn.Parameter):
            refuse(place, f"it is a tensor with an attribute (`{own}`), which its rows would lack. Pass that by itself")
        if tensor.ndim <= dim or tensor.shape[dim] != batch:
            self.whole.add(place)
        return place not in self.whole

    def _check_container(self, place: str, part: Any, dim: int, batch: int) -> None:
        if isinstance(part, nn.utils.rnn.PackedSequence):
            refuse(place, "it is a PackedSequence, whose rows lie interleaved. Pass padded sequences and their lengths")
        if isinstance(part, (list, tuple)) and len(part) == batch > 1:
            held = any(isinstance(item, Tensor) and item.ndim > dim and item.shape[dim] == batch for item in part)
            if not held:
                refuse(place, f"it is a {type(part).__name__} of {batch} entries, one per sample. Pass a tensor")


def refuse(place: str, why: str) -> NoReturn:
    """Raise EngineRefused, naming the place in the batch that cannot be cut."""
    raise EngineRefused(f"the batch cannot be cut to the kept rows: in `{place}`, {why}.")


def _constant(place: str, leaf: Any, batch: int) -> Any:
    if isinstance(leaf, _CONSTANTS) or callable(leaf):
        return leaf
    if type(leaf).__module__ == "numpy" and isinstance(getattr(leaf, "shape", None), tuple):
        if batch in leaf.shape:
            refuse(place, f"it is a NumPy array of shape {leaf.shape}. Pass a tensor")
        return leaf.copy()
    refuse(place, f"it is an object of type {type(leaf).__name__}, whose rows cannot be taken")


def _rows_of(tensor: Tensor, dim: int, rows: Tensor, poisoned: Tensor | None) -> Tensor:
    taken = _selected(tensor, dim, rows.to(tensor.device))
    if poisoned is not None and (taken.is_floating_point() or taken.is_complex()):
        taken = taken.index_fill(dim, poisoned.nonzero().flatten().to(tensor.device), float("nan"))
    return taken


def _selected(tensor: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Return rows of a tensor, in its own order of dimensions in memory (channels last)."""
    if tensor.is_contiguous():
        return tensor.index_select(dim, rows)
    order = sorted(range(tensor.ndim), key=lambda each: -tensor.stride(each))
    taken = tensor.permute(order).index_select(order.index(dim), rows)
    return taken.permute([order.index(each) for each in range(tensor.ndim)])


def _map(
    function: Callable[[str, Any], Any], value: Any, place: str, enter: Callable[[str, Any], None] | None = None
) -> Any:
    """Rebuild ``value`` from ``function(place, leaf)``; ``enter(place, container)`` sees each container first."""
    if enter is not None and not isinstance(value, Tensor):
        enter(place, value)

    def inner(key: str, item: Any) -> Any:
        return _map(function, item, f"{place}{key}", enter)

    if isinstance(value, Mapping):
        return _like_mapping(value, {key: inner(f"[{key!r}]", item) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        names: Any = getattr(value, "_fields")  # noqa: B009  (a named tuple has no type of its own)
        return type(value)(*(inner(f".{name}", getattr(value, name)) for name in names))
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)([inner(f"[{number}]", item) for number, item in enumerate(value)])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {each.name: inner(f".{each.name}", getattr(value, each.name)) for each in dataclasses.fields(value)}
        if not _TRACES_COPY and torch.compiler.is_compiling() and not hasattr(value, "__post_init__"):
            return type(value)(**items)
        new = copy.copy(value)
        for name, item in items.items():
            object.__setattr__(new, name, item)
        return new
    return function(place, value)


def _like_mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(value) is dict or not isinstance(value, MutableMapping):
        return items
    new = copy.copy(value)  # a ModelOutput, a BatchEncoding, a defaultdict: use its copy method, not its constructor
    for key, item in items.items():
        new[key] = item
    return new
