"""Runs on this machine: in this process, or in several that are replaced when they die."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait

from batchtrim.lab.execute.workplace import Tally, Workplace, attempt
from batchtrim.lab.files import CannotWrite
from batchtrim.lab.records import Records
from batchtrim.lab.run.failed import failed_row
from batchtrim.lab.run.task_config import AnyConfig

# How long to wait before asking again for runs that another process has claimed, in seconds.
ASK_AGAIN = 0.5
# How long a worker whose line is closed may take to end, in seconds.
ENDING = 10.0


def run_here(tally: Tally, records: Records, place: Workplace) -> None:
    for config in _until_over(tally):
        over, row = attempt(config, records, place, lambda point, config=config: tally.tell(config, point))
        if over:
            tally.settle(config, row)
        else:
            tally.left.append(config)


def _until_over(tally: Tally) -> Iterator[AnyConfig]:
    """Yield the runs left, again and again, pausing once all of them were found claimed elsewhere."""
    refused = 0
    while tally.left:
        before = len(tally.left)
        yield tally.left.popleft()
        refused = refused + 1 if len(tally.left) == before else 0
        if tally.left and refused >= len(tally.left):
            tally.watcher.note("waiting for runs that another process is doing in this folder")
            time.sleep(ASK_AGAIN)
            refused = 0


class _Worker:
    """A process that does one run at a time, and the pipe to it."""

    def __init__(self, place: Workplace):
        context = multiprocessing.get_context("spawn")
        self.line, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, place), daemon=True)
        self.config: AnyConfig | None = None
        self.process.start()
        other.close()

    def give(self, config: AnyConfig) -> None:
        self.config = config
        self.line.send(config)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.line.close()


def _work(line: Connection, place: Workplace) -> None:
    """Work until the parent is done, or gone: its end of the pipe then closes."""
    os.dup2(2, 1)  # what a task prints is for people: standard output is the parent's
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
        try:
            tell("over", attempt(config, records, place, lambda point: tell("epoch", point)))
        except CannotWrite as error:
            tell("unwritable", str(error))


def run_in_processes(tally: Tally, records: Records, place: Workplace, workers: int, retries: int) -> None:
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
                    tally.tell(worker.config, news)
                    continue
                if what == "unwritable":
                    raise CannotWrite(news)
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
    """Give the run of a worker that died to another one, unless it has been tried often enough."""
    assert worker.config is not None
    config = worker.config
    worker.process.join(ENDING)  # its line closes first: killed now, it would seem to have been killed
    worker.stop()
    tally.lost[config.key] += 1
    reason = f"its worker ended with exit code {worker.process.exitcode}"
    if records.is_done(config.key):
        tally.settle(config, None)
    elif tally.lost[config.key] <= retries:
        tally.watcher.note(f"{config.label}: {reason}; trying again")
        tally.left.append(config)
    else:
        row = failed_row(config, RuntimeError(f"{reason}, {tally.lost[config.key]} times. {_likely(worker)}"))
        records.append(row)
        tally.settle(config, row)
    return _Worker(place)


def _likely(worker: _Worker) -> str:
    """Return the likeliest reason for which a worker ended."""
    code = worker.process.exitcode or 0
    if code == -signal.SIGKILL:
        return "Out of memory?"
    if code < 0:
        return f"It was ended by signal {-code} ({signal.strsignal(-code) or 'unknown'}), most often in compiled code."
    return "Does the program, or what it calls, end the process (os._exit, an interrupt)?"
