"""Find the parameters that a forward writes into, and restore them, since a second forward would write again."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from batchtrim.engine.compilation import compiled_part
from batchtrim.engine.memory import version_of
from batchtrim.engine.model_facts import is_sharded
from batchtrim.engine.operator_mode import OperatorMode
from batchtrim.engine.reachable import Reachable
from batchtrim.errors import EngineRefused

__all__ = ["ParameterWrites", "known_to_write", "memory_of", "writes_undone"]


class ParameterWrites(OperatorMode):
    """Record the parameters that operators inside the block write into, and their values before.

    A momentum encoder moves in its forward, so two forwards would move it twice. A parameter may be written into in
    place (also through ``p.data``), or be given other memory (``p.data = ...``).

    Args:
        copied: names of parameters to copy beforehand, None for all. Without a ``with`` block, only these can be put
            back if they are written into in place.
        others: further tensors to watch, from :class:`batchtrim.engine.reachable.Reachable`.
    """

    def __init__(self, model: nn.Module, copied: Container[str] | None = (), others: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.parameters: dict[str, tuple[Tensor, Tensor]] = {}  # and its memory, which stays alive after an assignment
        self.copies: dict[str, Tensor] = {}
        self._noted: set[str] = set()
        self._marks: dict[str, tuple[int, int]] = {}
        self._in_storage: dict[int, list[str]] = {}
        named = [] if any(map(is_sharded, model.modules())) else list(model.named_parameters())
        named += [(f"tensor {number} that it holds", tensor) for number, tensor in enumerate(others)]
        for name, parameter in named:
            if parameter.layout == torch.strided and not nn.parameter.is_lazy(parameter):
                self.parameters[name] = parameter, parameter.data
                self._marks[name] = _mark(parameter)
                self._in_storage.setdefault(memory_of(parameter), []).append(name)
                if copied is None or name in copied:
                    self.copies[name] = parameter.detach().clone()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(getattr(func, "_schema", None), "is_mutable", False):
            for number, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._note(args[number] if number < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _note(self, written: Any) -> None:
        for tensor in written if isinstance(written, (list, tuple)) else [written]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                for name in self._in_storage.get(memory_of(tensor), ()):
                    self._noted.add(name)
                    if name not in self.copies:
                        self.copies[name] = self.parameters[name][1].clone()

    def written(self) -> set[str]:
        """Return the names of the parameters written into so far."""
        changed = {name for name, copy in self.copies.items() if not torch.equal(copy, self.parameters[name][1])}
        return self._noted | self._moved() | changed

    def lost(self) -> list[str]:
        """Return the parameters written into in place whose previous values are unknown."""
        return [
            name
            for name in sorted(self._moved() - self.copies.keys())
            if memory_of(self.parameters[name][0]) == self._marks[name][0]
        ]

    def restore(self) -> None:
        """Restore the values of the parameters that were written into."""
        for name, (parameter, memory) in self.parameters.items():
            if name in self.copies:
                memory.copy_(self.copies[name])  # past autograd, like the write itself
            if memory_of(parameter) != self._marks[name][0]:
                parameter.data = memory

    def _moved(self) -> set[str]:
        return {name for name, (parameter, _) in self.parameters.items() if _mark(parameter) != self._marks[name]}


def memory_of(tensor: Tensor) -> int:
    """Return a number that tensors share if they share memory; one of its own for a tensor that is not strided."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _mark(parameter: Tensor) -> tuple[int, int]:
    """Return what an assignment changes, and what a write in place raises."""
    return memory_of(parameter), version_of(parameter)


_written: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # by the first forwards of each model


@contextmanager
def writes_undone(model: nn.Module) -> Iterator[ParameterWrites]:
    """Run forwards, and undo their writes into the model's parameters.

    The first time, every operator is watched; for a compiled model, whose operators cannot be, all parameters are
    copied. Later only those found are copied, and the versions of the others are compared.

    Raises:
        EngineRefused: a parameter was first written into in a later step, so that its previous value is lost. A
            write through ``p.data`` that begins later is not detected. Or the model holds an iterator.
    """
    known = _written.get(model)
    watched = known is None and compiled_part(model) is None
    held = Reachable(model)
    if held.lasting is not None:
        raise EngineRefused(
            f"a second pass over the window cannot start where the first did: {held.lasting}. "
            "Trim each micro-batch by itself (over='micro'), with engine='exact'"
        )
    writes = ParameterWrites(model, None if known is None and not watched else known or (), held.watched)
    try:
        with writes if watched else nullcontext():
            yield writes
        lost = writes.lost()
        if lost:
            raise EngineRefused(
                f"the forward of this model began to write into its parameters ({lost[0]}) after its first step, and a "
                "second pass would write again. Trim each micro-batch by itself (over='micro'), with engine='exact'"
            )
        if known is None:
            _written[model] = writes.written()
    finally:
        writes.restore()


def known_to_write(model: nn.Module) -> bool:
    """Return True if :func:`writes_undone` has found that the model's forward writes into its parameters."""
    return bool(_written.get(model))
