"""Many runs: in this process, in several processes, or on a Ray cluster; recorded so that any of them may die.

Whoever does a run claims it first and records it itself (on Ray the driver does both), so nothing that has finished
hangs on the life of another process. A run that was interrupted goes on from its last checkpoint, if it had one.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from batchtrim._checks import check_count
from batchtrim.lab.execute import grid
from batchtrim.lab.records import Records, Row
from batchtrim.lab.run import train
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.ranks import Ranks

# How long to wait before asking again for runs that another process has claimed, in seconds.
ASK_AGAIN = 0.5


class Watcher(Protocol):
    """Told what happens, as it happens; see :mod:`batchtrim.lab.execute.progress`."""

    def begin(self, configs: list[RunConfig], done: int) -> None: ...

    def epoch(self, config: RunConfig, point: dict[str, Any]) -> None: ...

    def finished(self, config: RunConfig, row: Row | None) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Workplace:
    """Where runs find their data and leave their checkpoints.

    Args:
        out: the folder of records. data_dir, cache_dir: see :func:`batchtrim.lab.task.data.load`.
        checkpoint_seconds: runs longer than this save a checkpoint as often.
        tensorboard: whether each run writes event files under ``out/tensorboard``.
        keep_log: whether each run writes what it kept to ``out/keep``.
    """

    out: Path
    data_dir: str | None = None
    cache_dir: str | None = None
    checkpoint_seconds: float = 60.0
    tensorboard: bool = False
    keep_log: bool = False

    def checkpoint(self, config: RunConfig) -> Path:
        """The file a run goes on from."""
        return self.out / "checkpoints" / f"{config.key}.pt"

    def log(self, config: RunConfig) -> contextlib.AbstractContextManager[train.OnEpoch | None]:
        """What writes a run's TensorBoard events, if that is asked for."""
        if not self.tensorboard:
            return contextlib.nullcontext()
        from batchtrim.lab.execute.progress import tensorboard_log

        return tensorboard_log(self.out / "tensorboard" / f"{config.label.replace(' ', '_')}-{config.key}")


@dataclass
class Tally:
    """What is left to do, and what came of the rest."""

    left: collections.deque[RunConfig]
    watcher: Watcher
    failed: list[Row] = field(default_factory=list)
    lost: collections.Counter[str] = field(default_factory=collections.Counter)

    def settle(self, config: RunConfig, row: Row | None) -> None:
        """A run is over; None where another process recorded it."""
        if row is not None and row["status"] == "failed":
            self.failed.append(row)
        self.watcher.finished(config, row)


def share_cores(runs: int, workers: int | None = None) -> tuple[int, int]:
    """How many processes, and threads in each, to do so many runs with on this machine.

    As many processes as there are cores, runs, or eight (each holds the pictures in memory), unless ``workers`` says
    otherwise: small networks gain more from runs side by side than from threads. The cores are shared out evenly.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(cores, runs, 8)) if workers is None else check_count("workers", workers)
    return workers, max(1, cores // workers)


def run_all(
    configs: list[RunConfig],
    place: Workplace,
    watcher: Watcher,
    *,
    workers: int = 1,
    ray: str | None = None,
    retries: int = 2,
) -> list[Row]:
    """Do all runs that are not yet recorded in ``place.out``; returns the rows of the runs that failed.

    Args:
        configs: resolved, see :func:`batchtrim.lab.execute.grid.expand`.
        workers: processes on this machine; 1 works in this one.
        ray: address of a Ray cluster, or "auto", instead of processes here.
        retries: how often a run whose worker died is given to another.

    Raises:
        UseAnotherFolder: the folder holds another experiment.
        KeyboardInterrupt: passed on; what has finished is recorded, and the same call goes on.
    """
    check_count("workers", workers)
    records = Records(place.out)
    records.settle(grid.cells(configs))
    left = collections.deque(config for config in configs if not records.is_done(config.key))
    watcher.begin(configs, len(configs) - len(left))
    tally = Tally(left, watcher)
    if not left:
        return []
    if Ranks.from_environment().rank > 0:  # a run on several processes: the first of them keeps the record
        return [row for config in left if (row := do_run(config, place))["status"] == "failed"]
    if ray:
        from batchtrim.lab.execute.on_ray import run_on_ray

        run_on_ray(tally, records, place, ray, retries)
        return tally.failed
    for config in _one_per_data_set(left):  # a fault in the data is found, and pictures are decoded, before any run
        train.load_pictures(config, place.data_dir, place.cache_dir)
    if workers == 1:
        _run_here(tally, records, place)
    else:
        _run_in_processes(tally, records, place, min(workers, len(left)), retries)
    return tally.failed


def attempt(
    config: RunConfig, records: Records, place: Workplace, on_epoch: train.OnEpoch | None = None
) -> tuple[bool, Row | None]:
    """Claim a run, do it, record it.

    Returns:
        Whether the run is over, and its row if it was done here. (False, None): another process is at it.
    """
    with records.claim(config.key) as mine:
        if not mine:
            return records.is_done(config.key), None
        row = do_run(config, place, on_epoch)
        records.append(row)
    place.checkpoint(config).unlink(missing_ok=True)
    return True, row


def do_run(config: RunConfig, place: Workplace, on_epoch: train.OnEpoch | None = None) -> Row:
    """The run's row, whatever happens in it."""
    try:
        with place.log(config) as log:
            return train.run(
                config,
                data_dir=place.data_dir,
                cache_dir=place.cache_dir,
                checkpoint=place.checkpoint(config),
                checkpoint_seconds=place.checkpoint_seconds,
                on_epoch=_both(log, on_epoch),
                keep_log=place.out / "keep" / f"{config.key}.parquet" if place.keep_log else None,
            )
    except Exception as error:  # whatever it was, it goes into the record, and the other runs go on
        return train.failed_row(config, error)


def _run_here(tally: Tally, records: Records, place: Workplace) -> None:
    for config in _until_over(tally):
        over, row = attempt(config, records, place, lambda point, config=config: tally.watcher.epoch(config, point))
        if over:
            tally.settle(config, row)
        else:
            tally.left.append(config)


def _until_over(tally: Tally) -> Iterator[RunConfig]:
    """What is left, again and again; with a pause once all of it has been found claimed elsewhere."""
    refused = 0
    while tally.left:
        before = len(tally.left)
        yield tally.left.popleft()
        refused = refused + 1 if len(tally.left) == before else 0
        if tally.left and refused >= len(tally.left):
            tally.watcher.note("waiting for runs that another process on this folder is at")
            time.sleep(ASK_AGAIN)
            refused = 0


class _Worker:
    """A process that does one run at a time, and the line to it."""

    def __init__(self, place: Workplace):
        context = multiprocessing.get_context("spawn")
        self.line, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, place), daemon=True)
        self.config: RunConfig | None = None
        self.process.start()
        other.close()

    def give(self, config: RunConfig) -> None:
        self.config = config
        self.line.send(config)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.line.close()


def _work(line: Connection, place: Workplace) -> None:
    """The life of a worker process: it ends with its parent, whose end of the line closes then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    records = Records(place.out)

    def tell(what: str, news: object) -> None:
        try:
            line.send((what, news))
        except OSError:  # the parent is dead: leave the run to whoever goes on, and no trace of a failure
            raise SystemExit from None

    while True:
        try:
            config = line.recv()
        except (EOFError, OSError):
            return
        tell("over", attempt(config, records, place, lambda point: tell("epoch", point)))


def _run_in_processes(tally: Tally, records: Records, place: Workplace, workers: int, retries: int) -> None:
    crew = [_Worker(place) for _ in range(workers)]
    try:
        while tally.left or any(worker.config for worker in crew):
            for worker in crew:
                if worker.config is None and tally.left:
                    with contextlib.suppress(BrokenPipeError):  # it died: its line says so below
                        worker.give(tally.left.popleft())
            turned_away = []
            for line in wait([worker.line for worker in crew if worker.config]):
                worker = next(each for each in crew if each.line is line)
                try:
                    what, news = worker.line.recv()
                except (EOFError, ConnectionResetError):
                    crew[crew.index(worker)] = _replace_dead(worker, tally, records, place, retries)
                    continue
                assert worker.config is not None
                if what == "epoch":
                    tally.watcher.epoch(worker.config, news)
                    continue
                config, worker.config = worker.config, None
                over, row = news
                if over:
                    tally.settle(config, row)
                else:
                    turned_away.append(config)
            if turned_away:
                tally.left.extend(turned_away)
                time.sleep(ASK_AGAIN if len(turned_away) == len(tally.left) else 0.0)
    finally:
        for worker in crew:
            worker.stop()


def _replace_dead(worker: _Worker, tally: Tally, records: Records, place: Workplace, retries: int) -> _Worker:
    """A worker died in a run: give the run to another, unless that has been tried often enough."""
    assert worker.config is not None
    config = worker.config
    worker.stop()
    tally.lost[config.key] += 1
    reason = f"its worker ended with exit code {worker.process.exitcode}"
    if records.is_done(config.key):
        tally.settle(config, None)
    elif tally.lost[config.key] <= retries:
        tally.watcher.note(f"{config.label}: {reason}; trying again")
        tally.left.append(config)
    else:
        row = train.failed_row(config, RuntimeError(f"{reason}, {tally.lost[config.key]} times. Out of memory?"))
        records.append(row)
        tally.settle(config, row)
    return _Worker(place)


def _one_per_data_set(configs: collections.deque[RunConfig]) -> list[RunConfig]:
    """One run for each way the training data are made, but for the seed."""
    seen = {}
    for config in configs:
        seen.setdefault((config.dataset, config.label_noise, config.imbalance, config.train_size), config)
    return list(seen.values())


def _both(first: train.OnEpoch | None, second: train.OnEpoch | None) -> train.OnEpoch | None:
    if first is None or second is None:
        return first or second
    return lambda point: (first(point), second(point), None)[2]
