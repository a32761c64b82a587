"""How many processes and threads to do runs with: the cores there are, unless the machine or the reader says less."""

from __future__ import annotations

import os

import joblib

from batchtrim._checks import check_count

MOST_WORKERS = 8  # each holds the images in memory


def cores() -> int:
    """Return the cores this process may use: those of its affinity mask, and no more than a container's CPU quota."""
    return max(1, joblib.cpu_count())


def asked_threads() -> int | None:
    """Return the threads that OMP_NUM_THREADS asks for; None where it is not set, or is no number."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) > 0 else None


def share_cores(runs: int, workers: int | None = None) -> tuple[int, int]:
    """Return how many processes, and threads in each, to do so many runs with on this machine.

    As many processes as there are cores, runs, or eight, unless ``workers`` says otherwise: small networks gain more
    from runs side by side than from threads. The cores are shared out evenly. OMP_NUM_THREADS wins over our own guess
    of threads; then there are as many processes as fit beside one another.
    """
    have, threads = cores(), asked_threads()
    if workers is None:
        workers = max(1, min(have // (threads or 1), runs, MOST_WORKERS))
    check_count("workers", workers)
    return workers, threads or max(1, have // workers)


def crowded(workers: int, threads: int) -> str:
    """Return what to say where the runs use more threads than there are cores, which slows all of them; else ""."""
    have = cores()
    if workers * threads <= have:
        return ""
    return (
        f"{workers} process{'es' if workers > 1 else ''} of {threads} thread{'s' if threads > 1 else ''} on {have} "
        f"core{'s' if have > 1 else ''}: more threads than cores slow all of them. Pass fewer --workers or --threads."
    )
