"""The random generators and settings of the process, which every run finds as the command left them."""

from __future__ import annotations

import contextlib
import functools
import locale
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["apply", "changes_since", "drawn", "generators_kept", "restored", "seed", "set_drawn", "settings"]

Changes = list[tuple[Callable[[Any], object], Any]]


def seed(number: int) -> None:
    """Seed torch, NumPy and ``random``."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002  (the global one, which tasks use)


def drawn(device: torch.device) -> dict[str, Any]:
    """Return the state of the generators, also of a GPU's, as tensors, numbers and strings."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  (the global one)
    numpy = name, np.asarray(keys).tolist(), *rest
    state = {"torch": torch.get_rng_state(), "random": random.getstate(), "numpy": numpy}
    return state if device.type == "cpu" else {**state, device.type: getattr(torch, device.type).get_rng_state()}


def set_drawn(state: dict[str, Any]) -> None:
    """Continue drawing from :func:`drawn`."""
    for name, value in state.items():
        if name == "random":
            random.setstate(value)
        elif name == "numpy":
            np.random.set_state(value)  # noqa: NPY002
        else:
            (torch if name == "torch" else getattr(torch, name)).set_rng_state(value)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the CPU's generators as they were."""
    before = drawn(torch.device("cpu"))
    try:
        yield
    finally:
        set_drawn(before)


@contextlib.contextmanager
def restored(threads: int | None = None) -> Iterator[None]:
    """Leave generators and settings as they were; in between, torch has this number of threads."""
    before = settings()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with generators_kept():
            yield
    finally:
        apply(_changes(settings(), before))


def settings() -> list[Any]:
    """Return what a user's code may change in the process: see ``_STATE``."""
    return [read() for read, _ in _STATE]


def changes_since(before: list[Any]) -> Changes:
    """Return the settings that differ from ``before``, for :func:`apply`; the number of threads is the lab's own."""
    torch.set_num_threads(before[0])
    return _changes(before, settings())


def apply(changes: Changes) -> None:
    """Make the changes."""
    for write, value in changes:
        write(value)


def _changes(there: list[Any], wanted: list[Any]) -> Changes:
    triples = zip(_STATE, there, wanted, strict=True)
    return [(write, _difference(old, new)) for (_, write), old, new in triples if new != old]


def _difference(old: Any, new: Any) -> Any:
    """Return ``new``; of a table the entries that differ, None for one that it lacks, so that others stay."""
    if not isinstance(new, dict):
        return new
    return {name: new.get(name) for name in (*old, *new) if old.get(name) != new.get(name)}


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
    kept = [each for each in warnings.filters if each[0] != "error" or each in errors]
    filters[:] = [*(each for each in errors if each not in kept), *kept]


def _precision() -> tuple[str | None, list[str]]:
    """Return the precision of float32 as torch's older interface tells it, and as its newer one, if there is one."""
    read = getattr(torch._C, "_get_fp32_precision_getter", None)
    new = [] if read is None else [read(*each) for each in _OPERATIONS]
    try:
        return torch.get_float32_matmul_precision(), new
    except RuntimeError:  # the newer one has set what the older cannot tell
        return None, new


def _set_precision(held: tuple[str | None, list[str]]) -> None:
    torch.set_float32_matmul_precision(held[0] or "highest")
    for each, value in zip(_OPERATIONS, held[1], strict=False):
        torch._C._set_fp32_precision_setter(*each, value)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _set_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


def _set_environment(entries: Mapping[str, str | None]) -> None:
    for name, value in entries.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _alarm() -> bool:
    return hasattr(signal, "getitimer") and signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _set_alarm(on: bool) -> None:
    if not on:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _handlers() -> dict[int, Any]:
    """Return the handlers of signals, without that of ended children: libraries set it once, for the whole process."""
    return {each: signal.getsignal(each) for each in signal.valid_signals() if each != getattr(signal, "SIGCHLD", None)}


def _set_handlers(handlers: Mapping[int, Any]) -> None:
    for each, handler in handlers.items():
        if handler is not None and threading.current_thread() is threading.main_thread():  # None: not one of Python's
            signal.signal(each, handler)


def _set_start_method(name: str | None) -> None:
    multiprocessing.set_start_method(name, force=True)  # type: ignore[arg-type]


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _set_autocast_depth(depth: int) -> None:
    """Leave what was entered: only the outermost region forgets the weights that it has cast."""
    for _ in range(_autocast_depth() - depth):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return functools.partial(getattr, owner, name), functools.partial(setattr, owner, name)


def _of_device(get: Callable[[str], Any], write: Callable[[str, Any], object], device: str) -> Any:
    return functools.partial(get, device), functools.partial(write, device)


_OPERATIONS = [
    ("generic", "all"),
    *((place, name) for place in ("cuda", "mkldnn") for name in ("all", "matmul", "conv", "rnn")),
]

_STATE: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (_default_device, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (_precision, _set_precision),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (_deterministic, lambda held: torch.use_deterministic_algorithms(held[0], warn_only=held[1])),
    (np.geterr, lambda held: np.seterr(**held)),
    (lambda: (sys.stdout, sys.stderr), _set_streams),
    (_errors, _set_errors),
    *(_of_device(torch.is_autocast_enabled, torch.set_autocast_enabled, each) for each in ("cpu", "cuda")),
    *(_of_device(torch.get_autocast_dtype, torch.set_autocast_dtype, each) for each in ("cpu", "cuda")),
    *(_attribute(torch.backends.cudnn, each) for each in ("enabled", "benchmark", "deterministic")),
    (_autocast_depth, _set_autocast_depth),
    _attribute(torch.backends.mkldnn, "enabled"),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (lambda: sys.float_info.min / 2 == 0.0, torch.set_flush_denormal),
    (lambda: multiprocessing.get_start_method(allow_none=True), _set_start_method),
    (lambda: locale.setlocale(locale.LC_ALL), functools.partial(locale.setlocale, locale.LC_ALL)),
    (lambda: dict(os.environ), _set_environment),
    (_alarm, _set_alarm),  # before the handlers: without one, an alarm ends the process
    (_handlers, _set_handlers),
    (_folder, _set_folder),
)
"""Settings of the process that the user's code may change, as pairs of getter and setter."""
