"""The interface of a method to the training loop: the rows of an epoch, and the loss from a batch's losses.

Most methods only configure a :class:`batchtrim.Trimmer`; those that need more are here. The table of all methods is
in :mod:`batchtrim.lab.methods.table`.

N training samples, B batch, E epochs, q keep fraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

import batchtrim
from batchtrim import Selection, Trimmer

__all__ = [
    "EveryStep",
    "FocalLoss",
    "InfoBatch",
    "Interrupted",
    "Method",
    "NewNetwork",
    "Reference",
    "Reweighted",
    "RhoLoss",
    "RunInfo",
    "Shortened",
    "SuperLoss",
]


class Reference(Protocol):
    """Trains a fresh network on some rows and returns every row's loss; passed to :meth:`Method.prepare`."""

    def __call__(self, rows: Tensor, epochs: int, seed: int) -> Tensor: ...


class NewNetwork(Protocol):
    """Makes a network of the run's kind with another width; passed to :meth:`Method.connect`.

    Returns:
        The network, its optimizer, and a function to call in place of ``loss.backward()`` at the run's precision.
    """

    def __call__(self, width: int, seed: int) -> tuple[Any, torch.optim.Optimizer, Callable[[Tensor], None]]: ...


@dataclass(frozen=True)
class RunInfo:
    """The run that a method is built for.

    Args:
        samples: N.
        classes: of the labels.
        epochs, batch_size, seed: of the run.
        keep: the run's keep schedule, for methods that follow it.
        width: channels of the network's first stage.
    """

    samples: int
    classes: int
    epochs: int
    batch_size: int
    seed: int
    keep: Callable[[float], float] = field(default_factory=batchtrim.linear)
    width: int = 32

    @property
    def batches(self) -> int:
        """The number of steps in an epoch; the last batch may be smaller."""
        return math.ceil(self.samples / self.batch_size)


class Method:
    """A method in training; by default just a trimmer.

    Attributes:
        trim: the trimmer, which also counts and keeps the clock.
        epochs: how many epochs to train, a whole number or not.
    """

    def __init__(self, trim: Trimmer, epochs: float):
        self.trim = trim
        self.epochs = epochs

    def prepare(self, reference: Reference) -> None:
        """Prepare once before the first epoch; the time counts as training."""

    def rows(self, order: Tensor, epoch: int) -> Tensor:
        """Return the rows that ``epoch`` visits, given all of them in a random order."""
        return order

    def loss(self, losses: Tensor, rows: Tensor, plain: Tensor | None = None) -> Tensor:
        """Return the loss to step on, from the losses (B,) of the training set's ``rows`` (B,).

        Args:
            plain: losses (B,) to rank by, if something is added to those trained on (label smoothing).
        """
        return self.trim(losses, rank_by=plain)

    def connect(self, network: NewNetwork) -> None:
        """Receive a function that makes further networks, for methods that train a second one. Called once, first."""

    def choose(self, inputs: Tensor, targets: Tensor) -> Selection | None:
        """Return the samples of a batch that the network should see; None for all."""
        return None

    def watch(self, outputs: Tensor, targets: Tensor) -> None:
        """Receive the batch's detached outputs (B, classes), before :meth:`loss`."""

    def more_samples(self) -> tuple[int, int]:
        """Return the forward and backward samples since the last call that the training loop does not count itself."""
        return 0, 0

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers of further networks; they follow the run's learning rate."""
        return []

    def after_batch(self) -> None:
        """Act after every step."""

    def after_epoch(self, accuracy: float) -> None:
        """Act after every epoch; ``accuracy`` is its running training accuracy."""
        self.trim.step(accuracy=accuracy)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to continue as if it had never stopped."""
        return {"trim": self.trim.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.trim.load_state_dict(state["trim"])


class Reweighted(Method):
    """Keeps every sample and transforms its loss; statistics are those of the plain losses."""

    def __init__(self, transform: Callable[[Tensor], Tensor], epochs: float):
        super().__init__(Trimmer(1.0), epochs)
        self.transform = transform

    def loss(self, losses: Tensor, rows: Tensor, plain: Tensor | None = None) -> Tensor:
        self.trim.select(losses)
        return self.transform(losses).mean()


class Shortened(Method):
    """Plain training that ends after a given number of samples, with the learning rate fully decayed."""

    def __init__(self, samples: int, info: RunInfo):
        super().__init__(Trimmer(1.0), samples / info.samples)
        self.budget = samples
        self.samples = info.samples

    def rows(self, order: Tensor, epoch: int) -> Tensor:
        return order[: max(1, self.budget - epoch * self.samples)]


class EveryStep(Method):
    """A method whose clock counts steps instead of epochs."""

    def after_batch(self) -> None:
        self.trim.step()

    def after_epoch(self, accuracy: float) -> None:
        pass


class InfoBatch(Method):
    """Before each epoch, drop samples whose last loss is below the mean with probability r.

    The others get the weight 1 / (1 - r), so the expected gradient is the full one. The last epochs use all samples.
    """

    def __init__(self, info: RunInfo, ratio: float, anneal: float):
        super().__init__(Trimmer(1.0), info.epochs)
        self.ratio = ratio
        self.first_whole = math.floor(info.epochs * (1.0 - anneal))  # from this epoch on nothing is dropped
        self.scores = torch.full((info.samples,), math.inf)
        self.weights = torch.ones(info.samples)
        self.generator = Generator().manual_seed(info.seed)

    def rows(self, order: Tensor, epoch: int) -> Tensor:
        self.weights.fill_(1.0)
        if epoch == 0 or epoch >= self.first_whole:
            return order
        scores = self.scores.cpu()
        easy = scores < scores.mean()
        dropped = easy & (torch.rand(len(scores), generator=self.generator) < self.ratio)
        self.weights[easy.to(self.weights.device)] = 1.0 / (1.0 - self.ratio)
        return order[~dropped[order]]

    def loss(self, losses: Tensor, rows: Tensor, plain: Tensor | None = None) -> Tensor:
        if self.scores.device != losses.device:
            self.scores, self.weights = self.scores.to(losses.device), self.weights.to(losses.device)
        self.scores[rows] = (losses if plain is None else plain).detach().to(self.scores.dtype)
        return self.trim(losses * self.weights[rows])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "scores": self.scores.cpu().clone(),
            "weights": self.weights.cpu().clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.scores, self.weights = state["scores"].clone(), state["weights"].clone()
        self.generator.set_state(state["generator"])


class RhoLoss(Method):
    """Keep the hardest samples by loss minus the loss of a network that never trained on them.

    There is no spare data to hold out, so two networks are trained, one on each half, and each scores the other half.
    """

    def __init__(self, info: RunInfo, keep: float, reference_epochs: int):
        super().__init__(Trimmer(keep, seed=info.seed), info.epochs)
        self.reference_epochs = reference_epochs or info.epochs
        self.seed = info.seed
        self.irreducible = torch.zeros(info.samples)

    def prepare(self, reference: Reference) -> None:
        order = torch.randperm(len(self.irreducible), generator=Generator().manual_seed(self.seed))
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        for number, (trained, scored) in enumerate(((first, second), (second, first))):
            losses = reference(trained, self.reference_epochs, 2 * self.seed + number)
            self.irreducible[scored] = losses[scored]

    def loss(self, losses: Tensor, rows: Tensor, plain: Tensor | None = None) -> Tensor:
        self.irreducible = self.irreducible.to(losses.device)
        ranked = losses.detach() if plain is None else plain
        return self.trim(losses, rank_by=ranked - self.irreducible[rows].to(ranked.dtype))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"irreducible": self.irreducible.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.irreducible = state["irreducible"].clone()


@dataclass(frozen=True)
class Interrupted:
    """A schedule: ``keep`` on every ``every``-th of ``total`` steps between progress ``start`` and ``end``, else 1."""

    keep: float
    start: float
    end: float
    every: int
    total: int

    def __call__(self, progress: float) -> float:
        step = round(progress * (self.total - 1))
        return self.keep if self.start <= progress < self.end and step % self.every == 0 else 1.0


@dataclass(frozen=True)
class FocalLoss:
    """``losses -> focal(losses)`` with a fixed gamma; an object, so that it pickles."""

    gamma: float

    def __call__(self, losses: Tensor) -> Tensor:
        return batchtrim.focal(losses, self.gamma)


@dataclass(frozen=True)
class SuperLoss:
    """``losses -> superloss(losses)`` with fixed tau and lam."""

    tau: float
    lam: float

    def __call__(self, losses: Tensor) -> Tensor:
        return batchtrim.superloss(losses, self.tau, self.lam)
