"""Processes and threads: limits of the machine and of the user override our own guess."""

from __future__ import annotations

import pytest

from batchtrim.lab.execute import cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(("asked", "shared"), [("2", (4, 2)), ("16", (1, 16)), ("1", (8, 1)), ("3,2", (2, 3))])
def test_omp_num_threads_wins(monkeypatch: pytest.MonkeyPatch, asked: str, shared: tuple[int, int]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert cores.share_cores(100) == shared


@pytest.mark.parametrize("nonsense", ["", "many", "0", "-2"])
def test_an_omp_num_threads_that_is_not_a_number_is_ignored(monkeypatch: pytest.MonkeyPatch, nonsense: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
    assert cores.share_cores(2) == (2, 4)


def test_more_threads_than_cores_are_reported() -> None:
    assert cores.crowded(4, 2) == ""
    assert "4 processes of 3 threads on 8 cores" in cores.crowded(4, 3)


@pytest.mark.parametrize(("runs", "workers", "shared"), [(2, 1000, (2, 4)), (100, 16, (16, 1)), (1, 8, (1, 8))])
def test_no_process_is_started_without_a_run(runs: int, workers: int, shared: tuple[int, int]) -> None:
    """A thousand were, for two runs: that took minutes, and memory for each."""
    assert cores.share_cores(runs, workers) == shared


def test_threads_that_no_system_starts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million ended the process, without a line of ours."""
    assert "512 threads" in cores.crowded(1, 512)
    with pytest.raises(ValueError, match=r"`threads` to be at most 512, 64 for each core here, got 513\.$"):
        cores.crowded(1, 513)
    monkeypatch.setenv("OMP_NUM_THREADS", "1000000")
    with pytest.raises(ValueError, match=r"got 1000000\. It is from OMP_NUM_THREADS"):
        cores.crowded(*cores.share_cores(3))
