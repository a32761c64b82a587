"""Samples that interact in an obvious way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.base import H, attack

# 14. Samples interact, plainly


@attack(14)
def cumulative(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).cumsum(0))


@attack(14)
def softmax_along_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).softmax(0))


@attack(14)
def einsum_over_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + torch.einsum("bh,bk->hk", z, z)[0])


@attack(14)
def gram(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + (z @ z.T) @ z / len(z))


@attack(14)
def distances(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * torch.cdist(z, z).mean(1, keepdim=True))


@attack(14)
def convolved_along_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    kernel = net.b.weight[:, :, None].expand(-1, -1, 3)
    return net.t(F.conv1d(z.T[None], kernel, padding=1)[0].T)


@attack(14)
def recurrent_along_the_batch(net: Any, x: Tensor) -> Tensor:
    z, out = net.a(x), []
    state = torch.zeros(H)
    for row in z:
        state = torch.tanh(row + 0.5 * state)
        out.append(state)
    return net.t(torch.stack(out))


@attack(14)
def counts_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) / len(x))


@attack(14)
def stop_gradient_gate(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * (z > z.mean(0)).detach())


@attack(14)
def rank_in_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * (z.argsort(0).argsort(0) > len(z) // 2))


@attack(14)
def mixed_up(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(0.7 * z + 0.3 * z[torch.randperm(len(z))])


@attack(14)
def mixed_in_training_only(net: Any, x: Tensor) -> Tensor:
    z = F.dropout(net.a(x), 0.2, net.training)
    return net.t(z - z.mean(0) if net.training else z)


@attack(14, loss=lambda: lambda out, y: F.cross_entropy(out, y, reduction="none") + 0.1 * out.mean(0).square().sum())
def regularised_by_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(14, two_pass="right", loss=lambda: lambda out, y: F.cross_entropy(out, y, reduction="none"))
def weight_penalty(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x)) + net.a.weight.square().sum() * 0.01


@attack(14)
def first_row_for_all(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + z[0])
