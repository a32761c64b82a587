"""Networks and a loss that engines refuse, or in which rows interact; networks with odd inputs and outputs."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerDrop(nn.Module):
    """Drops whole layers by Python's and by torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            draw = random.random() if i % 2 else torch.rand(1).item()
            if draw < 0.5:
                x = x + torch.tanh(layer(x))
        return self.head(x)


class Sparse(nn.Module):
    """Features mixed by a sparse matrix, which has no memory in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.mix = torch.eye(8).roll(1, 0).to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return self.head(x + torch.sparse.mm(self.mix, torch.tanh(x).t()).t())


class Branching(nn.Module):
    """Control flow that depends on the whole batch's values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x) if x.mean() > 0 else torch.tanh(self.c(x))
        return self.head(x)


class BatchAttention(nn.Module):
    """Samples attend to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return self.head((q @ q.t()).softmax(1) @ self.v(x))


class BatchMean(nn.Module):
    """The batch's mean goes through a layer and back to every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(torch.tanh(x + self.b(x.mean(0, keepdim=True))))


class Shuffled(nn.Module):
    """Mixes each sample with a random other one.

    Not by ``x[torch.randperm(n)]``, for which Inductor of torch 2.13 fails once a process has compiled anything else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(torch.tanh(x + 0.5 * x[torch.randperm(x.shape[0]).flip(0)]))


class HardCoded(nn.Module):
    """Written for one batch size."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.head = batch, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.view(self.batch, 8))


def contrastive(outputs: Tensor, _: Tensor) -> Tensor:
    """A loss of each sample against all others."""
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.t(), torch.arange(len(z)), reduction="none")


class TwoInputs(nn.Module):
    """Tokens of every sample, and a number that belongs to no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 5)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        return self.head(self.embed(tokens).mean(1) * scale)


class DataOfTwoInputs(TwoInputs):
    """The same, in a dataclass."""

    def forward(self, tokens: Tensor, scale: Tensor) -> Data:  # type: ignore[override]
        return Data(super().forward(tokens, scale))


class TimeMajor(nn.Module):
    """Takes (T, B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(x)).mean(0))


class Queue(nn.Module):
    """A queue of limited length among its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 5)
        self.queue: deque[int] = deque(maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        self.queue.append(len(self.queue) + 1)
        return self.a(x) * sum(self.queue)


class Named(NamedTuple):
    logits: Tensor


@dataclass
class Data:
    logits: Tensor


class NamedOutput(nn.Linear):
    """Returns a named tuple."""

    def __init__(self) -> None:
        super().__init__(8, 5)

    def forward(self, x: Tensor) -> Named:  # type: ignore[override]
        return Named(super().forward(x))


class DataOutput(NamedOutput):
    """Returns a dataclass."""

    def forward(self, x: Tensor) -> Data:  # type: ignore[override]
        return Data(F.linear(x, self.weight, self.bias))


class Part(nn.Module):
    """A layer whose class a test changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def squashed(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()
