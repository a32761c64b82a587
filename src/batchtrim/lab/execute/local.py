"""Runs on this machine: in this process, or in several worker processes, which are replaced if they die.

Each worker leads a process group, if the system has them: processes that the user's code starts end with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from batchtrim.lab.execute.one_run import RunQueue, SharedOptions, attempt
from batchtrim.lab.records import Records, ReplaceRecords
from batchtrim.lab.run.failed import failed_row
from batchtrim.lab.run.task_config import AnyConfig
from batchtrim.lab.task.own_code import own_folders_hidden

# Seconds to wait before trying again to claim runs that another process has claimed.
ASK_AGAIN = 0.5
# Seconds between checks of which workers are alive.
LOOK_EVERY = 1.0
# Seconds that a worker may take to exit after its pipe closes: the user's loggers send their last points.
ENDING = 10.0


# Exit code of a worker that came to the call that had started it: a script without `if __name__ == "__main__":`.
UNGUARDED = 76


def leave_if_unguarded() -> None:
    """Exit if this process is a worker that runs the script which started it, up to the same call."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(UNGUARDED)


def run_here(queue: RunQueue, records: Records, shared: SharedOptions) -> None:
    """Do the remaining runs of ``queue`` in this process, one after another."""
    for config in _until_over(queue):
        over, row = attempt(config, records, shared, lambda point, config=config: queue.tell(config, point))
        if over:
            queue.settle(config, row)
        else:
            queue.left.append(config)


def _until_over(queue: RunQueue) -> Iterator[AnyConfig]:
    """Yield the remaining runs, repeatedly; pause while other processes have claimed all of them."""
    refused = 0
    while queue.left:
        before = len(queue.left)
        yield queue.left.popleft()
        refused = refused + 1 if len(queue.left) == before else 0
        if queue.left and refused >= len(queue.left):
            queue.watcher.note("waiting for runs that another process is doing in this folder")
            time.sleep(ASK_AGAIN)
            refused = 0


class _Worker:
    """A process that does one run at a time, and the pipe to it."""

    def __init__(self, shared: SharedOptions):
        context = multiprocessing.get_context("spawn")
        self.line, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, shared), daemon=True)
        self.config: AnyConfig | None = None
        resource_tracker.ensure_running()  # otherwise Ctrl-C would reach it while it starts
        with _ctrl_c_held_back(), own_folders_hidden():
            self.process.start()
        other.close()

    def give(self, config: AnyConfig) -> None:
        self.config = config
        self.line.send(config)

    def hear(self) -> tuple[str, Any] | None:
        """Return the worker's next message; None if it died."""
        if not self.process.is_alive() and not self.line.poll():  # a child of the worker may hold the other end open
            return None
        try:
            return self.line.recv()
        except (EOFError, ConnectionResetError):
            return None

    def end(self) -> None:
        """Let the worker exit by itself, so that exit handlers of the user's code run."""
        self.line.close()
        self.process.join(ENDING)
        if self.process.is_alive():  # a thread that the user's code left behind
            self.stop()

    def stop(self) -> None:
        """Kill the worker and the processes that it started."""
        self.process.kill()
        self.process.join()
        self.line.close()
        if hasattr(os, "killpg") and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left
                os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Block Ctrl-C while a process starts, which inherits the block until it ignores Ctrl-C; then unblock it here."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle_in() -> None:
    """Leave the parent's process group, and allow child processes, in which a task may load its data."""
    os.dup2(2, 1)  # a task prints for people: standard output belongs to the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if hasattr(os, "setsid"):
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    multiprocessing.current_process().daemon = False
    multiprocessing.set_start_method(None, force=True)  # the system's default, as in any program


def _vanish() -> None:
    """Exit at once with all children, as if killed."""
    if hasattr(os, "killpg"):
        os.killpg(os.getpgid(0), signal.SIGKILL)
    os._exit(1)


def _end_with_the_parent() -> None:
    """Exit when the parent has died, also in the middle of a run that sends no news."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        _vanish()


def _work(line: Connection, shared: SharedOptions) -> None:
    """Do runs until the parent closes its end of the pipe, because it is done or has died."""
    _settle_in()
    threading.Thread(target=_end_with_the_parent, name="batchtrim-parent", daemon=True).start()
    records = Records(shared.out, make=False)

    def tell(what: str, news: object) -> None:
        try:
            line.send((what, news))
        except OSError:  # the parent is dead: record no failure, so that the run can be resumed
            _vanish()

    while True:
        try:
            config = line.recv()
        except (EOFError, OSError):
            return
        try:
            tell("over", attempt(config, records, shared, lambda point: tell("epoch", point)))
        except (OSError, ReplaceRecords) as error:  # of the records, not of the run: no other could be recorded either
            tell("unusable", error)


def run_in_processes(queue: RunQueue, records: Records, shared: SharedOptions, workers: int, retries: int) -> None:
    """Do the remaining runs of ``queue`` in worker processes; a run whose worker dies is repeated ``retries`` times."""
    leave_if_unguarded()
    crew: list[_Worker] = []
    try:
        crew += (_Worker(shared) for _ in range(workers))
        while queue.left or any(worker.config for worker in crew):
            for worker in crew:
                if worker.config is None and queue.left:
                    with contextlib.suppress(BrokenPipeError):  # it died: reported below
                        worker.give(queue.left.popleft())
            turned_away = []
            for worker in _heard(crew):
                told = worker.hear()
                if told is None:
                    crew.remove(worker)
                    _settle_dead(worker, queue, records, retries)
                    crew += [_Worker(shared)] if queue.left else []
                    continue
                what, news = told
                assert worker.config is not None
                if what == "epoch":
                    queue.tell(worker.config, news)
                    continue
                if what == "unusable":
                    raise news
                config, worker.config = worker.config, None
                over, row = news
                if over:
                    queue.settle(config, row)
                else:
                    turned_away.append(config)
            if turned_away:
                queue.left.extend(turned_away)
                time.sleep(ASK_AGAIN if len(turned_away) == len(queue.left) else 0.0)
    except BaseException:
        for worker in crew:
            worker.stop()
        raise
    for worker in crew:
        worker.end()


def _heard(crew: list[_Worker]) -> list[_Worker]:
    """Wait until workers send a message or die, and return them."""
    busy = [worker for worker in crew if worker.config]
    ready = wait([worker.line for worker in busy], timeout=LOOK_EVERY)
    return [worker for worker in busy if worker.line in ready or not worker.process.is_alive()]


def _settle_dead(worker: _Worker, queue: RunQueue, records: Records, retries: int) -> None:
    """Give the run of a dead worker to another one, unless it was tried often enough."""
    assert worker.config is not None
    config = worker.config
    worker.process.join(ENDING)  # the pipe closes before the process exits: killing it now would hide its exit code
    worker.stop()
    if worker.process.exitcode == UNGUARDED:
        raise ValueError(
            "expected the call that starts workers under `if __name__ == '__main__':`, got it at the top of a script. "
            "Every worker runs the script before its first run. Put it there, or pass workers=1."
        )
    queue.lost[config.key] += 1
    reason = f"its worker ended with exit code {worker.process.exitcode}"
    if records.is_done(config.key):
        queue.settle(config, None)
    elif queue.lost[config.key] <= retries:
        queue.watcher.note(f"{config.label}: {reason}; trying again")
        queue.left.append(config)
    else:
        row = failed_row(config, RuntimeError(f"{reason}, {queue.lost[config.key]} times. {_likely(worker)}"))
        records.append(row)
        queue.settle(config, row)


def _likely(worker: _Worker) -> str:
    """Return the most likely reason why a worker ended."""
    code = worker.process.exitcode or 0
    if code == -signal.SIGKILL:
        return "Out of memory?"
    if code < 0:
        return f"It was ended by signal {-code} ({signal.strsignal(-code) or 'unknown'}), most often in compiled code."
    return "Does the program, or what it calls, end the process (os._exit, an interrupt)?"
