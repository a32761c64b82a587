"""Store every prediction of a run, so that scores and rules can be tried on it without training again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import batchtrim
from batchtrim import Selection
from batchtrim.lab.run import loading, loop
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.task import conditions, data


class StoringLog(batchtrim.KeepLog):
    """A keep log that also stores every batch that it receives."""

    def __init__(self, n: int, **options: Any) -> None:
        super().__init__(n, warn=False, **options)
        self.given: list[list[tuple[Tensor, ...]]] = [[]]

    def record(self, last: Any, *, ids: Tensor, outputs: Tensor, **more: Any) -> None:  # type: ignore[override]
        """Store the batch, and record it."""
        parts = (ids.int(), last.losses, last.selection.mask(), outputs.detach())
        self.given[-1].append(tuple(part.cpu().clone() for part in parts))
        super().record(last, ids=ids, outputs=outputs, **more)

    def end_epoch(self) -> dict[str, Any]:
        """End the epoch, of the log and of what is stored."""
        self.given.append([])
        return super().end_epoch()


def recorded(config: RunConfig, data_dir: str | None, cache: Path | None) -> dict[str, np.ndarray]:
    """Return what a run's log receives: ids, losses and kept (E, n), outputs (E, n, C), in the order of training.

    Further entries are the labels (n,), whether each is wrong (n,), the trained network's probabilities (n, C) for the
    same samples, and the training error of each epoch (E,). A run that is in ``cache`` is read from there.
    """
    config = config.resolved()
    path = cache and stored(config, cache)
    if path and path.exists():
        with np.load(path) as found:
            return dict(found)
    images = loading.load_images(config, data_dir)
    log = StoringLog(len(images.train_labels), classes=images.classes)
    training = loop.Training(config, images, log=log)
    training.prepare()
    errors = [training.train_epoch()["train_error"] for _ in range(training.epochs)]
    epochs = [[torch.cat(parts).numpy() for parts in zip(*epoch, strict=True)] for epoch in log.given if epoch]
    ids, losses, kept, outputs = (np.stack(parts) for parts in zip(*epochs, strict=True))
    run = {
        "ids": ids,
        "losses": losses,
        "kept": kept,
        "outputs": outputs,
        "labels": images.train_labels.numpy(),
        "wrong": wrong_labels(config, data_dir).numpy(),
        "probabilities": _probabilities(training).numpy(),
        "errors": np.array(errors),
    }
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **run)  # type: ignore[arg-type]
    return run


def stored(config: RunConfig, cache: Path) -> Path:
    """Return the file that holds the run, if it was done."""
    settings = repr({**config.resolved().to_dict(), "threads": None})
    return cache / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.npz"


def epochs(log: batchtrim.KeepLog, run: dict[str, np.ndarray], batch: int) -> Iterator[int]:
    """Give ``log`` the batches of a recorded run; yield after every epoch, for the caller to close it."""
    labels = torch.from_numpy(run["labels"])
    for epoch in range(len(run["ids"])):
        parts = [torch.from_numpy(run[name][epoch]).split(batch) for name in ("ids", "losses", "kept", "outputs")]
        for ids, losses, kept, outputs in zip(*parts, strict=True):
            choice = Selection(indices=torch.nonzero(kept).flatten(), size=len(kept), candidates=len(kept))
            rows = ids.long()
            log.record(batchtrim.Choice(losses, choice), ids=rows, outputs=outputs, labels=labels[rows])
        yield epoch


def wrong_labels(config: RunConfig, data_dir: str | None) -> Tensor:
    """Return bool (n,), True where the run's training label is not the data set's own."""
    clean = data.load(config.dataset, data_dir)
    # row numbers pass through the run's conditions in place of the images, so that each image can be identified
    numbered = clean.with_train(torch.arange(len(clean.train_labels)), clean.train_labels)
    noisy = conditions.apply(
        numbered,
        label_noise=config.label_noise,
        imbalance=config.imbalance,
        train_size=config.train_size,
        seed=config.seed,
        data_dir=data_dir,
    )
    return noisy.train_labels != clean.train_labels[noisy.train_images]


@torch.inference_mode()
def _probabilities(training: loop.Training) -> Tensor:
    """Return the probabilities of all classes for every training image (n, C), in evaluation mode, unaugmented."""
    training.model.eval()
    rows = torch.arange(len(training.labels), device=training.device).split(loop.EVALUATION_BATCH)
    batches = training._batches(training.images.train_images, "none", 0)
    return torch.cat([training.model(batches(part)).float().softmax(1).cpu() for part in rows])
