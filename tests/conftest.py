"""Shared by all tests. It imports torch late: pytest-xdist reads this file before it starts a worker."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from _pytest.logging import catching_logs

import tiers

gc.disable()  # until all tests are collected: nearly everything that imports make stays

# read when torch._dynamo is imported, here and in the processes that tests start: a collection takes 25 ms
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")
# Inductor's own pool imports torch in further processes, and the workers of the tests use every core already
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what holds no tests: --doctest-modules would import each file, under a second name.

    typed_usage.py is for the type checker alone.
    """
    return True if collection_path.suffix == ".py" and not collection_path.name.startswith("test_") else None


def pytest_configure(config: pytest.Config) -> None:
    """Make no slow tests if none is asked for."""
    tiers.default_only = config.option.markexpr == "not slow"


def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> list[pytest.Item] | None:
    """Make no items of a slow test, or of a file of slow tests, that would be deselected."""
    if not tiers.default_only or not name.lower().startswith("test"):
        return None
    marks = getattr(obj, "pytestmark", ())
    slow = any(mark.name == "slow" for mark in (marks if isinstance(marks, list | tuple) else (marks,)))
    return [] if slow or collector.get_closest_marker("slow") is not None else None


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Look for no examples in tests, which have none."""
    found = yield
    return [each for each in found if type(each).__name__ != "DoctestModule"]


def pytest_sessionfinish() -> None:
    """Collect once what is left; pytest would do so five times."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """Keep imported objects out of garbage collections, and make these rare: a trace makes a million objects.

    Leave out what torch does for its own log, and for devices that are not there.
    """
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)
    gc.enable()
    if "attached_loggers" in getattr(catching_logs, "__slots__", ()):  # pytest 9
        catching_logs.__enter__ = _attached_to_the_root  # type: ignore[method-assign]
    logging.getLogger("torch.__trace").handlers.clear()  # with any, torch writes down each trace
    guards = sys.modules.get("torch._dynamo.guards")
    if hasattr(guards, "profile_guard_manager"):  # it flushes the CPU's caches to time the guards of each compile
        guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[union-attr]
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        for device in ("cuda", "mtia", "xpu"):  # each would format the stack at every torch.manual_seed
            if hasattr(torch, device):
                getattr(torch, device).manual_seed_all = lambda seed: None


_attach = catching_logs.__enter__


def _attached_to_the_root(self: catching_logs[logging.Handler]) -> logging.Handler:
    """Capture what reaches the root logger.

    pytest looks through the thousand loggers of all libraries for those that do not pass on, six times a test: 2 ms.
    """
    if self.level is not None:
        return _attach(self)
    logging.root.addHandler(self.handler)
    self.attached_loggers.append(logging.root)
    return self.handler


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs the shared engine where torch is too old for it: tests marked so, and cases that name it."""
    import torch

    if torch.__version__ < "2.8":
        case = getattr(item, "callspec", None)
        named = case is not None and {"shared", "auto"} & {
            each for each in case.params.values() if isinstance(each, str)
        }
        if named or item.get_closest_marker("torch28"):
            pytest.skip("the shared engine needs torch 2.8")


@pytest.fixture(scope="module")
def settled() -> Iterator[None]:
    """For modules that call ``Trainer.train``: skip the full garbage collection that each call starts with.

    torch's compiler leaves so many objects that a collection takes up to half a second. The automatic ones go on.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *_: 0)
        yield


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _traced_at_once() -> Iterator[None]:
    """Have `auto` trace models that are too small for that to pay."""
    from batchtrim.engine.auto import AutoEngine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoEngine, "forecast", SimpleNamespace(pays=lambda q: True))
        yield


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data sets, in the Hugging Face layout."""
    folder = os.environ.get("BATCHTRIM_DATA")
    if not folder:
        pytest.skip("BATCHTRIM_DATA names no folder of data sets")
    return Path(folder)
