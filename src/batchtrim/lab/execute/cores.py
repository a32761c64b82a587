"""Choose the number of processes and threads: all cores, unless the machine or the user limits them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from joblib import cpu_count

from batchtrim._checks import check_count
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.task_config import TaskConfig

Config = TypeVar("Config", RunConfig, TaskConfig)

MOST_THREADS = 64  # of a run, per core
MOST_WORKERS = 8  # each process holds the images in memory


def cores() -> int:
    """Return how many cores this process may use: those in its affinity mask, at most a container's CPU quota."""
    return max(1, cpu_count())


def asked_threads() -> int | None:
    """Return the number of threads in OMP_NUM_THREADS; None if it is not set, or not a number."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) > 0 else None


def share_cores(runs: int, workers: int | None = None) -> tuple[int, int]:
    """Return how many processes, and threads in each, to use on this machine for a number of runs.

    There are at most as many processes as cores and runs, and at most eight; if ``workers`` is set, only runs limit it.
    Small networks gain more from parallel runs than from threads. Cores are divided evenly. OMP_NUM_THREADS, if set,
    fixes the threads, and the number of processes follows.
    """
    have, threads = cores(), asked_threads()
    if workers is None:
        workers = max(1, min(have // (threads or 1), runs, MOST_WORKERS))
    workers = min(check_count("workers", workers), runs)  # a process without a run would only use memory
    return workers, threads or max(1, have // workers)


def with_threads(configs: Sequence[Config], threads: int, settings: Mapping[str, Any], ray: bool) -> list[Config]:
    """Return the runs with their share of threads, unless `threads` is set; on Ray each run has one by default."""
    if "threads" in settings:
        return list(configs)
    return [replace(config, threads=1 if ray else threads) for config in configs]


def crowded(workers: int, threads: int) -> str:
    """Return a warning if the runs use more threads than there are cores, which slows them all; else "".

    Raises:
        ValueError: a run's threads are too many for the system to start, which would end the process.
    """
    have = cores()
    if threads > (most := MOST_THREADS * have):
        by = " It is from OMP_NUM_THREADS." if threads == asked_threads() else ""
        raise ValueError(
            f"expected `threads` to be at most {most}, {MOST_THREADS} for each core here, got {threads}.{by}"
        )
    if workers * threads <= have:
        return ""
    return (
        f"{workers} process{'es' if workers > 1 else ''} of {threads} thread{'s' if threads > 1 else ''} on {have} "
        f"core{'s' if have > 1 else ''}: more threads than cores slow all of them. Pass fewer --workers or --threads."
    )
