"""The training loop for every method: the same seed gives the same network, data order and augmentation.

The reported time covers training alone, including selection and a method's preparation; evaluation has its own time.
On a CPU, a run with the same seed and number of threads repeats bit for bit, and so does a run resumed from a
checkpoint. Nothing in the loop over batches waits for the device.

N training samples, B batch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import batchtrim
from batchtrim import Choice, KeepLog
from batchtrim.lab import process
from batchtrim.lab.methods.base import RunInfo
from batchtrim.lab.methods.table import find_method, make_schedule
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.counts import CountingLoss, Counts
from batchtrim.lab.run.environment import changed_since, program_of, sources
from batchtrim.lab.run.failed import CURVES
from batchtrim.lab.run.optimizers import lr_factor, make_optimizer
from batchtrim.lab.run.ranks import Ranks
from batchtrim.lab.task import data, models
from batchtrim.lab.task.augment import Batches

EVALUATION_BATCH = 500
REFERENCE_SEED = 1_000_003  # an offset, so that held-out networks start from weights that no run starts from


class Diverged(ArithmeticError):
    """The losses or the network's outputs are not finite."""


@dataclass
class Training:
    """A run in progress: network, optimizer, method, generators, curves and clocks.

    Args:
        config: resolved.
        images: the data set with its conditions (such as label noise) applied.
    """

    config: RunConfig
    images: data.ImageData
    counts: Counts = field(default_factory=Counts)
    epoch: int = 0
    log: KeepLog | None = None
    on_batch: Callable[[int, int, int], None] | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.before, self.begun = 0.0, time.perf_counter()  # seconds before the run was resumed, and since when
        self.ranks = Ranks.from_environment()
        self.fabric = self.ranks.fabric(config)
        self.device = self.fabric.device
        process.seed(config.seed)
        model = self._network(config.width)
        self.model, self.optimizer = self.fabric.setup(model, make_optimizer(model, config))
        self.labels = self.images.train_labels.to(self.device)
        self.test_labels = self.images.test_labels.to(self.device)
        self.batches = self._batches(self.images.train_images, config.augment or "none", config.seed)
        self.test_batches = self._batches(self.images.test_images, "none", 0)
        self.order = Generator().manual_seed(config.seed)
        keep = make_schedule(config.schedule or "constant", config.keep_start or 1.0, config.keep_end or 1.0)
        samples, classes, width = len(self.labels), self.images.classes, config.width or 1
        info = RunInfo(samples, classes, config.epochs, config.batch_size, config.seed, keep, width)
        self.method = find_method(config.method).build(info, dict(config.method_params))
        self.method.connect(self._beside)
        self.epochs = math.ceil(self.method.epochs)
        self.right: list[float] = []  # test images of each class classified right, in the last evaluation
        self.criterion = CountingLoss(self.device, config.label_smoothing)
        self.forward = None
        if config.engine != "exact":
            loss = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
            plain = self.criterion.plain if config.label_smoothing else None
            self.forward = batchtrim.TrimmedForward(
                self.model,
                loss,
                self.method.trim,
                config.engine,
                rank_by=plain,  # type: ignore[arg-type]
            )
        self.curve: dict[str, list[Any]] = {name: [] for name in CURVES}

    def _network(self, width: int | None) -> nn.Module:
        config, images = self.config, self.images
        model = models.build(config.model, images.shape, images.classes, width, config.norm)
        if hasattr(model, "prepare"):
            model.prepare(images.train_images, images.mean, images.std)  # type: ignore[operator]
        if images.shape[0] > 1:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def _beside(self, width: int, seed: int) -> tuple[Any, torch.optim.Optimizer, Callable[[Tensor], None]]:
        """Return another network of the run's kind with fresh weights, its optimizer and its backward function."""
        with process.generators_kept():
            process.seed(seed)
            model = self._network(width)
        return self.fabric.setup_module(model), make_optimizer(model, self.config), self.fabric.backward

    def _batches(self, images: Tensor, augment: str, seed: int) -> Batches:
        return Batches(images, self.images.mean, self.images.std, augment, seed, self.device)

    def prepare(self) -> None:
        """Prepare the method before the first epoch; a resumed run has this in its checkpoint."""
        with self._clock("seconds"), process.generators_kept():
            self.method.prepare(self._reference)

    def advance(self) -> dict[str, Any]:
        """Train one epoch, evaluate if due, add a point to every curve, and return the point.

        Raises:
            Diverged: the mean loss or an output is not finite. The curves include the epoch, with unknown error.
        """
        point = self.train_epoch()
        finite = math.isfinite(point["mean_loss"])
        due = not finite or self.epoch == self.epochs or self.epoch % self.config.eval_every == 0
        with self._clock("seconds_eval"), process.generators_kept():
            error = self.evaluate() if finite and due else math.nan
        point["test_error"] = error if due else None
        point["seconds"] = self.counts.seconds
        point["samples_backward"] = self.counts.samples_backward
        for name in CURVES:
            self.curve[name].append(point[name])
        if due and math.isnan(error):
            raise Diverged(f"the losses are not finite after epoch {self.epoch} of {self.epochs}.")
        return point

    def train_epoch(self) -> dict[str, Any]:
        """Train for one epoch; return its point of the curves, without test error and time."""
        method, counts, size, share = self.method, self.counts, self.config.batch_size, self.ranks.share
        method.trim.stats.reset()
        with self._clock("seconds"):
            visited = method.rows(torch.randperm(len(self.labels), generator=self.order), self.epoch)
            part = min(1.0, method.epochs - self.epoch)  # of this epoch; below 1 only at the end of a shortened run
            batches = self.ranks.batches(visited.to(self.device), size)
            rate = 0.0
            self.criterion.reset()
            self.model.train()
            for step, rows in enumerate(batches):
                rate = self._set_rate((self.epoch + part * step / len(batches)) / method.epochs)
                mine = rows[share]
                loss = self._loss(self.batches(rows, share), self.labels[mine], mine)
                self.optimizer.zero_grad()
                self.fabric.backward(loss)
                self.optimizer.step()
                method.after_batch()
                if self.on_batch is not None:
                    self.on_batch(self.epoch, step, len(batches))
            train_error, stats = self._over_all_ranks()
            method.after_epoch(1.0 - train_error)
            if self.log is not None:
                self.log.end_epoch()
        counts.steps += len(batches)
        beside = method.more_samples()
        counts.samples_forward += sum(map(len, batches)) + beside[0]
        counts.samples_backward += int(stats["kept"]) + beside[1]
        self.epoch += 1
        return {
            "epoch": self.epoch - 1,
            "train_error": train_error,
            "keep": stats["kept"] / (len(self.labels) * part),
            "kept_loss": stats["kept_loss"],
            "mean_loss": stats["mean_loss"],
            "lr": rate,
        }

    def _over_all_ranks(self) -> tuple[float, dict[str, float]]:
        """Return the epoch's training error and kept-sample statistics, over all processes."""
        stats = self.method.trim.stats.compute()
        wrong, seen, kept, mean_sum, kept_sum = self.ranks.sum(
            self.criterion.wrong.item(),
            stats["seen"],
            stats["kept"],
            stats["mean_loss"] * stats["seen"],
            stats["kept_loss"] * stats["kept"],
            device=self.device,
        )
        return wrong / seen, {"kept": kept, "mean_loss": mean_sum / seen, "kept_loss": kept_sum / kept}

    def _loss(self, inputs: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        if self.forward is None:
            seen = self.method.choose(inputs, targets)
            if seen is not None:
                if self.log is not None:  # the whole batch, by the losses that chose
                    self.log.record(self.method.trim.last, ids=rows, labels=targets)
                inputs, targets, rows = (part.index_select(0, seen.indices) for part in (inputs, targets, rows))
            outputs = self.model(inputs)
            losses = self.criterion(outputs, targets)
            self.method.watch(outputs.detach(), targets)
            loss = self.method.loss(losses, rows, self.criterion.plain(outputs, targets))
            selection = self.method.trim.last_selection if seen is None else None
        else:
            loss = self.forward(inputs, targets)
            assert self.forward.last is not None
            last = self.forward.last
            losses, outputs, selection = last.losses, last.outputs, last.selection
            self.criterion.count(outputs, targets)
            if last.engine == "two_pass":
                self.counts.samples_forward += selection.k
        if self.log is not None and selection is not None:
            chosen = Choice(losses.detach(), selection)
            self.log.record(chosen, ids=rows, outputs=outputs, labels=targets)
        return loss

    @torch.inference_mode()
    def evaluate(self) -> float:
        """Return the error on the test split in [0, 1]; NaN if an output is not finite."""
        self.model.eval()
        right = torch.zeros(self.images.classes, dtype=torch.int64, device=self.device)
        broken = torch.zeros((), dtype=torch.int64, device=self.device)
        for rows in torch.arange(len(self.test_labels), device=self.device)[self.ranks.share].split(EVALUATION_BATCH):
            images = self.test_batches(rows)
            outputs = self.model(images)
            if self.config.test_views == "mirror":
                outputs = outputs + self.model(images.flip(3))
            labels = self.test_labels[rows]
            right.index_add_(0, labels, (outputs.argmax(1) == labels).long())
            broken += (~outputs.isfinite()).any()
        all_broken, *self.right = self.ranks.sum(broken.item(), *right.tolist(), device=self.device)
        return math.nan if all_broken else (len(self.test_labels) - sum(self.right)) / len(self.test_labels)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a run needs to continue bit for bit: tensors, numbers and strings only.

        Under ``torchrun``, all processes call this, and each gets the state of the whole run.
        """
        return {
            "key": self.config.key,
            "program": sources(self.config),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "order": self.order.get_state(),
            "ranks": self.ranks.gather({"method": self.method.state_dict(), "drawn": process.drawn(self.device)}),
            "counts": vars(self.counts).copy(),
            "seconds_total": self.before + time.perf_counter() - self.begun,
            "curve": {name: list(values) for name, values in self.curve.items()},
            **({"log": self.log.state_dict()} if self.log is not None else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, which must be from a run with the same key."""
        if state["key"] != self.config.key:
            raise ValueError(
                f"expected a checkpoint of run {self.config.key}, got one of {state['key']}. "
                "Its settings differ: remove it, or pass its settings."
            )
        code = program_of(self.config)
        if code is not None and (changed := changed_since(state["program"], code)):
            raise ValueError(
                f"expected a checkpoint of the present {' and '.join(changed)}, got one of another version. "
                "Undo the change, or remove the checkpoint to start from the beginning."
            )
        if (self.log is None) != ("log" not in state):
            raise ValueError(
                "expected a checkpoint of a run with the same --keep-log, got one without it, or the reverse. "
                "Pass --keep-log as before, or remove the checkpoint."
            )
        if len(state["ranks"]) != self.ranks.world:
            raise ValueError(
                f"expected a checkpoint of a run on {self.ranks.world} processes, got one on {len(state['ranks'])}. "
                "Start it on as many as before, or remove the checkpoint."
            )
        mine = state["ranks"][self.ranks.rank]
        if self.log is not None:
            self.log.load_state_dict(state["log"])
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(mine["method"])
        self.batches.load_state_dict(state["batches"])
        self.order.set_state(state["order"])
        process.set_drawn(mine["drawn"])
        self.counts = Counts(**state["counts"])
        self.before = state.get("seconds_total", 0.0)
        self.curve = {name: list(values) for name, values in state["curve"].items()}

    def _set_rate(self, progress: float) -> float:
        rate = (self.config.lr or 0.0) * lr_factor(self.config.lr_schedule, progress)
        for optimizer in [self.optimizer, *self.method.optimizers]:
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate

    def _reference(self, rows: Tensor, epochs: int, seed: int) -> Tensor:
        """Return the losses of all training images under a fresh network with plain training on ``rows``."""
        part = self.images.with_train(self.images.train_images[rows], self.images.train_labels[rows])
        config = replace(self.config, method="full", method_params={}, epochs=epochs, seed=REFERENCE_SEED + seed)
        training = Training(config.resolved(), part)
        for _ in range(epochs):
            training.train_epoch()
        self.counts.samples_forward += training.counts.samples_forward + len(self.labels)
        self.counts.samples_backward += training.counts.samples_backward
        return training.losses_of(self._batches(self.images.train_images, "none", 0), self.labels)

    @torch.inference_mode()
    def losses_of(self, batches: Batches, labels: Tensor) -> Tensor:
        """Return the cross-entropy of every image in evaluation mode, (N,), on the CPU."""
        self.model.eval()
        rows = torch.arange(len(labels), device=self.device).split(EVALUATION_BATCH)
        parts = [F.cross_entropy(self.model(batches(part)), labels[part], reduction="none") for part in rows]
        return torch.cat(parts).float().cpu().clone()

    @contextlib.contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            setattr(self.counts, name, getattr(self.counts, name) + time.perf_counter() - start)
