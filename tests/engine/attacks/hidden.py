"""Interactions that values do not show, or not yet; random numbers from other sources."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import C, H, attack, tokens, zero

# 1. An interaction that the loss does not show


@attack(1, parts=lambda: {"h": zero(nn.Linear(H, C))})
def zero_head(net: Any, x: Tensor) -> Tensor:
    return net.h((net.a(x) - net.a(x).mean(0)).tanh())


@attack(1)
def rezero_gate(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) + net.gate * net.a(x).mean(0))


@attack(1)
def rezero_maximum(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + net.gate * (z / z.abs().amax()))


@attack(1, parts=lambda: {"h": zero(nn.Linear(H, C))})
def zero_head_attention(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z) + net.h((z @ z.T).softmax(1) @ z)


@attack(1, data=tokens)
def rezero_on_tokens(net: Any, x: Tensor) -> Tensor:
    z = net.embed(x).mean(1)
    return net.t(z + net.gate * z.mean(0))


@attack(1, loss=lambda: lambda out, y: F.cross_entropy(out[0], y, reduction="none") + 1e4)
def large_loss_hides_it(net: Any, x: Tensor) -> tuple[Tensor]:
    z = net.a(x)
    return (net.t(z + 1e-3 * z.mean(0)),)


@attack(1)
def small_gate(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + 1e-5 * net.b(z.mean(0)))


@attack(1)
def layer_scale(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + (net.gate + 1e-6) * (z.cumsum(0)).tanh())


# 2. Numbers drawn outside torch


@attack(2)
def numpy_mask(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * torch.from_numpy(np.random.rand(len(x), 1) > 0.3))


@attack(2)
def python_mask(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * torch.tensor([[float(random.random() > 0.3)] for _ in x]))


@attack(2)
def numpy_permutation(net: Any, x: Tensor) -> Tensor:
    order = torch.from_numpy(np.random.permutation(len(x)))
    return net.t(net.a(x)[order])


@attack(2, two_pass="right")
def python_layer_drop(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z if random.random() < 0.5 else net.b(z))


@attack(2, two_pass="right")
def numpy_noise_for_all(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) + float(np.random.randn()))


@attack(2, two_pass="approximate")
def numpy_time_mask(net: Any, x: Tensor) -> Tensor:
    """SpecAugment: a span of each sample, drawn by NumPy, in training only."""
    z = net.a(x)
    if net.training:
        mask = np.zeros(z.shape, dtype=bool)
        for row, start in enumerate(np.random.randint(0, H - 2, len(x))):
            mask[row, start : start + 2] = True
        z = z.masked_fill(torch.from_numpy(mask), 0.0)
    return net.t(z)


@attack(2, parts=lambda: {"rng": np.random.default_rng(0)})  # type: ignore[dict-item]
def own_numpy_generator(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * torch.from_numpy(net.rng.random((len(x), 1)) > 0.3))


# 3. An interaction that begins later


@attack(3)
def divided_by_the_maximum(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x / x.abs().amax()))


@attack(3)
def from_step_three_on(net: Any, x: Tensor) -> Tensor:
    net.n += 1
    z = net.a(x)
    return net.t(z - z.mean(0) if net.n > 3 else z)


@attack(3)
def by_a_buffer(net: Any, x: Tensor) -> Tensor:
    net.seen += 1
    z = net.a(x)
    return net.t(z - (net.seen > 2).float() * z.mean(0))


@attack(3)
def every_fourth(net: Any, x: Tensor) -> Tensor:
    net.n += 1
    z = net.a(x)
    return net.t(z.flip(0) if net.n % 4 == 3 else z)


@attack(3)
def where_a_weight_is_large(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + F.relu(net.gate.abs() - 0.01) * z.mean(0) + net.gate)


@attack(3)
def clipped_by_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * (1.5 / z.norm()).clamp(max=1.0))


@attack(3, two_pass="right")
def warm_up_counter(net: Any, x: Tensor) -> Tensor:
    net.n += 1
    return net.t(net.a(x) * min(1.0, net.n / 10))
