"""The state of the process around the user's function: seeded before the call, restored after it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    folder, process = Path.cwd(), os.getpid()
    before = [read() for read, _ in _STATE]
    drawn, drawn_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (the global one, which tasks use)
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield ProcessChanges()
    finally:
        if os.getpid() != process:
            os._exit(0)  # the function forked and also returned in the child: the run belongs to the parent
        for (read, write), value in zip(_STATE, before, strict=True):
            if read() != value:
                write(value)
        os.chdir(folder)
        random.setstate(drawn)
        np.random.set_state(drawn_numpy)  # noqa: NPY002


def _packages() -> dict[str, None]:
    names = [name for name in list(sys.modules) if "." not in name]  # a part is never there without its package
    return {name: None for name in names if name not in sys.stdlib_module_names and not name.startswith("_")}


def _is_a_librarys(thread: threading.Thread) -> bool:
    module = sys.modules.get(type(thread).__module__)
    return thread.daemon and type(thread) is not threading.Thread and is_installed(getattr(module, "__file__", None))


def _default_device() -> str | None:
    device = str(torch.get_default_device())
    # before torch 2.5, a default of None cannot be read again
    return None if device == "cpu" and torch.__version__ >= "2.5" else device


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_streams(streams: tuple[Any, Any]) -> None:
    sys.stdout, sys.stderr = streams


def _errors() -> list[Any]:
    return [each for each in warnings.filters if each[0] == "error"]


def _set_errors(errors: list[Any]) -> None:
    """Remove filters that turn warnings into errors; keep other filters of modules that the function imported."""
    filters: Any = warnings.filters
    filters[:] = [each for each in warnings.filters if each[0] != "error" or each in errors]


_STATE: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (_default_device, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (_deterministic, lambda held: torch.use_deterministic_algorithms(held[0], warn_only=held[1])),
    (np.geterr, lambda held: np.seterr(**held)),
    (lambda: (sys.stdout, sys.stderr), _set_streams),
    (_errors, _set_errors),
)
"""State of the process that a function may change, as pairs of getter and setter."""
