"""A short hash of the user's program: of a file, or of a function in memory with what it uses.

Comments, docstrings and layout do not change it.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import dis
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import batchtrim
from batchtrim._checks import plain

__all__ = ["PACKAGE", "content_of", "hash_of_function", "hash_of_source", "is_installed"]

PACKAGE = str(Path(batchtrim.__file__).parent)
_INSTALLED = (PACKAGE, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))
"""Folders that do not hold the user's code."""
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_HOLDERS = (types.SimpleNamespace, argparse.Namespace)


def is_installed(file: str | None) -> bool:
    """True if a module's file is not the user's own."""
    return file is not None and file.startswith(_INSTALLED)


def hash_of_source(source: str) -> str:
    """Return the hash of the program in a file.

    Raises:
        SyntaxError, ValueError: it is no program.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            node.body = [each for each in node.body if not _is_docstring(each)]
    return _hash(ast.dump(tree))


def hash_of_function(function: Callable[..., Any]) -> str:
    """Return the hash of a function in memory: of its code, and of what it uses.

    It uses the user's functions and classes that it names, and the values that it closes over, has as defaults or reads
    from its module. Values count if they are settings: numbers and text, tuples and dictionaries of these, dataclasses
    and namespaces. Lists, arrays and what the function itself assigns are data, and do not count.
    """
    parts = _Program()
    parts.add("", function, called=True)
    return _hash("\n".join(parts.found))


class _Program:
    """The parts of a function that count, as lines of text."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._seen: set[int] = set()

    def add(self, name: str, value: Any, *, called: bool = False) -> None:
        """Add a value and what it refers to.

        Args:
            called: it is the function itself: if that is an object, the settings that it holds count.
        """
        if type(value).__module__.partition(".")[0] in ("numpy", "torch"):
            value = plain(value)
        if _is_setting(value):
            self.found.append(f"{name}={value!r}")
        elif isinstance(value, functools.partial):
            self.add(name, value.func, called=called)
            self._add_all({**{str(place): each for place, each in enumerate(value.args)}, **value.keywords})
        elif isinstance(value, types.MethodType):
            self.add(name, value.__func__)
            self._add_object(value.__self__)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, staticmethod | classmethod):
            self.add(name, value.__func__)
        elif isinstance(value, property):
            self._add_all({"get": value.fget})
        elif "__wrapped__" in getattr(value, "__dict__", {}):  # functools.cache and others
            self.add(name, value.__wrapped__)
        elif called or dataclasses.is_dataclass(value) or isinstance(value, _HOLDERS):
            self._add_object(value)
        elif not isinstance(value, types.ModuleType):
            self._add_class(type(value))

    def _add_all(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.add(name, value)

    def _add_object(self, value: Any) -> None:
        self._add_class(value if isinstance(value, type) else type(value))
        if self._is_new(value):
            self._add_all({name: each for name, each in getattr(value, "__dict__", {}).items() if _is_setting(each)})

    def _add_class(self, kind: type) -> None:
        module = sys.modules.get(kind.__module__)
        if (kind.__module__ == "__main__" or _is_users(module)) and self._is_new(kind):
            self.found.append(f"class {kind.__name__}")
            hidden = ("__doc__", "__dict__", "__weakref__", "__module__", "__firstlineno__", "__static_attributes__")
            self._add_all({name: value for name, value in vars(kind).items() if name not in hidden})
            for base in kind.__bases__:
                self._add_class(base)

    def _add_function(self, function: types.FunctionType) -> None:
        if is_installed(function.__code__.co_filename) or not self._is_new(function):
            return
        self.found += _lines_of_code(function.__code__)
        written = set(_names_written_by(function.__code__))
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self._add_all({name: content_of(cell) for name, cell in cells if name not in written})
        self._add_all({str(place): each for place, each in enumerate(function.__defaults__ or ())})
        self._add_all(function.__kwdefaults__ or {})
        names = sorted(set(_names_used_by(function.__code__)) - written)
        for name in names:
            value = function.__globals__.get(name)
            if isinstance(value, types.ModuleType) and _is_users(value):
                self._add_all({each: vars(value)[each] for each in names if each in vars(value)})
            elif name in function.__globals__:
                self.add(name, value)

    def _is_new(self, value: object) -> bool:
        new = id(value) not in self._seen
        self._seen.add(id(value))
        return new


def _is_setting(value: Any) -> bool:
    """True for a number or text, tuples and sets of them that cannot change, and tables of them by name."""
    if type(value) in _SCALARS:
        return True
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return isinstance(value, dict) and all(type(each) in (*_SCALARS, tuple) and _is_setting(each)
                                           for each in (*value, *value.values()))  # fmt: skip


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _lines_of_code(code: types.CodeType) -> list[str]:
    """Return what a function's code does, without its docstrings and lines."""
    found = []
    for each in _codes(code):
        consts = [const for const in each.co_consts if not isinstance(const, types.CodeType)]
        if consts and isinstance(consts[0], str) and not each.co_name.startswith("<"):
            consts[0] = None  # a docstring, or None in its place
        text = [sorted(map(repr, const)) if isinstance(const, frozenset) else const for const in consts]
        found.append(f"{each.co_name} {each.co_code.hex()} {text!r} {each.co_names} {each.co_varnames}")
    return found


def _names_used_by(code: types.CodeType) -> Iterator[str]:
    for each in _codes(code):
        yield from each.co_names


def _names_written_by(code: types.CodeType) -> Iterator[str]:
    """Yield the variables outside of a function that it changes itself, such as a counter: they are no settings."""
    for each in _codes(code):
        yield from (
            step.argval for step in dis.get_instructions(each) if step.opname in ("STORE_GLOBAL", "STORE_DEREF")
        )


def content_of(cell: types.CellType) -> Any:
    """Return the value of a closure's variable; None if it is not assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _is_users(module: types.ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and not is_installed(file)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
