"""Shared by all tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from batchtrim.engine.auto import AutoEngine

collect_ignore = ["typed_usage.py"]  # for the type checker: --doctest-modules would run it


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collections, and make them rare: a trace makes a million objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs the shared engine where torch is too old for it: tests marked so, and cases that name it."""
    if torch.__version__ < "2.8":
        case = getattr(item, "callspec", None)
        named = case is not None and {"shared", "auto"} & {
            each for each in case.params.values() if isinstance(each, str)
        }
        if named or item.get_closest_marker("torch28"):
            pytest.skip("the shared engine needs torch 2.8")


@pytest.fixture(scope="module")
def settled() -> None:
    """For modules that call ``Trainer.train``, which runs a full garbage collection: what is alive by now is left out.

    torch's compiler alone leaves so many objects that each such call takes half a second without it.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _traced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `auto` trace models that are too small for that to pay."""
    # in place of a Forecast, whose module brings in sympy
    monkeypatch.setattr(AutoEngine, "forecast", SimpleNamespace(pays=lambda q: True))


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data sets, in the Hugging Face layout."""
    folder = os.environ.get("BATCHTRIM_DATA")
    if not folder:
        pytest.skip("BATCHTRIM_DATA names no folder of data sets")
    return Path(folder)
