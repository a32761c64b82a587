"""Methods that need more than a schedule and a rule; see the cards in docs/methods.

N training samples, B batch, E epochs, q keep fraction, p true-class probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import batchtrim
from batchtrim import Selection, Trimmer
from batchtrim.lab.methods.base import Method, NewNetwork, RunInfo
from batchtrim.selection import Rule

__all__ = ["Decaying", "FullEnd", "GradientNorm", "Importance", "LossDrop", "ProxySelection", "UnlessFull"]

_PROXY_SEED = 2_000_003  # an offset, so that proxies start from weights that no run starts from


@dataclass(frozen=True)
class FullEnd:
    """A schedule: ``keep``, then 1 in the ``last`` of ``epochs`` epochs."""

    keep: Callable[[float], float]
    epochs: int
    last: int

    def __call__(self, progress: float) -> float:
        full = round(progress * (self.epochs - 1)) >= self.epochs - self.last
        return 1.0 if full else self.keep(progress)


@dataclass(frozen=True)
class Decaying:
    """A schedule: epoch e of ``epochs`` keeps ``decay ** e``."""

    decay: float
    epochs: int

    def __call__(self, progress: float) -> float:
        return max(self.decay ** round(progress * (self.epochs - 1)), 1e-300)


@dataclass(frozen=True)
class UnlessFull:
    """``rule``, but all samples at keep 1: for rules that do not read keep, under :class:`FullEnd`."""

    rule: Rule
    k_follows_losses: ClassVar[bool] = True

    def __call__(self, losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
        return batchtrim.hardest()(losses, keep) if keep == 1.0 else self.rule(losses, keep, generator)


@dataclass(frozen=True)
class Importance:
    """Draw k = keep_count(keep, B) times with replacement, with probability ``p_i`` proportional to the scores.

    A sample drawn c_i times has weight ``c_i / (B * p_i)``, and the sum is divided by k: the expected loss is the mean
    of the batch, whatever the scores. The samples drawn at least once are kept.
    """

    def __call__(self, losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
        n = losses.shape[0]
        k = batchtrim.keep_count(keep, n)
        scores = losses.double().cpu()
        # a sample with probability 0 has no unbiased weight; NaN and inf are always drawn, as by other rules
        chance = torch.where(scores.isfinite(), scores.clamp(min=1e-12), scores.nan_to_num(1.0, 1.0).clamp(min=1.0))
        chance = chance / chance.sum()
        drawn, times = torch.multinomial(chance, k, replacement=True, generator=generator).unique(return_counts=True)
        weights = (times / (n * chance[drawn])).to(losses.device, losses.dtype)
        return Selection(drawn.to(losses.device), n, n, weights, float(k), float(k))


class GradientNorm(Method):
    """Draw by the norm of the gradient at the outputs, ``|softmax(z_i) - y_i|``, and weight by 1 / (B p_i)."""

    def __init__(self, info: RunInfo, keep: float):
        super().__init__(Trimmer(keep, select=Importance(), seed=info.seed), info.epochs)
        self.norms: Tensor | None = None

    def watch(self, outputs: Tensor, targets: Tensor) -> None:
        chances = outputs.float().softmax(1)
        self.norms = (chances - F.one_hot(targets, outputs.shape[1])).norm(dim=1)

    def loss(self, losses: Tensor, rows: Tensor, plain: Tensor | None = None) -> Tensor:
        # without outputs, 1 - p: the true class's part of the norm
        norms = -torch.expm1(-losses.detach()) if self.norms is None else self.norms.to(losses.dtype)
        self.norms = None
        return self.trim(losses, rank_by=norms)


class LossDrop(Method):
    """Drop the samples whose loss fell furthest below their first loss; the first epoch keeps all samples."""

    def __init__(self, info: RunInfo, drop: float):
        afterwards = {0.5 / (info.epochs - 1): 1.0 - drop} if info.epochs > 1 else {1.0: 1.0}
        super().__init__(Trimmer(batchtrim.schedules.step(afterwards), total=info.epochs), info.epochs)
        self.first = torch.full((info.samples,), math.nan)

    def loss(self, losses: Tensor, rows: Tensor, plain: Tensor | None = None) -> Tensor:
        now = (losses if plain is None else plain).detach()
        self.first = self.first.to(now.device)
        first = self.first[rows]
        self.first[rows] = torch.where(first.isnan(), now.to(first.dtype), first)
        fallen = torch.where(first.isnan(), 0.0, now - first.to(now.dtype))
        return self.trim(losses, rank_by=fallen)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"first": self.first.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.first = state["first"].clone()


class ProxySelection(Method):
    """Rank the batch by a narrower proxy network, and run the network on the hardest ``keep`` only.

    The proxy trains on the whole batch in every ``every``-th step. Its forward and backward samples are counted too.
    """

    def __init__(self, info: RunInfo, keep: float, width: int, every: int):
        super().__init__(Trimmer(keep), info.epochs)
        self.width = width or max(1, info.width // 2)
        self.every, self.seed = every, _PROXY_SEED + info.seed
        self.steps = 0
        self.counted = [0, 0]

    def connect(self, network: NewNetwork) -> None:
        self.proxy, self.optimizer, self.backward = network(self.width, self.seed)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    def choose(self, inputs: Tensor, targets: Tensor) -> Selection:
        learns = self.steps % self.every == 0
        self.steps += 1
        self.proxy.train()
        with torch.set_grad_enabled(learns):
            losses = F.cross_entropy(self.proxy(inputs).float(), targets, reduction="none")
        if learns:
            self.optimizer.zero_grad()
            self.backward(losses.mean())
            self.optimizer.step()
        selection = self.trim.select(losses.detach())
        # the training loop counts the whole batch as forward and the kept samples as backward
        self.counted[0] += selection.k
        self.counted[1] += len(targets) if learns else 0
        return selection.rising()

    def loss(self, losses: Tensor, rows: Tensor, plain: Tensor | None = None) -> Tensor:
        return losses.mean()

    def more_samples(self) -> tuple[int, int]:
        forward, backward = self.counted
        self.counted = [0, 0]
        return forward, backward

    def state_dict(self) -> dict[str, Any]:
        state = {"twin": self.proxy.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps}
        return super().state_dict() | state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.proxy.load_state_dict(state["twin"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
