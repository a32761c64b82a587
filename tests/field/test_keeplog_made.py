"""Limits of a keep log, checked when it is created."""

from __future__ import annotations

import os
from typing import Any

import pytest

from batchtrim import KeepLog


@pytest.mark.parametrize("n", [2**62, 2**63 - 1, 10**17])
def test_a_log_beyond_memory(n: int) -> None:
    with pytest.raises(ValueError, match="expected `n` samples of 32 bytes each to fit in memory"):
        KeepLog(n)


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="the system does not say how much memory it has")
def test_a_log_beyond_this_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux gave the 64 GiB of KeepLog(2**31) on a machine of 23, and killed the process as it was filled."""
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}.__getitem__)
    with pytest.raises(ValueError, match="expected `n` samples of 32 bytes each to fit in memory, got 1281"):
        KeepLog(1281)
    assert KeepLog(1280).n == 1280


@pytest.mark.parametrize("classes", [10_000_001, 2**31, 10**12])
def test_classes_that_no_epoch_could_count(classes: int) -> None:
    """Allocated as promised memory, or torch's own RuntimeError."""
    with pytest.raises(ValueError, match=r"expected `classes` of at most 10,000,000, got \d+\. It is the number of"):
        KeepLog(4, classes=classes)


@pytest.mark.parametrize("flag", ["distributed", "warn"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_flags_are_flags(flag: str, value: Any) -> None:
    """Any text was true, "no" among it."""
    with pytest.raises(TypeError, match=f"expected `{flag}` to be True or False, got"):
        KeepLog(4, **{flag: value})
