"""Find the state that a forward may change: everything that can be reached from a model and its loss.

That is: buffers and attributes of modules; the contents of these attributes, such as lists, dictionaries, objects, and
modules that are not submodules (a teacher in a list); variables in the closures of functions and hooks; attributes of
the user's own classes; and the global variables that the user's functions name, also in other files of the user.
"""

from __future__ import annotations

import dis
import enum
import functools
import io
import random
import sys
import threading
import weakref
from argparse import Namespace
from array import array
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "CONTAINERS",
    "HOOKS",
    "Names",
    "Reachable",
    "is_array",
    "is_numpy_generator",
    "numpy_state",
    "set_numpy_state",
]

CONTAINERS = (list, dict, set, deque)
_FIXED = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_STATE = (
    bool, int, float, complex, str, bytes, type(None), tuple, *CONTAINERS, Tensor, torch.Generator, random.Random,
)  # fmt: skip
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_MADE_OF = ("_orig", "_g")  # suffixes of parameters from which torch.nn.utils (prune, weight_norm) computes a weight
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Objects of these packages have no state that a forward changes, or are tools, such as a trainer that holds the data.
_TOOLS = frozenset((
    "accelerate", "batchtrim", "builtins", "functools", "lightning", "lightning_fabric", "logging", "numpy",
    "pytorch_lightning", "random", "torch",
))  # fmt: skip
_WRAPPERS = ("batchtrim.criteria", "batchtrim.losses")  # around a user's loss; they have no state of their own
# classes whose objects are places for values, of the standard library and one of torch's that draws numbers
_PLACES = (
    SimpleNamespace, Namespace, threading.local, UserDict, UserList, ChainMap,
    weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet, torch.quasirandom.SobolEngine,
)  # fmt: skip
_DEEP, _NEAR = 16, 3  # levels of objects within objects that are searched: for state, for iterators
# Bytes of an array, and entries of a container, that are copied if no module holds it; entries that are searched then.
_LARGE, _MANY, _SEARCHED = 2**24, 2**20, 10_000


@dataclass
class Names:
    """Names that a forward may rebind: attributes of an object or a class, or variables.

    Attributes:
        owner: the module, object, class or function whose names they are.
        read: returns a name's value, or raises LookupError, AttributeError or ValueError.
        bind: rebinds a name.
        whole: the owner's ``__dict__``, if names that are added later can be deleted from it; otherwise None.
    """

    owner: Any
    names: list[str]
    read: Callable[[str], Any]
    bind: Callable[[str, Any], None]
    whole: dict[str, Any] | None = None

    def state(self, known: Container[str] = ()) -> dict[str, Any]:
        """Return the values to restore, except those ``known``: attributes, and variables that are no functions."""
        if self.whole is not None:
            if not self.whole:  # as of most tensors
                return {}
            passed = _OF_EVERY_MODULE if isinstance(self.owner, nn.Module) else ()
            found = [pair for pair in self.whole.items() if pair[0] not in passed and pair[0] not in known]
            return {name: value for name, value in found if "dynamo" not in name}
        found = [(name, self._value(name)) for name in self.names]
        return {name: value for name, value in found if type(value) in _FIXED or _is_state(self.owner, name, value)}

    def set_up(self, noted: Mapping[str, Any]) -> bool:
        """Return True if an object has a new flag, function or object: what a first forward makes, and no later one."""
        new = self.state(known=noted).values() if self.whole is not None else ()
        return any(isinstance(value, bool) or not isinstance(value, _STATE) for value in new)

    def put_back(self, noted: Mapping[str, Any]) -> None:
        """Delete an object's new attributes, and rebind each name whose value has changed to its earlier value."""
        if self.whole is not None:
            for name in self.state(known=noted):
                del self.whole[name]
        for name, value in noted.items():
            if self._value(name) is not value:
                self.bind(name, value)

    def _value(self, name: str) -> Any:
        try:
            return self.read(name)
        except (AttributeError, LookupError, ValueError):
            return Names  # no value


class Reachable:
    """The state that can be reached from the roots: a model, and the function that computes its loss.

    Args:
        passed: objects to leave out.

    Attributes:
        modules: each module once.
        names: of modules, and of the objects, classes and functions reached from them.
        of_tensors: of parameters, buffers and all other tensors found.
        contents: objects that can change in place, including tensors that are neither parameters nor buffers.
        watched: tensors that are too large to copy in every step, or do not belong to the model: parameters that the
            first root does not list, and tensors that functions name.
        iterators: descriptions of iterators that modules hold or functions name. Their next value can be taken only
            once, so they cannot be restored.
        with_graph: descriptions of the places that hold a tensor with a graph.
        functions: the user's own.
        caches: those of the user's functions with ``functools.lru_cache``.
    """

    def __init__(self, *roots: Any, passed: Iterable[Any] = ()) -> None:
        self.modules: list[nn.Module] = []
        self.names: list[Names] = []
        self.of_tensors: list[Names] = []
        self.contents: list[Any] = []
        self.watched: list[Tensor] = []
        self.iterators: list[str] = []
        self.with_graph: list[str] = []
        self.functions: list[FunctionType] = []
        self.caches: list[Any] = []
        # by id; the values keep their objects alive, so that ids stay unique
        self._seen: dict[int, Any] = {id(value): value for value in passed}
        for parameter in roots[0].parameters() if isinstance(next(iter(roots), None), nn.Module) else ():
            self._seen[id(parameter)] = parameter
        for number, root in enumerate(roots):
            self._walk(root, "the loss" if number else "x or y", _DEEP, own=True)

    def _walk(self, value: Any, name: str, deep: int, own: bool) -> None:
        """Search a value. ``own``: a module holds it. ``deep``: how many more levels of objects to enter."""
        if isinstance(value, nn.Module):
            for module in value.modules():
                if self._is_new(module):
                    self._module(module)
        elif isinstance(value, type):
            if not (_is_installed(value.__module__) or issubclass(value, enum.Enum)):
                self._class(value)
        elif type(value) in _FIXED or isinstance(value, ModuleType) or not self._is_new(value):
            return
        elif isinstance(value, Tensor):
            if value.grad_fn is not None:
                self.with_graph.append(name)
            (self.contents if own and not isinstance(value, nn.Parameter) else self.watched).append(value)
            self.of_tensors.append(_attributes(value))
        elif isinstance(value, (tuple, frozenset, *CONTAINERS)):
            self._container(value, name, deep, own)
        elif is_array(value) or isinstance(value, (bytearray, array)):
            if own or memoryview(value).nbytes <= _LARGE:
                self.contents.append(value)
        elif isinstance(value, (torch.Generator, random.Random)) or is_numpy_generator(value):
            self.contents.append(value)
        elif isinstance(value, (FunctionType, MethodType, partial)):
            self._callable(value, name, deep)
        elif isinstance(value, functools._lru_cache_wrapper):
            if not _is_installed(value.__module__ or ""):
                self.caches.append(value)
                self._walk(value.__wrapped__, name, deep, own=False)
        elif isinstance(value, (io.StringIO, io.BytesIO)):
            if not value.closed:
                self.contents.append(value)
        elif isinstance(value, Iterator):
            if own and deep >= _DEEP - _NEAR and _is_iterator(value):
                self.iterators.append(name)
        elif isinstance(value, ContextVar):
            bind = partial(_set_variable, value)
            self.names.append(Names(value, [value.name], lambda _: value.get(), bind))
            self._walk(value.get(None), name, deep, own)
        elif isinstance(value, torch.optim.Optimizer):
            self._container(value.param_groups, name, deep, own)  # a forward that steps writes into parameters, too
        elif deep and _is_entered(type(value), own):
            self._object(value, deep - 1, own)

    def _is_new(self, value: Any) -> bool:
        known = id(value) in self._seen
        self._seen[id(value)] = value
        return not known

    def _module(self, module: nn.Module) -> None:
        self.modules.append(module)
        self.watched += [p for p in module._parameters.values() if p is not None and self._is_new(p)]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            self._is_new(tensor)
            if tensor is not None:
                self.of_tensors.append(_attributes(tensor))
        held = vars(module)
        for hook in [hook for hooks in HOOKS if held.get(hooks) for hook in held[hooks].values()]:
            self._walk(hook, f"a hook of {type(module).__name__}", _DEEP, own=False)
        if not type(module).__module__.startswith("torch.distributed"):  # these set attributes in their first forward
            self.names.append(Names(module, [], held.__getitem__, held.__setitem__, held))
            for name, value in list(held.items()):
                if name in _OF_EVERY_MODULE or type(value) in _FIXED:
                    continue
                if not any(f"{name}{end}" in module._parameters for end in _MADE_OF):
                    self._walk(value, f"{type(module).__name__}.{name}", _DEEP, own=True)
        self._class(type(module))

    def _container(self, value: Any, name: str, deep: int, own: bool) -> None:
        if isinstance(value, CONTAINERS) and (own or len(value) <= _MANY):
            self.contents.append(value)
        if not own and len(value) > _SEARCHED:
            return
        items = value.values() if isinstance(value, Mapping) else value
        if not _FIXED.issuperset(map(type, items)):  # fast for large containers of constants, such as a vocabulary
            for item in list(items):
                self._walk(item, name, deep, own)

    def _object(self, value: Any, deep: int, own: bool) -> None:
        held = getattr(value, "__dict__", None)
        if isinstance(held, dict) and type(value).__module__ not in _WRAPPERS:
            self.names.append(Names(value, [], held.__getitem__, held.__setitem__, held))
        listed = [getattr(cls, "__slots__", ()) for cls in type(value).__mro__]
        slots = [name for each in listed for name in ([each] if isinstance(each, str) else each) if name[:2] != "__"]
        if slots:
            self.names.append(Names(value, slots, partial(getattr, value), partial(setattr, value)))
        items = [*(held or {}).items(), *((name, getattr(value, name, None)) for name in slots)]
        for name, item in items:
            self._walk(item, f"{type(value).__name__}.{name}", deep, own)
        self._class(type(value))

    def _class(self, cls: type) -> None:
        if not self._is_new(cls):
            return
        for each in cls.__mro__:
            if _is_installed(each.__module__) or (each is not cls and not self._is_new(each)):
                continue
            held = vars(each)
            self.names.append(Names(each, list(held), held.__getitem__, partial(setattr, each)))
            for name, value in list(held.items()):
                function = getattr(value, "fget", getattr(value, "__func__", value))
                if name[:2] != "__" or isinstance(function, FunctionType):
                    self._walk(function, name, _DEEP, own=False)

    def _callable(self, value: Any, name: str, deep: int) -> None:
        if isinstance(value, partial):
            parts: list[Any] = [value.func, value.args, value.keywords]
        elif isinstance(value, MethodType):
            parts = [value.__self__, value.__func__]
        else:
            parts = self._function(value)
        for part in parts:
            self._walk(part, name, deep, own=False)

    def _function(self, function: FunctionType) -> list[Any]:
        """Add the variables of a function's closure and the globals that it names; return their values."""
        code = function.__code__
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        own = vars(function)
        spaces = [
            Names(function, list(cells), lambda name: cells[name].cell_contents, partial(_fill, cells)),
            Names(function, list(own), own.__getitem__, own.__setitem__),
        ]
        if not _is_installed(function.__module__ or ""):
            self.functions.append(function)
            spaces += self._globals(function)
        self.names += [each for each in spaces if each.names]
        values = [each._value(name) for each in spaces for name in each.names]
        return [*values, function.__defaults__, function.__kwdefaults__]

    def _globals(self, function: FunctionType) -> list[Names]:
        """Return the global variables that a function names, including those of the user's other files."""
        names, attributes = _names_in(function.__code__)
        space = function.__globals__
        named = [name for name in names if name in space]
        self.iterators += [f"the global variable {name}" for name in named if _is_iterator(space[name])]
        found = [Names(function, named, space.__getitem__, space.__setitem__)]
        files, seen = [space[name] for name in named], set()
        while files:
            file = files.pop()
            if isinstance(file, ModuleType) and id(file) not in seen and not _is_installed(file.__name__):
                seen.add(id(file))
                held = vars(file)
                inside = [each for each in attributes if each in held]
                found.append(Names(file, inside, held.__getitem__, held.__setitem__))
                files += [held[each] for each in inside]
        return found


def _is_iterator(value: Any) -> bool:
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase)


def _is_state(owner: Any, name: str, value: Any) -> bool:
    if (isinstance(owner, type) and name[:2] == "__") or isinstance(value, nn.Parameter):
        return False
    return isinstance(value, _STATE) or is_numpy_generator(value) or is_array(value)


def is_numpy_generator(value: Any) -> bool:
    """True for a ``Generator``, ``RandomState`` or ``BitGenerator`` of NumPy. Does not import it."""
    numpy: Any = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(value, (numpy.Generator, numpy.RandomState, numpy.BitGenerator))


def numpy_state(value: Any) -> Any:
    """Return the state of one of NumPy's generators; a RandomState has a normal number left over, too."""
    if hasattr(value, "get_state"):
        return value.get_state(legacy=False)
    return getattr(value, "bit_generator", value).state


def set_numpy_state(value: Any, state: Any) -> None:
    """Give one of NumPy's generators a state that it had."""
    if hasattr(value, "set_state"):
        value.set_state(state)
    else:
        getattr(value, "bit_generator", value).state = state


def is_array(value: Any) -> bool:
    """True for a NumPy array that can be written into. Does not import NumPy."""
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.flags.writeable


def _attributes(owner: Any) -> Names:
    held = vars(owner)
    return Names(owner, [], held.__getitem__, held.__setitem__, held)


def _set_variable(variable: ContextVar[Any], _: str, value: Any) -> None:
    variable.set(value)


def _fill(cells: dict[str, CellType], name: str, value: Any) -> None:
    cells[name].cell_contents = value


def _is_entered(cls: type, own: bool) -> bool:
    if cls.__module__ in _WRAPPERS or issubclass(cls, _PLACES):
        return True
    return cls.__module__.partition(".")[0] not in _TOOLS and (own or not _is_installed(cls.__module__))


@functools.cache
def _is_installed(module: str) -> bool:
    """True for a module that is not the user's own code: of an installed package or the standard library."""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return top in _TOOLS or top in sys.stdlib_module_names or "-packages" in file


@functools.lru_cache(4096)
def _names_in(code: CodeType) -> tuple[list[str], list[str]]:
    """Return the global names that a function and its inner functions use, and all names of attributes."""
    inner = [_names_in(each) for each in code.co_consts if isinstance(each, CodeType)]
    own = {each.argval for each in dis.get_instructions(code) if each.opname.endswith(("_GLOBAL", "_NAME"))}
    attributes = set(code.co_names).union(*(attributes for _, attributes in inner))
    return sorted(own.union(*(names for names, _ in inner))), sorted(attributes)
