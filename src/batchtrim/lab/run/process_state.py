"""The state of the process around the user's function: seeded before the call, restored after it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator

import torch

from batchtrim.lab import process
from batchtrim.lab.task.fingerprint import is_installed

__all__ = ["ProcessChanges", "seeded_and_restored"]


class ProcessChanges:
    """Changes that the function made to the process."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._processes = set(multiprocessing.active_children())
        self.begin()

    def begin(self) -> None:
        """Treat everything imported so far as not part of the call."""
        self._packages = _packages()

    def imported(self) -> list[str]:
        """Return the packages imported since, in order, without the standard library."""
        return [name for name in _packages() if name not in self._packages]

    @property
    def torch_seed(self) -> int:
        return torch.initial_seed()

    def threads(self) -> list[str]:
        """Return the names of threads left running, without those of libraries, such as tqdm's monitor."""
        return [each.name for each in threading.enumerate() if each not in self._threads and not _is_a_librarys(each)]

    def processes(self) -> list[str]:
        """Return the names of :mod:`multiprocessing` processes left running."""
        return [each.name for each in multiprocessing.active_children() if each not in self._processes]


@contextlib.contextmanager
def seeded_and_restored(seed: int, threads: int) -> Iterator[ProcessChanges]:
    """Seed torch, NumPy and ``random``, and afterwards restore what the function changed in the process."""
    here = os.getpid()
    with process.restored(threads):
        try:
            process.seed(seed)
            yield ProcessChanges()
        finally:
            if os.getpid() != here:
                os._exit(0)  # the function forked and also returned in the child: the run belongs to the parent


def _packages() -> dict[str, None]:
    names = [name for name in list(sys.modules) if "." not in name]  # a part is never there without its package
    return {name: None for name in names if name not in sys.stdlib_module_names and not name.startswith("_")}


def _is_a_librarys(thread: threading.Thread) -> bool:
    module = sys.modules.get(type(thread).__module__)
    return thread.daemon and type(thread) is not threading.Thread and is_installed(getattr(module, "__file__", None))
