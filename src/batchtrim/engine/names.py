"""Names that a forward may rebind, and the names that the user's code uses."""

from __future__ import annotations

import dis
import functools
import io
import logging
import queue
import random
import sys
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from batchtrim.engine.contents import is_numpy_generator
from batchtrim.engine.memory import is_array

__all__ = [
    "CONTAINERS",
    "FIXED",
    "OF_ALL_MODULES",
    "OF_EVERY_MODULE",
    "TOOLS",
    "Names",
    "Unbound",
    "attributes_of",
    "beside_models",
    "chains_of",
    "closure_of",
    "imported",
    "is_installed",
    "names_in",
    "names_of_handlers",
    "slots_of",
]

CONTAINERS = (list, dict, set, deque)
FIXED = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_STATE = (
    bool, int, float, complex, str, bytes, type(None), tuple, *CONTAINERS, Tensor, torch.Generator, random.Random,
)  # fmt: skip
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Objects of these packages have no state that a forward changes, or are tools, such as a trainer that holds the data.
TOOLS = frozenset((
    "accelerate", "batchtrim", "builtins", "functools", "lightning", "lightning_fabric", "logging", "mpmath",
    "numpy", "pytorch_lightning", "random", "sympy", "torch",
))  # fmt: skip


class Unbound:
    """Stands for the value of a name that has none."""


@dataclass
class Names:
    """Names that a forward may rebind: attributes of an object or a class, or variables.

    Attributes:
        owner: the module, object, class or function whose names they are.
        read: returns a name's value, or raises LookupError, AttributeError or ValueError.
        bind: rebinds a name.
        whole: the owner's ``__dict__``, if names that are added later can be deleted from it; otherwise None.
        delete: deletes a name that had no value, if that is possible.
        space: what a class holds, in which names may be added.
    """

    owner: Any
    names: list[str]
    read: Callable[[str], Any]
    bind: Callable[[str, Any], None]
    whole: dict[str, Any] | None = None
    delete: Callable[[str], None] | None = None
    space: Mapping[str, Any] | None = None

    def state(self, known: Container[str] = ()) -> dict[str, Any]:
        """Return the values to restore, except those ``known``: attributes, and variables that are no functions."""
        if self.whole is not None:
            if not self.whole:  # as of most tensors
                return {}
            passed = OF_EVERY_MODULE if isinstance(self.owner, nn.Module) else ()
            found = [pair for pair in self.whole.items() if pair[0] not in passed and pair[0] not in known]
            return {name: value for name, value in found if "dynamo" not in name}
        found = [(name, self.value(name)) for name in self.names]
        return {name: value for name, value in found if type(value) in FIXED or self._is_state(name, value)}

    def set_up(self, noted: Mapping[str, Any]) -> bool:
        """Return True if an object has a new flag, function or object: what a first forward makes, and no later one."""
        new = self.state(known=noted).values() if self.whole is not None else ()
        return any(isinstance(value, bool) or not isinstance(value, _STATE) for value in new)

    def put_back(self, noted: Mapping[str, Any]) -> None:
        """Delete an object's new attributes, and rebind each name whose value has changed to its earlier value."""
        if self.whole is not None:
            for name in self.state(known=noted):
                del self.whole[name]
        if self.space is not None and self.delete is not None and len(self.space) > len(self.names):
            for name in [each for each in self.space if each not in self.names and _is_own_name(each)]:
                self.delete(name)
        for name, value in noted.items():
            if self.value(name) is not value:
                if value is Unbound and self.delete is not None:
                    self.delete(name)
                else:
                    self.bind(name, value)

    def value(self, name: str) -> Any:
        """Return a name's value, or ``Unbound`` if it has none."""
        try:
            return self.read(name)
        except (AttributeError, LookupError, ValueError):
            return Unbound

    def _is_state(self, name: str, value: Any) -> bool:
        if value is Unbound:
            return self.delete is not None
        if (isinstance(self.owner, type) and name[:2] == "__") or isinstance(value, nn.Parameter):
            return False
        return isinstance(value, _STATE) or is_numpy_generator(value) or is_array(value)


def _is_own_name(name: str) -> bool:
    return name[:2] != "__" and name[:5] != "_abc_" and "dynamo" not in name


def attributes_of(owner: Any) -> Names:
    """Return the attributes in an object's ``__dict__``."""
    held = vars(owner)
    return Names(owner, [], held.__getitem__, held.__setitem__, held)


def closure_of(function: FunctionType) -> Names:
    """Return the variables in a function's closure."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def fill(name: str, value: Any) -> None:
        cells[name].cell_contents = value

    return Names(function, list(cells), lambda name: cells[name].cell_contents, fill)


def slots_of(value: Any) -> Names | None:
    """Return the attributes that an object has in slots, by their descriptors, which a frozen object has too."""
    slots = _slots(type(value))
    if not slots:
        return None
    return Names(
        value,
        list(slots),
        lambda name: slots[name].__get__(value),
        lambda name, new: slots[name].__set__(value, new),
        delete=lambda name: slots[name].__delete__(value),
    )


@functools.lru_cache(1024)
def _slots(cls: type) -> dict[str, Any]:
    held = [vars(each) for each in reversed(cls.__mro__) if "__slots__" in vars(each)]
    return {name: each for names in held for name, each in names.items() if type(each) is MemberDescriptorType}


@functools.cache
def is_installed(module: Any) -> bool:
    """True for a module that is not the user's own code: of an installed package or the standard library."""
    if not isinstance(module, str):  # a compiled class may give a descriptor for its name
        return True
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return top in TOOLS or top in sys.stdlib_module_names or "-packages" in file


class CodeNames(NamedTuple):
    """The names that a function and its inner functions use.

    Attributes:
        variables: global variables, those of builtins too.
        attributes: all attributes, and all text that may name one where the code asks for it by text.
        stored: global variables that are assigned.
        imported: modules.
        assigned: attributes that are assigned.
        chains: variables with the attributes that are read from them: ``os.environ`` as ("os", "environ").
    """

    variables: list[str]
    attributes: list[str]
    stored: list[str]
    imported: list[str]
    assigned: list[str]
    chains: list[tuple[str, ...]]


_BY_TEXT = {"getattr", "setattr", "globals", "vars", "__dict__", "delattr"}


@functools.lru_cache(4096)
def names_in(code: CodeType) -> CodeNames:
    """Return the names that a function's code and that of its inner functions use."""
    inner = [names_in(each) for each in code.co_consts if isinstance(each, CodeType)]
    found: list[set[Any]] = [set(), set(code.co_names), set(), set(), set(), set()]
    chain: tuple[str, ...] = ()
    for each in dis.get_instructions(code):
        if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chain = (each.argval,)
        elif each.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain = (*chain, each.argval)
        elif each.opname not in ("COPY", "DUP_TOP", "PUSH_NULL"):
            if len(chain) > 1:
                found[5].add(chain)
            chain = ()
        if each.opname == "IMPORT_NAME":
            found[3].add(each.argval)
        elif each.opname.endswith(("_GLOBAL", "_NAME")):
            found[0].add(each.argval)
            if each.opname.startswith("STORE"):
                found[2].add(each.argval)
        elif each.opname == "STORE_ATTR":
            found[4].add(each.argval)
    if any(isinstance(each, tuple) and "file" in each for each in code.co_consts):
        found[1].add("file")  # print(..., file=...)
    if not _BY_TEXT.isdisjoint(code.co_names):
        text = {each for each in code.co_consts if isinstance(each, str) and each.isidentifier()}
        found[1] |= text
        found[0] |= text if "globals" in code.co_names else set()
    for names in inner:
        for own, each in zip(found, names, strict=True):
            own.update(each)
    return CodeNames(*map(sorted, found))  # type: ignore[arg-type]


def chains_of(function: FunctionType) -> Iterator[tuple[ModuleType, str, Any, bool]]:
    """Yield each attribute of an installed module that a function names: module, name, value, and if it is assigned."""
    used = names_in(function.__code__)
    for root, *names in used.chains:
        holder: Any = function.__globals__.get(root)
        for name in names:
            if not isinstance(holder, ModuleType) or not is_installed(holder.__name__):
                break
            value = getattr(holder, name, None)
            if not isinstance(value, ModuleType):
                yield holder, name, value, name in used.assigned
            holder = value


OF_ALL_MODULES = [
    value for name, value in vars(nn.modules.module).items() if name.startswith("_global_") and isinstance(value, dict)
]


def beside_models() -> Iterator[tuple[Any, str]]:
    """Yield what runs in every model: hooks on all modules, and modes that see every function or operator."""
    for hooks in OF_ALL_MODULES:
        yield from ((hook, "a hook on all modules") for hook in hooks.values())
    for modes in (_get_current_function_mode_stack(), _get_current_dispatch_mode_stack()):
        yield from ((mode, "a mode") for mode in modes)


_OF_EVERY_HANDLER = frozenset(("_name", "level", "formatter", "filters", "lock", "_closed"))


def names_of_handlers() -> Iterator[Names]:
    """Yield what the handlers of log records hold: all of the user's handlers, the records of the standard ones."""
    for handler in [reference() for reference in list(logging._handlerList)]:  # type: ignore[attr-defined]
        if handler is None:
            continue
        module, held = type(handler).__module__, vars(handler)
        if module.partition(".")[0] == "logging":
            kept = (list, io.StringIO, io.BytesIO, queue.Queue)
            names = [name for name in ("buffer", "queue", "stream") if isinstance(held.get(name), kept)]
        elif is_installed(module):
            continue
        else:
            names = [name for name in held if name not in _OF_EVERY_HANDLER]
        if names:
            yield Names(handler, names, held.__getitem__, held.__setitem__)


def imported(names: list[str], space: Mapping[str, Any]) -> list[Any]:
    """Return the modules of Python that a function imports itself, if they are there."""
    package = space.get("__package__") or ""
    return [sys.modules.get(name) or sys.modules.get(f"{package}.{name}") for name in names]
