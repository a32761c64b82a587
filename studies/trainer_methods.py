"""Run the lab's methods in the Hugging Face Trainer. Each is the lab's own object; none is implemented twice.

``full`` is transformers' own Trainer. Methods that need a trimmer only run in :class:`TrimmedTrainer`, as users run
them. The others run in :class:`MethodTrainer`, which calls a method's hooks as the lab's loop does. It calls all hooks,
so every method of the table works.

N training samples, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from batchtrim.integrations._row_numbers import IDS, numbered_rows
from batchtrim.integrations.transformers import TrimmedTrainer
from batchtrim.lab.methods.base import Method
from batchtrim.lab.run.loop import REFERENCE_SEED

__all__ = ["MethodTrainer", "count_samples", "make_trainer"]


def make_trainer(method: Method, plain: bool, new_model: Callable[[int], nn.Module], width: int, **common: Any) -> Any:
    """Return the Trainer of a method.

    Args:
        method: the lab's. plain: True for ``full``, which uses transformers' own Trainer.
        new_model: ``width -> model``, untrained; for methods that train a second one. width: of the run's model.
        common: the Trainer's arguments, including the model. ``args.num_train_epochs`` is set to the method's.
    """
    common["args"].num_train_epochs = math.ceil(method.epochs)
    trim = method.trim
    if plain:
        return Trainer(**common)
    if type(method) is Method and getattr(trim.schedule, "reads", "progress") != "accuracy":
        options = {"select": trim.rule, "scale": trim.scale, "seed": trim.seed}
        return TrimmedTrainer(**common, keep=trim.schedule, trim_options=options)
    return MethodTrainer(method, new_model, width, **common)


def count_samples(trainer: Any) -> tuple[int, int]:
    """Return the forward and backward samples of a finished training, including those of further networks."""
    if not isinstance(trainer, TrimmedTrainer | MethodTrainer):
        seen = len(trainer.train_dataset) * int(trainer.args.num_train_epochs)
        return seen, seen
    trim = trainer.trim
    assert trim is not None
    stats = trim.stats.compute()
    forward, backward = trainer.more_samples() if isinstance(trainer, MethodTrainer) else (0, 0)
    return int(stats["seen"]) + forward, int(stats["kept"]) + backward


class MethodTrainer(Trainer):
    """A Trainer for a classifier that calls a method's hooks where the lab's loop calls them.

    The learning rate follows progress, as in the lab: a short epoch moves it as far as a long one. Batches contain row
    numbers. One process, no accumulation.

    Args:
        method, new_model, width: as for :func:`make_trainer`. kwargs: the Trainer's.
    """

    def __init__(self, method: Method, new_model: Callable[[int], nn.Module], width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.method, self.new_model, self.width = method, new_model, width
        self.epochs_done = self.steps_done = self.seen = self.wrong = 0  # all but the first: in this epoch
        self.beside = [0, 0]  # samples of reference networks, forward and backward
        method.connect(self._network_beside)
        self.add_callback(_Events(self))

    @property
    def trim(self) -> Any:
        """Return the method's trimmer."""
        return self.method.trim

    @property
    def progress(self) -> float:
        """Return the fraction of training that is done, in [0, 1]."""
        part = min(1.0, self.method.epochs - self.epochs_done)  # of this epoch; below 1 only in a shortened last epoch
        steps = math.ceil(len(self.rows.visited) / self.args.train_batch_size) if self.steps_done else 1
        return (self.epochs_done + part * self.steps_done / steps) / self.method.epochs

    def more_samples(self) -> tuple[int, int]:
        """Return forward and backward samples of further networks."""
        forward, backward = self.method.more_samples()
        return self.beside[0] + forward, self.beside[1] + backward

    def get_train_dataloader(self) -> Any:
        with numbered_rows(self):
            loader: Any = super().get_train_dataloader()
        self.rows = loader.batch_sampler.sampler = _EpochRows(loader.batch_sampler.sampler, self.method)
        return loader

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        schedule = super().create_scheduler(num_training_steps, optimizer)
        schedule.lr_lambdas = [  # the arguments' schedule, as a function of progress instead of the step number
            lambda _, factor=factor: factor(self.progress * num_training_steps) for factor in schedule.lr_lambdas
        ]
        return schedule

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        batch = dict(inputs)
        rows, labels = batch.pop(IDS), batch.pop("labels")
        chosen = self.method.choose(batch, labels)  # type: ignore[arg-type]  # the proxy takes them as they are
        if chosen is not None:
            batch = {name: value.index_select(0, chosen.indices) for name, value in batch.items()}
            rows, labels = rows.index_select(0, chosen.indices), labels.index_select(0, chosen.indices)
        outputs = model(**batch)
        logits = outputs.logits.detach()
        self.seen += len(labels)
        self.wrong += int((logits.argmax(1) != labels).sum())
        losses = F.cross_entropy(outputs.logits, labels, reduction="none")
        self.method.watch(logits, labels)
        loss = self.method.loss(losses, rows)
        return (loss, outputs) if return_outputs else loss

    def _network_beside(
        self, width: int, seed: int
    ) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor], None]]:
        """Return another network with fresh weights, its optimizer and its backward; see ``Method.connect``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.new_model(width)
            optimizer = Trainer(model=model, args=self.args).create_optimizer()

        def backward(loss: Tensor) -> None:
            loss.backward()
            if self.args.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

        return _Logits(model), optimizer, backward

    def reference(self, rows: Tensor, epochs: int, seed: int) -> Tensor:
        """Train a fresh network plainly on ``rows``; return the losses (N,) of all training samples under it."""
        args = copy(self.args)
        args.seed, args.num_train_epochs = REFERENCE_SEED + seed, epochs
        data: Any = self.train_dataset
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            model = self.new_model(self.width)
            trainer = Trainer(model=model, args=args, train_dataset=[data[row] for row in rows.tolist()])
            trainer.train()
            found = trainer.predict(data)
        self.beside[0] += epochs * len(rows) + len(data)
        self.beside[1] += epochs * len(rows)
        logits, labels = torch.as_tensor(found.predictions), torch.as_tensor(found.label_ids)
        return F.cross_entropy(logits, labels, reduction="none")


class _EpochRows(Sampler[int]):
    """The rows of an epoch that a method visits, in a sampler's order. Its length is that of a whole epoch."""

    def __init__(self, order: Any, method: Method) -> None:
        self.order, self.method, self.epoch = order, method, 0
        self.visited: list[int] = []

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        self.visited = self.method.rows(torch.tensor(list(self.order)), self.epoch).tolist()
        return iter(self.visited)


class _Logits(nn.Module):
    """A Hugging Face classifier, called with its inputs as one argument, that returns logits (B, classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs).logits


class _Events(TrainerCallback):
    """Call the hooks of a method that do not concern a single batch."""

    def __init__(self, trainer: MethodTrainer) -> None:
        self.trainer, self.method = trainer, trainer.method

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.method.prepare(self.trainer.reference)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        trainer.steps_done += 1  # counted here, since the learning rate is updated before `on_step_end`
        assert trainer.optimizer is not None
        for optimizer in self.method.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = trainer.optimizer.param_groups[0]["lr"]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.method.after_batch()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        self.method.after_epoch(1.0 - trainer.wrong / trainer.seen)
        trainer.epochs_done += 1
        trainer.steps_done = trainer.seen = trainer.wrong = 0
