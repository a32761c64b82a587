"""Find the state that a forward may change: everything that can be reached from a model and its loss.

That is: buffers and attributes of modules; the contents of these attributes, such as lists, dictionaries, objects, and
modules that are not submodules (a teacher in a list); variables in the closures of functions and hooks; attributes of
the user's own classes; and the global variables that the user's functions name, also in other files of the user.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from batchtrim.engine.kinds import WRAPPERS, Kind, changed_by, is_entered, kind_of
from batchtrim.engine.memory import is_array
from batchtrim.engine.names import (
    CONTAINERS,
    FIXED,
    OF_EVERY_MODULE,
    Names,
    Unbound,
    attributes_of,
    beside_models,
    chains_of,
    closure_of,
    imported,
    is_installed,
    names_in,
    names_of_handlers,
    slots_of,
)

__all__ = ["HOOKS", "Names", "Reachable"]

_MADE_OF = ("_orig", "_g")  # suffixes of parameters from which torch.nn.utils (prune, weight_norm) computes a weight
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DEEP, _NEAR = 16, 3  # levels of objects within objects that are searched: for state, for iterators
# Bytes of an array, and entries of a container, that are copied if no module holds it; entries that are searched then.
_LARGE, _MANY, _SEARCHED = 2**24, 2**20, 10_000
_PLAIN = frozenset((list, dict, set, frozenset, tuple, bytearray))  # without attributes of their own
_TAKEN_TWICE = "it holds an iterator ({}), of which a second forward would take the next value"
_CHANGES = "it holds an object of type {} ({}), which a second forward would change again, and which cannot be put back"
_SET_UP = frozenset(("__init__", "__repr__", "__del__", "__getstate__", "__setstate__", "extra_repr"))


class Reachable:
    """The state that can be reached from the roots: a model, and the function that computes its loss.

    Args:
        passed: objects to leave out.

    Attributes:
        modules: each module once.
        names: of modules, and of the objects, classes and functions reached from them.
        of_tensors: parameters, buffers and all other tensors found, whose attributes may change too.
        contents: objects that can change in place, including tensors that are neither parameters nor buffers.
        watched: tensors that are too large to copy in every step, or do not belong to the model: parameters that the
            first root does not list, and tensors that functions name.
        iterators: descriptions of iterators that modules hold or functions name. Their next value can be taken only
            once, so they cannot be restored.
        changing: type and description of objects that cannot be restored either, and that a function changes.
        with_graph: descriptions of the places that hold a tensor with a graph.
        functions: the user's own.
        caches: those of the user's functions with ``functools.lru_cache``.
    """

    def __init__(self, *roots: Any, passed: Iterable[Any] = ()) -> None:
        self.modules: list[nn.Module] = []
        self.names: list[Names] = []
        self.of_tensors: list[Tensor] = []
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
        self._files: list[ModuleType] = []  # modules of Python that are held, and not only named
        self._suspects: list[tuple[Any, str, frozenset[str]]] = []  # what functions change if they name one of these
        self._set_up: set[int] = set()  # functions that no forward runs
        for number, root in enumerate(roots):
            self._walk(root, "the loss" if number else "x or y", _DEEP, own=True)
        if isinstance(next(iter(roots), None), nn.Module):
            self._beside_models()
        self._held_files()
        self.changing = self._changed_by_functions()

    def _walk(self, value: Any, name: str, deep: int, own: bool) -> None:
        """Search a value. ``own``: a module holds it. ``deep``: how many more levels of objects to enter."""
        cls = type(value)
        if cls in FIXED:
            return
        kind = kind_of(cls)
        if kind is Kind.CLASS:
            if not is_installed(value.__module__):
                self._class(value)
        elif kind is Kind.MODULE:
            for module in value.modules():
                if self._is_new(module):
                    self._module(module)
        elif kind is not Kind.NOTHING and self._is_new(value):
            _BY_KIND[kind](self, value, name, deep, own)

    def _file(self, value: Any, name: str, deep: int, own: bool) -> None:
        if not is_installed(value.__name__):
            self._files.append(value)

    def _tensor(self, value: Any, name: str, deep: int, own: bool) -> None:
        if value.grad_fn is not None:
            self.with_graph.append(name)
        (self.contents if own and not isinstance(value, nn.Parameter) else self.watched).append(value)
        self._of_tensor(value, name, deep)

    def _of_tensor(self, tensor: Tensor, name: str, deep: int) -> None:
        """Add a tensor and what its attributes hold, unless it is made of them (a DTensor)."""
        self.of_tensors.append(tensor)
        if deep and not hasattr(tensor, "__tensor_flatten__"):
            for value in vars(tensor).values():
                self._walk(value, name, deep - 1, own=False)

    def _array(self, value: Any, name: str, deep: int, own: bool) -> None:
        if is_array(value) or not hasattr(value, "dtype"):
            size = value.nbytes if hasattr(value, "nbytes") else memoryview(value).nbytes
            if own or size <= _LARGE:
                self.contents.append(value)
        elif hasattr(value.base, "nbytes") and value.base.nbytes <= _LARGE:
            self._walk(value.base, name, deep, own)  # a view that cannot be written into
        if getattr(getattr(value, "dtype", None), "hasobject", False) and (own or value.size <= _SEARCHED):
            for item in value.ravel().tolist():
                self._walk(item, name, deep, own)
        self._extra(value, deep, own)

    def _in_place(self, value: Any, name: str, deep: int, own: bool) -> None:
        if isinstance(value, io.IOBase):
            if value.closed:
                return
        elif isinstance(value, memoryview) or hasattr(value, "madvise"):
            try:
                with memoryview(value) as view:
                    if view.readonly or view.nbytes > _LARGE or not view.c_contiguous:
                        return
            except (ValueError, BufferError):  # released or closed
                return
            if isinstance(value, memoryview):
                self._walk(value.obj, name, deep, own)
        elif hasattr(value, "spawn"):  # a generator of NumPy's: its seeds count what they gave away
            self._suspects.append((value, name, frozenset(("spawn",))))
        self.contents.append(value)
        self._extra(value, deep, own)

    def _bound(self, value: Any, name: str, deep: int, own: bool) -> None:
        if value.__self__ is not None and not isinstance(value.__self__, type):
            self._walk(value.__self__, name, deep, own)

    def _cache(self, value: Any, name: str, deep: int, own: bool) -> None:
        if not is_installed(value.__module__ or ""):
            self.caches.append(value)
            self._walk(value.__wrapped__, name, deep, own=False)

    def _reference(self, value: Any, name: str, deep: int, own: bool) -> None:
        try:
            found = value() if isinstance(value, weakref.ref) else value.__repr__.__self__
        except ReferenceError:
            return
        self._walk(found, name, deep, own=False)

    def _through(self, value: Any, name: str, deep: int, own: bool) -> None:
        for each in gc.get_referents(value):
            self._walk(each, name, deep, own)

    def _changing(self, value: Any, name: str, deep: int, own: bool) -> None:
        if not (isinstance(value, io.IOBase) and (value.closed or value in _standard_files())):
            self._suspects.append((value, name, changed_by(type(value))))

    def _iterator(self, value: Any, name: str, deep: int, own: bool) -> None:
        if deep >= _DEEP - _NEAR:
            attribute = name.rpartition(".")[2]
            if own or attribute == name:
                self.iterators.append(name)
            else:  # of an object or class that a function names: if it names the iterator, too
                self._suspects.append((value, name, frozenset((attribute,))))

    def _variable(self, value: Any, name: str, deep: int, own: bool) -> None:
        self.names.append(Names(value, [value.name], lambda _: value.get(), lambda _, new: value.set(new)))
        self._walk(value.get(None), name, deep, own)

    def _optimizer(self, value: Any, name: str, deep: int, own: bool) -> None:
        self._container(value.param_groups, name, deep, own)  # a forward that steps writes into parameters, too

    def _entered(self, value: Any, name: str, deep: int, own: bool) -> None:
        if deep and is_entered(type(value), own):
            self._object(value, deep - 1, own)

    def _extra(self, value: Any, deep: int, own: bool) -> None:
        """Search the attributes of a container, an array or a generator of a class of the user's."""
        if type(value) not in _PLAIN and deep and (hasattr(value, "__dict__") or is_entered(type(value), own)):
            self._object(value, deep - 1, own)

    @property
    def lasting(self) -> str | None:
        """The reason why a second forward cannot start where the first did, or None."""
        if self.iterators:
            return _TAKEN_TWICE.format(self.iterators[0])
        return _CHANGES.format(*self.changing[0]) if self.changing else None

    def _changed_by_functions(self) -> list[tuple[str, str]]:
        if not self._suspects:
            return []
        functions = [each for each in self.functions if id(each) not in self._set_up]
        used = set().union(*(names_in(each.__code__).attributes for each in functions))
        found = [(value, name) for value, name, needed in self._suspects if not needed.isdisjoint(used)]
        self.iterators += [name for value, name in found if kind_of(type(value)) is Kind.ITERATOR]
        return [
            (f"{type(value).__module__}.{type(value).__name__}", name)
            for value, name in found
            if kind_of(type(value)) is not Kind.ITERATOR
        ]

    def _is_new(self, value: Any) -> bool:
        known = id(value) in self._seen
        self._seen[id(value)] = value
        return not known

    def _module(self, module: nn.Module) -> None:
        self.modules.append(module)
        self.watched += [p for p in module._parameters.values() if p is not None and self._is_new(p)]
        for tensor in [each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None]:
            self._is_new(tensor)
            self._of_tensor(tensor, f"an attribute of a parameter or buffer of {type(module).__name__}", _DEEP)
        held = vars(module)
        for hook in [hook for hooks in HOOKS if held.get(hooks) for hook in held[hooks].values()]:
            self._walk(hook, f"a hook of {type(module).__name__}", _DEEP, own=False)
        if not type(module).__module__.startswith("torch.distributed"):  # these set attributes in their first forward
            self.names.append(attributes_of(module))
            for name, value in list(held.items()):
                if name in OF_EVERY_MODULE or type(value) in FIXED:
                    continue
                if not any(f"{name}{end}" in module._parameters for end in _MADE_OF):
                    self._walk(value, f"{type(module).__name__}.{name}", _DEEP, own=True)
        self._class(type(module))

    def _container(self, value: Any, name: str, deep: int, own: bool) -> None:
        if isinstance(value, CONTAINERS) and (own or len(value) <= _MANY):
            self.contents.append(value)
        self._extra(value, deep, own)
        if not own and len(value) > _SEARCHED:
            return
        parts = (value.keys(), value.values()) if isinstance(value, Mapping) else (value,)
        for items in parts:
            if not FIXED.issuperset(map(type, items)):  # fast for large containers of constants, such as a vocabulary
                for item in list(items):
                    self._walk(item, name, deep, own)

    def _object(self, value: Any, deep: int, own: bool) -> None:
        held = getattr(value, "__dict__", None)
        if not isinstance(held, dict):
            held = {}
        elif type(value).__module__ not in WRAPPERS:
            self.names.append(attributes_of(value))
        slots = slots_of(value)
        if slots is not None:
            self.names.append(slots)
        items = [*held.items(), *((name, slots.value(name)) for name in slots.names)] if slots else list(held.items())
        for name, item in items:
            self._walk(item, f"{type(value).__name__}.{name}", deep, own)
        self._class(type(value))

    def _class(self, cls: type) -> None:
        if not self._is_new(cls):
            return
        for each in cls.__mro__:
            if is_installed(each.__module__) or (each is not cls and not self._is_new(each)):
                continue
            held = vars(each)
            bind, delete = partial(type.__setattr__, each), partial(type.__delattr__, each)
            self.names.append(Names(each, list(held), held.__getitem__, bind, delete=delete, space=held))
            for name, value in list(held.items()):
                function = getattr(value, "fget", getattr(value, "__func__", value))
                if name in _SET_UP and issubclass(each, nn.Module):
                    self._set_up.add(id(function))
                if name[:2] != "__" or isinstance(function, FunctionType):
                    self._walk(function, f"{each.__name__}.{name}", _DEEP, own=False)
        if not is_installed(type(cls).__module__):
            self._class(type(cls))

    def _callable(self, value: Any, name: str, deep: int, own: bool) -> None:
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
        spaces = [closure_of(function)]
        if is_installed(function.__module__ or ""):
            own = vars(function)
            spaces.append(Names(function, list(own), own.__getitem__, own.__setitem__))
        else:
            self.names.append(attributes_of(function))
            self.functions.append(function)
            spaces += self._globals(function)
        self.names += [each for each in spaces if each.names]
        values = [each.value(name) for each in spaces for name in each.names]
        return [*values, *vars(function).values(), function.__defaults__, function.__kwdefaults__]

    def _globals(self, function: FunctionType) -> list[Names]:
        """Return the global variables that a function names, including those of the user's other files."""
        used, space = names_in(function.__code__), function.__globals__
        named = [name for name in used.variables if name in space]
        missing = [name for name in used.stored if name not in space]
        once = [name for name in named if kind_of(type(space[name])) is Kind.ITERATOR]
        self.iterators += [f"the global variable {name}" for name in once if self._is_new(space[name])]
        delete = space.__delitem__
        found = [Names(function, [*named, *missing], space.__getitem__, space.__setitem__, delete=delete)]
        for module, name, value, assigned in chains_of(function):
            if value is _decimal_context():
                self._walk(value(), name, 0, own=False)
            elif value is sys.modules:
                self._walk(sys.modules.get(function.__module__), name, 0, own=False)
            elif isinstance(value, (*CONTAINERS, type(os.environ))):
                self._walk(value, name, 0, own=False)
            elif assigned:
                found.append(Names(module, [name], partial(getattr, module), partial(setattr, module)))
        files, seen = [space[name] for name in named] + imported(used.imported, space), set()
        while files:
            file = files.pop()
            if isinstance(file, ModuleType) and id(file) not in seen and not is_installed(file.__name__):
                seen.add(id(file))
                held = vars(file)
                inside = [each for each in used.attributes if each in held]
                found.append(Names(file, inside, held.__getitem__, held.__setitem__))
                files += [held[each] for each in inside]
        return found

    def _held_files(self) -> None:
        """Search the variables of modules of Python that are held, as far as any function names them."""
        seen: set[tuple[int, str]] = set()
        while self._files:
            used = set().union(*(names_in(each.__code__).attributes for each in self.functions))
            new = [(f, n) for f in self._files for n in used & vars(f).keys() if (id(f), n) not in seen]
            if not new:
                return
            for file, name in new:
                seen.add((id(file), name))
                held = vars(file)
                self.names.append(Names(file, [name], held.__getitem__, held.__setitem__))
                self._walk(held[name], name, _DEEP, own=False)

    def _beside_models(self) -> None:
        """Search hooks on all modules, modes, and what the handlers of log records keep in memory; not their files."""
        for each, name in beside_models():
            self._walk(each, name, _DEEP, own=True)
        for names in names_of_handlers():
            self.names.append(names)
            for name in names.names:
                held = names.value(name)
                if not isinstance(held, io.IOBase) or isinstance(held, (io.StringIO, io.BytesIO)):
                    self._walk(held, f"{type(names.owner).__name__}.{name}", _DEEP, own=False)


_BY_KIND: dict[Kind, Callable[[Reachable, Any, str, int, bool], None]] = {
    Kind.FILE: Reachable._file,
    Kind.TENSOR: Reachable._tensor,
    Kind.CONTAINER: Reachable._container,
    Kind.ARRAY: Reachable._array,
    Kind.IN_PLACE: Reachable._in_place,
    Kind.CALLABLE: Reachable._callable,
    Kind.BOUND: Reachable._bound,
    Kind.CACHE: Reachable._cache,
    Kind.REFERENCE: Reachable._reference,
    Kind.THROUGH: Reachable._through,
    Kind.CHANGING: Reachable._changing,
    Kind.ITERATOR: Reachable._iterator,
    Kind.VARIABLE: Reachable._variable,
    Kind.OPTIMIZER: Reachable._optimizer,
    Kind.OBJECT: Reachable._entered,
}


def _decimal_context() -> Any:
    return getattr(sys.modules.get("decimal"), "getcontext", Unbound)


def _standard_files() -> list[Any]:
    return [sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__]
