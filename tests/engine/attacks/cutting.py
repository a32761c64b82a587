"""Batches whose rows are in an unusual place, or cannot be cut."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attacks.base import C, D, H, V, attack, tokens

# 12. The rows of a sample are not where they were


class Experts(nn.Module):
    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self.route, self.capacity = nn.Linear(H, 3), capacity
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.route(x).softmax(1).max(1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (index == number).nonzero().flatten()[: self.capacity]
            out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return out


@attack(12, parts=lambda: {"moe": Experts()}, two_pass="right")
def mixture_by_gather(net: Any, x: Tensor) -> Tensor:
    return net.t(net.moe(net.a(x)))


@attack(12, parts=lambda: {"moe": Experts(capacity=2)})
def mixture_with_capacity(net: Any, x: Tensor) -> Tensor:
    return net.t(net.moe(net.a(x)))


@attack(12, two_pass="right")
def sorted_and_back(net: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return net.t(net.a(x[order])[order.argsort()])


@attack(12)
def sorted_values(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).sort(0).values)


@attack(12)
def rolled(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + torch.roll(z, 1, 0))


@attack(12)
def flipped(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).flip(0))


@attack(12)
def nearest_neighbour(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    near = (torch.cdist(x, x) + 1e6 * torch.eye(len(x))).argmin(1)
    return net.t(z + z[near])


@attack(12)
def gathered_by_computed_rows(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + torch.gather(z, 0, z.argsort(0)))


@attack(12, data=lambda b: (torch.randn(b, 3, D), torch.randint(0, C, (b,))), two_pass="right")
def merged_batch_minor(net: Any, x: Tensor) -> Tensor:
    z = net.a(x.transpose(0, 1).reshape(-1, D))
    return net.t(z.view(3, -1, H).mean(0))


@attack(12, data=lambda b: (torch.randn(b, 3, D), torch.randint(0, C, (b,))))
def merged_and_mistaken(net: Any, x: Tensor) -> Tensor:
    """Takes time-major rows for batch-major ones: samples mix."""
    z = net.a(x.transpose(0, 1).reshape(-1, D))
    return net.t(z.view(-1, 3, H).mean(1))


@attack(12, data=lambda b: (torch.randn(4, b, D), torch.randint(0, C, (b,))), two_pass="right", batch_dim=1)
def time_major(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).cumsum(0)[-1].tanh())


@attack(12, data=tokens)
def of_unique_words(net: Any, x: Tensor) -> Tensor:
    words, back = torch.unique(x, return_inverse=True)
    return net.t((net.embed(words) / len(words))[back].mean(1))


@attack(12, two_pass="right")
def of_selected_rows(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    rows = (x[:, 0] > 0).nonzero().flatten()
    return net.t(z.index_add(0, rows, net.b(z[rows])))


# 13. What is cut, and how


def _with_class_weights(batch: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return torch.randn(batch, D), (torch.randint(0, C, (batch,)), torch.linspace(0.5, 2.0, 12))


@attack(
    13, data=_with_class_weights, loss=lambda: lambda out, y: F.cross_entropy(out, y[0], reduction="none") * y[1][C]
)
def constant_as_long_as_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(
    13,
    data=lambda b: (torch.randn(b, D), (torch.randint(0, 12, (b,)), torch.linspace(0.5, 2.0, 12))),
    loss=lambda: lambda out, y: F.cross_entropy(out, y[0], y[1], reduction="none"),
    parts=lambda: {"t": nn.Linear(H, 12)},
)
def class_weights_as_long_as_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(
    13,
    data=lambda b: (torch.randn(b, D), [i % C for i in range(b)]),
    loss=lambda: lambda out, y: F.cross_entropy(out, torch.tensor((list(y) * 2)[: len(out)]), reduction="none"),
)
def list_of_labels(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(
    13,
    data=lambda b: (torch.randn(b, D), np.arange(b) % C),
    loss=lambda: lambda out, y: F.cross_entropy(out, torch.from_numpy(y)[: len(out)], reduction="none"),
)
def numpy_labels(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


def _bags(batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    return (torch.randint(0, V, (batch * 2,)), torch.arange(0, batch * 2, 2)), torch.randint(0, C, (batch,))


@attack(13, data=_bags, parts=lambda: {"bag": nn.EmbeddingBag(V, H)})
def embedding_bag_with_offsets(net: Any, x: Tensor, offsets: Tensor) -> Tensor:
    return net.t(net.bag(x, offsets))


@attack(
    13,
    data=lambda b: ((torch.randint(0, V, (b,)), torch.arange(b)), torch.randint(0, C, (b,))),
    parts=lambda: {"bag": nn.EmbeddingBag(V, H)},
)
def bags_of_one_word(net: Any, x: Tensor, offsets: Tensor) -> Tensor:
    return net.t(net.bag(x, offsets))


def _packed(batch: int) -> tuple[Any, Tensor]:
    lengths = torch.arange(batch) % 3 + 2
    packed = pack_padded_sequence(torch.randn(batch, 4, D), lengths, batch_first=True, enforce_sorted=False)
    return packed, torch.randint(0, C, (batch,))


@attack(13, data=_packed, parts=lambda: {"rnn": nn.GRU(D, H, batch_first=True)})
def packed_sequence(net: Any, x: Any) -> Tensor:
    return net.t(pad_packed_sequence(net.rnn(x)[0], batch_first=True)[0].mean(1))


Pair = namedtuple("Pair", ["left", "right"])


@attack(13, data=lambda b: (Pair(torch.randn(b, D), torch.randn(b, D)), torch.randint(0, C, (b,))), two_pass="right")
def named_tuple(net: Any, x: Pair) -> Tensor:
    return net.t(net.a(x.left) + net.a(x.right))


@dataclasses.dataclass
class Sample:
    left: Tensor
    note: str = ""


@attack(
    13,
    data=lambda b: (Sample(torch.randn(b, D), "a"), torch.randint(0, C, (b,))),
    two_pass="right",
    loss=lambda: lambda out, y: F.cross_entropy(out.left, y, reduction="none"),
)
def data_class(net: Any, x: Sample) -> Sample:
    return Sample(net.t(net.a(x.left)))


class Opaque:
    def __init__(self, inner: Tensor) -> None:
        self.inner = inner


@attack(13, data=lambda b: (Opaque(torch.randn(b, D)), torch.randint(0, C, (b,))))
def object_of_its_own(net: Any, x: Opaque) -> Tensor:
    return net.t(net.a(x.inner))


@attack(
    13,
    data=lambda b: (torch.randn(b, D), torch.randn(b * C)),
    loss=lambda: lambda out, y: (out - y.view(-1, C)[: len(out)]).square().mean(1),
)
def targets_in_one_row(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(13, data=lambda b: ((torch.randn(b, D), torch.randn(12, D)), torch.randint(0, C, (b,))))
def prototypes_as_many_as_samples(net: Any, x: Tensor, prototypes: Tensor) -> Tensor:
    return net.t(net.a(x) - net.a(prototypes).mean(0))


@attack(
    13,
    data=lambda b: ({"x": torch.randn(b, D), "scale": torch.full((D,), 0.5), "mode": "a"}, torch.randint(0, C, (b,))),
    two_pass="right",
)
def mapping_with_constants(net: Any, x: Tensor, scale: Tensor, mode: str) -> Tensor:
    return net.t(net.a(x * scale))


@attack(
    13,
    data=lambda b: (torch.randn(b, D), {"label": torch.randint(0, C, (b,)), "names": [str(i) for i in range(b)]}),
    loss=lambda: lambda out, y: F.cross_entropy(out, y["label"], reduction="none") * len(y["names"]) / 12,
)
def names_of_samples(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))
