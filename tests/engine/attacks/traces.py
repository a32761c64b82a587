"""Attacks on the trace, and rows along unusual dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attacks.base import C, D, H, V, attack, tokens, vectors
from batchtrim import token_losses

# 15. What a trace may miss


def _as_long_as_the_batch(batch: int) -> tuple[Tensor, Tensor]:
    """Sequences of the batch's own length, or of 5: a size that changes, and is equal to another."""
    length = batch if batch == 7 or float(torch.rand(())) < 0.5 else 5
    return torch.randint(0, V, (batch, length)), torch.randint(0, C, (batch,))


@attack(15, data=_as_long_as_the_batch, two_pass="right")
def text_as_long_as_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.embed(x)
    return net.t(z.cumsum(1).tanh().mean(1))


@attack(15, data=_as_long_as_the_batch, two_pass="right")
def attention_as_long_as_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.embed(x)
    return net.t(F.scaled_dot_product_attention(z, net.b(z), z).mean(1))


@attack(15, data=_as_long_as_the_batch)
def mean_of_the_wrong_dimension(net: Any, x: Tensor) -> Tensor:
    z = net.embed(x)
    return net.t((z - z.mean(0)).tanh().mean(1))


@attack(
    15,
    data=lambda b: (torch.randn(b, 12, 12), torch.randint(0, C, (b,))),
    two_pass="right",
    parts=lambda: {"a": nn.Linear(12, 12), "t": nn.Linear(12, C)},
)
def every_size_the_batch_size(net: Any, x: Tensor) -> Tensor:
    z = net.a(x) @ x.transpose(1, 2)
    return net.t((z.softmax(2) @ x).mean(1))


def _collecting(net: nn.Module) -> nn.Module:
    net.found = []
    net.a.register_forward_hook(lambda module, given, out: net.found.append(out.detach().mean()) or None)
    return net


@attack(15, wrap=_collecting, two_pass="either")
def hook_that_collects(net: Any, x: Tensor) -> Tensor:
    out = net.t(net.a(x))
    net.found.clear()
    return out


def _scaling(net: nn.Module) -> nn.Module:
    net.a.register_forward_hook(lambda module, given, out: out * 1.5)
    net.b.register_forward_pre_hook(lambda module, given: (given[0] - given[0].mean(0),))
    return net


@attack(15, wrap=_scaling)
def hook_that_centres_inputs(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x)))


class Schedule:
    """A plain object that a forward asks, and that counts how often."""

    def __init__(self) -> None:
        self.asked = 0

    def now(self) -> float:
        self.asked += 1
        return 1.0 + 0.1 * self.asked


@attack(15, parts=lambda: {"schedule": Schedule()}, two_pass="right")  # type: ignore[dict-item]
def object_that_counts(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * net.schedule.now())


@attack(15, two_pass="approximate")
def dropout_in_a_checkpoint(net: Any, x: Tensor) -> Tensor:
    return net.t(checkpoint(lambda v: F.dropout(net.a(v), 0.4, net.training).tanh(), x, use_reentrant=False))


@attack(15, two_pass="right")
def written_into_slices(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).clone()
    z[:, 0] = net.a(x * 2)[:, 1]
    z[:, 2:4] *= 2
    z[z > 1] = 0.5
    z.masked_fill_(z < -1, -0.5)
    return net.t(z)


@attack(15)
def written_into_a_row(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).clone()
    z[1] = net.a(x * 2)[0]
    return net.t(z)


@attack(15, data=tokens, two_pass="right", parts=lambda: {"t": nn.Linear(H, V)})
def tied_weights(net: Any, x: Tensor) -> Tensor:
    net.t.weight = net.embed.weight
    return net.t(net.embed(x).mean(1))


@attack(15, two_pass="right", data=lambda b: (torch.randn(b, D, requires_grad=True), torch.randint(0, C, (b,))))
def gradient_of_the_inputs(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).tanh())


@attack(
    15,
    data=lambda b: (torch.randn(b, 5, D), torch.randint(0, C, (b,))),
    two_pass="right",
    parts=lambda: {"rnn": nn.GRU(D, H, batch_first=True)},
)
def recurrent(net: Any, x: Tensor) -> Tensor:
    return net.t(net.rnn(x)[0][:, -1])


@attack(
    15,
    data=lambda b: (torch.randn(b, 5, H), torch.randint(0, C, (b,))),
    two_pass="right",
    parts=lambda: {"mha": nn.MultiheadAttention(H, 2)},
)
def attention_of_time_major(net: Any, x: Tensor) -> Tensor:
    z = x.transpose(0, 1)
    out, weights = net.mha(z, z, z)
    return net.t(out.mean(0)) * weights.amax((1, 2))[:, None]


@attack(
    15,
    data=lambda b: (torch.randn(b, 5, H), torch.randint(0, C, (b,))),
    parts=lambda: {"mha": nn.MultiheadAttention(H, 2)},
)
def attention_with_batch_and_time_mistaken(net: Any, x: Tensor) -> Tensor:
    out, _ = net.mha(x, x, x)
    return net.t(out.mean(1))


@attack(
    15,
    data=lambda b: (torch.randn(b, D), torch.randint(0, C, (b,))),
    two_pass="right",
    parts=lambda: {"made": nn.Linear(D, 3 * 2)},
)
def kernels_made_of_each_sample(net: Any, x: Tensor) -> Tensor:
    """A grouped convolution whose groups are the samples."""
    kernels = net.made(x).view(-1, 1, 3)
    z = net.a(x).view(1, -1, 4)
    return net.t(F.conv1d(z, kernels, padding=1, groups=2 * len(x)).view(len(x), H))


@attack(15)
def kernels_of_the_first_sample(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(F.conv1d(z[:, None], z[:1, None, :3], padding=1)[:, 0])


@attack(15, two_pass="right")
def own_entries_by_computed_index(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    best = z.topk(3, dim=1)
    spread = torch.zeros_like(z).scatter(1, best.indices, best.values)
    return net.t(spread + z.gather(1, z.argsort(1)) + z.sort(1).values)


@attack(15, loss=lambda: lambda out, y: F.cross_entropy(out, y, reduction="none") * len(y) / (y != 0).sum())
def divided_by_a_count_of_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(
    15, two_pass="right", loss=lambda: lambda out, y: F.cross_entropy(out, F.one_hot(y, C).float(), reduction="none")
)
def soft_targets(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(15, data=lambda b: (torch.randn(2 * b, D), torch.randint(0, C, (b,))))
def two_views_of_each_sample(net: Any, x: Tensor) -> Tensor:
    left, right = net.t(net.a(x)).chunk(2)
    return left + right


@attack(15, data=lambda b: (torch.randn(b, D, 3).transpose(1, 2), torch.randint(0, C, (b,))), two_pass="right")
def strides_of_another_order(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).flip(1).cumsum(1).amax(1))


@attack(15, two_pass="right")
def teacher_without_graph(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = net.b(net.a(x)).softmax(1)
    return net.t(net.a(x) * teacher)


@attack(15)
def teacher_of_the_batch(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = net.b(net.a(x)).softmax(0)
    return net.t(net.a(x) * teacher)


@attack(15, data=vectors)
def centred_by_matrix(net: Any, x: Tensor) -> Tensor:
    """A centring matrix over the batch, from the right side of a transpose."""
    n = len(x)
    centre = torch.eye(n) - torch.full((n, n), 1.0 / n)
    return net.t((net.a(x).T @ centre).T)


@attack(15, data=vectors)
def identity_over_the_batch(net: Any, x: Tensor) -> Tensor:
    """No interaction in value: the proof must not need to know."""
    return net.t(torch.eye(len(x)) @ net.a(x) + 0.0 * net.a(x).sum(0))


def _texts(batch: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, V, (batch, 6))
    return x, x.masked_fill(torch.arange(6) >= torch.randint(3, 7, (batch, 1)), -100)


@attack(
    15,
    data=_texts,
    parts=lambda: {"t": nn.Linear(H, V)},
    two_pass="right",
    shared="right",
    loss=lambda: lambda out, y: token_losses(out, y, shift=True),
)
def padded_tokens(net: Any, x: Tensor) -> Tensor:
    return net.t(net.embed(x))


# 22. How forward and backward are run


# as in torch 2.8 and newer
_once = getattr(torch.compiler, "nested_compile_region", lambda function: function)


@_once
def _weighted_sum(z: Tensor, weight: Tensor) -> Tensor:
    return (z * weight).tanh().sum(1)


@attack(22, two_pass="right")
def two_calls_of_a_region_compiled_once(net: Any, x: Tensor) -> Tensor:
    """Torch keeps such a region apart from the graph, and splits its backward from it: here that of one vector."""
    z = net.a(x)
    first, second = _weighted_sum(z, net.b.bias), _weighted_sum(2 * z, net.b.bias + 1)
    return net.t(z * (first * second)[:, None])


@attack(22)
def two_calls_of_a_mixing_region(net: Any, x: Tensor) -> Tensor:
    @_once
    def centred(v: Tensor) -> Tensor:
        return F.dropout(v - v.mean(0), 0.2).tanh()

    return net.t(centred(centred(net.a(x))))
