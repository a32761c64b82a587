"""Claim, do and record one run, on this machine or on Ray, by the options and the queue that all runs share.

The process that does a run claims it first and records it itself (on Ray the driver does both), so no finished run
depends on another process. A run that was interrupted or failed resumes from its last checkpoint.
"""

from __future__ import annotations

import collections
import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from batchtrim.lab.execute.progress import tensorboard_log
from batchtrim.lab.files import CannotWrite, remove_parts
from batchtrim.lab.records import DONE, Records, Row
from batchtrim.lab.run import train
from batchtrim.lab.run.batch_progress import OnEpoch
from batchtrim.lab.run.checkpoint import DamagedCheckpoint
from batchtrim.lab.run.failed import failed_row
from batchtrim.lab.run.perform import perform
from batchtrim.lab.run.task_config import AnyConfig, TaskConfig

DATA_DIR = "data-dir.txt"
"""The file in a folder of runs that says where their data sets were, for `batchtrim show`."""


class Watcher(Protocol):
    """Receives events as they happen; see :mod:`batchtrim.lab.execute.progress`."""

    def begin(self, configs: list[AnyConfig], done: int) -> None:
        """Before the first run: all runs, and how many of them are recorded already."""

    def epoch(self, config: AnyConfig, point: dict[str, Any]) -> None:
        """After an epoch of a run: the last point of its curve."""

    def batch(self, config: AnyConfig, point: dict[str, Any]) -> None:
        """Within an epoch of a run: the numbers of the batch and of the epoch."""

    def finished(self, config: AnyConfig, row: Row | None) -> None:
        """After a run: its record; None if another process recorded it."""

    def note(self, text: str) -> None:
        """A message for the user."""


@dataclass(frozen=True)
class SharedOptions:
    """The folders and options that all runs share: data, output, checkpoints, logs.

    Args:
        out: the folder of records.
        data_dir, cache_dir: see :func:`batchtrim.lab.task.data.load`.
        checkpoint_seconds: seconds between two checkpoints of a run.
        tensorboard: write each run's event files under ``out/tensorboard``.
        keep_log: write each run's keep log to ``out/keep``.
    """

    out: Path
    data_dir: str | None = None
    cache_dir: str | None = None
    checkpoint_seconds: float = 60.0
    tensorboard: bool = False
    keep_log: bool = False

    def checkpoint(self, config: AnyConfig) -> Path:
        """Return the checkpoint file of a run."""
        return self.out / "checkpoints" / f"{config.key}.pt"

    def clear(self, config: AnyConfig, row: Row) -> None:
        """Remove the checkpoint of a run that is done; a failed run is retried and resumes from it."""
        if row["status"] in DONE:
            self.checkpoint(config).unlink(missing_ok=True)

    def log(self, config: AnyConfig) -> contextlib.AbstractContextManager[OnEpoch | None]:
        """Return a writer of the run's TensorBoard events, if asked for."""
        if not self.tensorboard:
            return contextlib.nullcontext()
        return tensorboard_log(self.out / "tensorboard" / f"{config.label.replace(' ', '_')}-{config.key}")


@dataclass
class RunQueue:
    """The runs still to do, and the results of the others."""

    left: collections.deque[AnyConfig]
    watcher: Watcher
    failed: list[Row] = field(default_factory=list)
    lost: collections.Counter[str] = field(default_factory=collections.Counter)

    def tell(self, config: AnyConfig, point: dict[str, Any]) -> None:
        """Pass on a run's progress, after an epoch or within it."""
        (self.watcher.batch if "batch" in point else self.watcher.epoch)(config, point)

    def settle(self, config: AnyConfig, row: Row | None) -> None:
        """Count a run as done; ``row`` is None if another process recorded it."""
        if row is not None and row["status"] == "failed":
            self.failed.append(row)
        self.watcher.finished(config, row)
        if row is not None and row.get("mistake") and self.left:
            self.watcher.note(f"stopped: fix the task first; runs left: {len(self.left)}")
            self.left.clear()


def attempt(
    config: AnyConfig, records: Records, shared: SharedOptions, on_epoch: OnEpoch | None = None
) -> tuple[bool, Row | None]:
    """Claim a run, do it and record it.

    Returns:
        True if the run is done, and its row if it was done here; (False, None) if another process is doing it.
    """
    with records.claim(config.key) as mine:
        if not mine:
            return records.is_done(config.key), None
        remove_parts(shared.checkpoint(config).parent, config.key)  # left by a process that died while saving
        row = do_run(config, shared, on_epoch)
        records.append(row)
        shared.clear(config, row)
    return True, row


def do_run(config: AnyConfig, shared: SharedOptions, on_epoch: OnEpoch | None = None) -> Row:
    """Do the run and return its row, also if it fails."""
    try:
        with shared.log(config) as log:
            if isinstance(config, TaskConfig):
                return perform(config, shared.out, _both(log, on_epoch))
            return train.train_run(
                config,
                data_dir=shared.data_dir,
                cache_dir=shared.cache_dir,
                checkpoint=shared.checkpoint(config),
                checkpoint_seconds=shared.checkpoint_seconds,
                on_epoch=_both(log, on_epoch),
                on_batch=on_epoch,
                keep_log=shared.out / "keep" / f"{config.key}.parquet" if shared.keep_log else None,
            )
    except CannotWrite:  # nothing can be recorded: not the run's fault
        raise
    except DamagedCheckpoint as error:  # no run can resume from it: the next try starts from the beginning
        shared.checkpoint(config).unlink(missing_ok=True)
        return failed_row(config, error)
    except Exception as error:  # whatever it was, record it, and continue with the other runs
        return failed_row(config, error)


def _both(first: OnEpoch | None, second: OnEpoch | None) -> OnEpoch | None:
    """Return a function that calls both; one of them if the other is None."""
    if first is None or second is None:
        return first or second

    def call(point: dict[str, Any]) -> None:
        first(point)
        second(point)

    return call
