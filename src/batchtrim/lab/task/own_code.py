"""The user's own code: a function in a file, such as ``my_task.py:train``, or one that is already in memory.

It is loaded like a script: its folder comes first on ``sys.path``. Errors inside it are reported
with the user's lines only.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import os
import random
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from batchtrim._checks import describe, import_extra, nearest
from batchtrim.lab import process
from batchtrim.lab.files import expanded
from batchtrim.lab.task.fingerprint import PACKAGE, hash_of_function, hash_of_source, is_installed

__all__ = ["Code", "YourCodeFailed", "as_a_program", "hash_of_file", "own_folders_hidden", "own_traceback"]

_loaded: dict[tuple[str, str], tuple[ModuleType, process.Changes]] = {}
"""Modules, and what their files set in the process, which every run of them finds."""
_folders: set[str] = set()
"""Folders put on ``sys.path`` here."""


class YourCodeFailed(ValueError):
    """The user's code raised an error; the message has their lines of the traceback."""


@dataclass(frozen=True)
class Code:
    """A user's function.

    Attributes:
        name: as shown and recorded: ``my_task.py:train``, or a function's own name.
        path, attribute: the file and the name in it; None for a function object.
        source: a short hash of the program in the file, or of the function with what it uses, as in
            :mod:`batchtrim.lab.task.fingerprint`; what the file imports is in :meth:`helpers`.
    """

    name: str
    path: str | None = None
    attribute: str = ""
    source: str = ""
    function: Callable[..., Any] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def in_file(cls, text: str, what: str) -> Code:
        """Return the function that ``FILE.py:NAME`` names; the file is parsed but not yet run.

        Args:
            what: the name of the argument, for the message.
        """
        file, colon, attribute = text.rpartition(":")
        if not colon or not file.endswith(".py") or not attribute.isidentifier():
            example = "my_model.py:build" if what == "model" else "my_task.py:train"
            raise ValueError(f"expected `{what}` to look like {example}, got {text!r}.")
        path = expanded(file)
        if not path.is_file():
            there = [each.name for each in path.parent.glob("*.py")]
            hint = nearest(path.name, there, str(path).removesuffix(path.name))
            raise FileNotFoundError(f"expected a file {path} for `{what}`, got nothing there.{hint}")
        return cls(f"{path.name}:{attribute}", str(path.resolve()), attribute, hash_of_file(path))

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Code:
        """Wrap a function that is already in memory, as in a notebook."""
        if not callable(function):
            raise TypeError(f"expected a function or 'FILE.py:NAME', got {describe(function)}.")
        inner = function
        while isinstance(inner, functools.partial):
            inner = inner.func
        name = getattr(inner, "__name__", type(inner).__name__).strip("<>")
        return cls(name, source=hash_of_function(function), function=function)

    def load(self, arguments: int = 1) -> Callable[..., Any]:
        """Run the file and return the function.

        Args:
            arguments: the number of positional arguments it will be called with.

        Raises:
            ValueError, TypeError: there is no such function, or it does not take these arguments.
            YourCodeFailed: the file raised an error when it ran, or would get another program's module for its own.
        """
        function = self.function if self.path is None else self._in_module(_module(Path(self.path), self.source))
        self._refuse_namesakes(self.helpers())
        if not callable(function):
            raise TypeError(f"expected {self.name} to be a function, got {describe(function)}.")
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            kind = "an async one" if inspect.iscoroutinefunction(function) else "one that yields"
            raise TypeError(f"expected {self.name} to be a function that returns, got {kind}. Wrap it in a plain one.")
        try:
            signature = inspect.signature(function)
        except (ValueError, TypeError):
            return function  # some callables have no signature
        try:
            signature.bind(*[None] * arguments)
        except TypeError:
            wanted = {1: "one argument, the run", 2: "the image shape and the number of classes"}[arguments]
            raise TypeError(f"expected {self.name} to take {wanted}, got {self.attribute}{signature}.") from None
        return function

    def helpers(self) -> dict[str, str]:
        """Return a hash of every imported module in the file's folder, by file name.

        A file is read when its module is first seen, so the hash is that of the running code even if the file changes
        later.
        """
        if self.path is None:
            return {}
        folder, found = str(Path(self.path).parent) + os.sep, {}
        for module in list(sys.modules.values()):
            file = getattr(module, "__file__", None)
            if (
                not isinstance(file, str)
                or not file.startswith(folder)
                or not file.endswith(".py")
                or is_installed(file)
            ):
                continue
            if file != self.path and (helper := _first_hash(file, id(module))):
                found[file.removeprefix(folder)] = helper
        return dict(sorted(found.items()))

    def _refuse_namesakes(self, helpers: Collection[str]) -> None:
        """Refuse a module beside the file if the process has another one of that name, which the file would get."""
        if self.path is None:
            return
        folder, found = Path(self.path).parent, {}
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and "." not in name and not is_installed(file):
                beside = [folder / f"{name}.py", folder / name / "__init__.py"]
                own = next((each for each in beside if each.is_file()), None)
                if own is not None and os.path.realpath(file) != os.path.realpath(own):
                    found[name] = own, file
        for name in sorted(_imports_of([Path(self.path), *(folder / each for each in helpers)])) if found else ():
            if name in found:
                raise YourCodeFailed(
                    f"expected the import of {name!r} in {self.name} to get {found[name][0]}, got {found[name][1]}, "
                    "which another program in this process imported before. Rename one, or use a process for each."
                )

    def _in_module(self, module: ModuleType) -> Any:
        if hasattr(module, self.attribute):
            return getattr(module, self.attribute)
        there = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        hint = nearest(self.attribute, there) or f" It has {', '.join(there[:5]) or 'no functions'}."
        raise ValueError(f"expected a function {self.attribute!r} in {self.path}, got none.{hint}")

    def __getstate__(self) -> dict[str, Any]:
        """Send a notebook's function or a closure to another process by value."""
        state = dict(vars(self))
        if self.function is not None:
            pickler = import_extra("cloudpickle", "lab", "a function in another process")
            try:
                state["function"] = pickler.dumps(self.function)
            except Exception as error:  # objects that the function refers to raise their own errors
                raise TypeError(
                    f"expected a function that can go to another process, got {self.name}: {error}. Open files and "
                    "connections inside it, or pass workers=1."
                ) from error
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["function"] is not None:
            state["function"] = import_extra("cloudpickle", "lab", "a function in another process").loads(
                state["function"]
            )
        vars(self).update(state)


def _imports_of(files: Iterable[Path]) -> set[str]:
    """Return the names of the modules that Python files import, also in their functions, without those of parts."""
    names: list[str] = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                names += (each.name for each in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
    return {name.partition(".")[0] for name in names}


def own_traceback(error: BaseException) -> str:
    """Return the traceback of an error in the user's code from their first line on, without this package's lines.

    Chained errors, and those of a group, are reported in the same way.
    """
    told = traceback.TracebackException.from_exception(error)
    _leave_out_ours(told)
    return "".join(told.format()).rstrip()


def _leave_out_ours(told: traceback.TracebackException) -> None:
    frames = list(told.stack)
    ours = [frame.filename.startswith((PACKAGE, "<frozen importlib")) for frame in frames]
    theirs = [frame for frame, is_ours in zip(frames, ours, strict=True) if not is_ours]
    told.stack = traceback.StackSummary.from_list(theirs) if theirs else None  # type: ignore[assignment]
    for each in (told.__cause__, told.__context__, *(told.exceptions or ())):
        if each is not None:
            _leave_out_ours(each)


def _module(path: Path, source: str) -> ModuleType:
    """Return the file as a module; it runs once per process, and again after a change.

    What it sets in the process, such as the default dtype, it sets at each call.
    """
    known = str(path), source
    if known in _loaded:
        module, changes = _loaded[known]
        process.apply(changes)
        return module
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
        _folders.add(folder)
    there = sys.modules.get(path.stem)
    taken = there is not None and getattr(there, "__file__", None) != str(path)
    spec = importlib.util.spec_from_file_location(f"_task_{path.stem}" if taken else path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before = process.settings()
    try:
        with as_a_program(path), _drawing_apart():
            spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(spec.name, None)
        raise YourCodeFailed(f"{path.name} raised when it was loaded.\n{own_traceback(error)}") from error
    except SystemExit as error:
        sys.modules.pop(spec.name, None)
        raise YourCodeFailed(
            f"expected {path.name} to define a function, got exit({error.code}) when it was loaded. "
            "Put what it runs by itself under: if __name__ == '__main__'"
        ) from error
    _loaded[known] = module, process.changes_since(before)
    return module


@contextlib.contextmanager
def _drawing_apart() -> Iterator[None]:
    """Let a file draw the same numbers in every process, and leave the generators as they were.

    The first run of a process runs the file after the run was seeded; later runs do not run it again.
    """
    import numpy as np
    import torch

    seed, on_gpu = torch.initial_seed(), torch.cuda.is_initialized()
    try:
        with process.generators_kept(), torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else []):
            torch.default_generator.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            yield
    finally:
        if not on_gpu:
            torch.cuda.manual_seed_all(seed)  # which a seed in the file has replaced; without a GPU it does nothing


@contextlib.contextmanager
def own_folders_hidden() -> Iterator[None]:
    """Take the folders of the user's files off ``sys.path``, so that a process started now imports libraries first.

    A file ``random.py`` or ``batchtrim.py`` there would otherwise be imported in place of the library, and end it.
    """
    before = sys.path
    sys.path = [each for each in before if each not in _folders]
    try:
        yield
    finally:
        sys.path = before


@contextlib.contextmanager
def as_a_program(path: str | Path | None) -> Iterator[None]:
    """Let code of a file see no command-line arguments, as if started without: ours are not for its argparse."""
    before = sys.argv
    sys.argv = list(before) if path is None else [str(path)]
    try:
        yield
    finally:
        sys.argv = before


def hash_of_file(path: Path) -> str:
    """Return the hash of the program in a file.

    Raises:
        YourCodeFailed: it is no program. OSError: it cannot be read.
    """
    try:
        return hash_of_source(path.read_bytes().decode("utf-8-sig"))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        line = getattr(error, "lineno", None)
        at = f" in line {line}" if line else ""
        raise YourCodeFailed(f"expected {path} to be Python, got {type(error).__name__}{at}: {error}.") from error


@functools.cache
def _first_hash(file: str, module: int) -> str:
    """Return the hash of a module's file at the first call; "" if the file is gone or not text."""
    try:
        return hash_of_file(Path(file))
    except (OSError, ValueError):
        return ""
