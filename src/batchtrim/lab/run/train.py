"""Do one run: load the data, train to the end or from a checkpoint, and return the row for ``runs.jsonl``."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batchtrim import KeepLog
from batchtrim.lab import process
from batchtrim.lab.files import writing
from batchtrim.lab.records import SCHEMA
from batchtrim.lab.run import checkpoint as checkpoints
from batchtrim.lab.run import sanity
from batchtrim.lab.run.batch_progress import OnEpoch, batch_progress
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.environment import environment
from batchtrim.lab.run.loading import load_images
from batchtrim.lab.run.loop import Diverged, Training
from batchtrim.lab.run.ranks import Ranks
from batchtrim.lab.run.remarks import remarks
from batchtrim.lab.task import models


def train_run(
    config: RunConfig,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_epoch: OnEpoch | None = None,
    on_batch: OnEpoch | None = None,
    keep_log: Path | None = None,
) -> dict[str, Any]:
    """Do one run and return its row for ``runs.jsonl``.

    Args:
        config: what to run.
        data_dir: the folder of data sets, see :func:`batchtrim.lab.task.data.load`.
        checkpoint: a file to resume from, if it exists, and to save to between epochs; the caller removes it.
        checkpoint_seconds: the minimum time between two checkpoints.
        on_epoch: called after every epoch.
        on_batch: called after the first batch, and about twice a second from then.
        keep_log: a Parquet file to write the keep log of all training samples to.
    """
    config = config.resolved()
    started, begun = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    try:
        with process.restored(config.threads):
            images = load_images(config, data_dir, cache_dir)
            several = Ranks.from_environment().world > 1
            n, classes = len(images.train_labels), images.classes
            log = KeepLog(n, classes=classes, distributed=several) if keep_log else None
            training = Training(config, images, log=log)
            training.on_batch = batch_progress(on_batch, training.epochs) if on_batch else None
            status, error = _to_the_end(training, checkpoint, checkpoint_seconds, on_epoch)
            if log is not None and keep_log is not None and training.ranks.rank == 0:
                with writing(keep_log):
                    keep_log.parent.mkdir(exist_ok=True)
                    log.to_parquet(keep_log, label=images.train_labels.numpy())
    finally:
        Ranks.from_environment().leave()
    final = training.curve["test_error"][-1] if status == "finished" else None
    learnt = final is None or not sanity.no_better_than_chance(final, images.test_labels)
    notes = [*images.notes, *sanity.notes_on(config, images), *remarks(config)]
    notes += [] if final is None else sanity.notes_on_result(learnt, training.right, images)
    return {
        "schema": SCHEMA,
        "key": config.key,
        "config": config.to_dict(),
        "status": status,
        **({"error": error} if error else {}),
        **({"notes": notes} if notes else {}),
        **({"did_not_learn": True} if not learnt else {}),
        "test_error": final,
        **vars(training.counts),
        "seconds_total": training.before + time.perf_counter() - begun,
        "params": models.count_parameters(training.model),
        "curve": training.curve,
        "environment": environment(config),
        "started": started,
    }


def _to_the_end(training: Training, checkpoint: Path | None, every: float, on_epoch: OnEpoch | None) -> tuple[str, str]:
    """Train to the end; return the status and, if the run diverged, the reason."""
    if checkpoint and checkpoint.exists():
        checkpoints.load(training, checkpoint)
    else:
        training.prepare()
    saved = time.monotonic()
    while training.epoch < training.epochs:
        try:
            point = training.advance()
        except Diverged as error:
            return "diverged", str(error)
        if on_epoch:
            on_epoch({**point, "epochs": training.epochs})
        if checkpoint and training.ranks.agree(time.monotonic() - saved >= every, training.device):
            state = training.state_dict()
            if training.ranks.rank == 0:
                checkpoints.save(state, checkpoint)
            saved = time.monotonic()
    return "finished", ""
