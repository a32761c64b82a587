"""Forwards that change their batch, and side effects that an activation checkpoint repeats."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attacks.base import C, D, H, attack, tokens, vectors

# 27. The forward changes the lists, dictionaries and objects of its batch


def _with(**more: Callable[[int], Any]) -> Callable[[int], tuple[Any, Any]]:
    def data(batch: int) -> tuple[Any, Any]:
        x, y = vectors(batch)
        return {"x": x, "more": {name: make(batch) for name, make in more.items()}}, y

    return data


@attack(27, data=_with(mask=lambda b: torch.rand(b, H), k=lambda _: 1), two_pass="right")
def popped_from_the_batch(net: Any, x: Tensor, more: Any) -> Tensor:
    return net.t(net.a(x) * more.pop("mask"))


@attack(27, data=_with(k=lambda _: 1), two_pass="right")
def put_into_the_batch(net: Any, x: Tensor, more: Any) -> Tensor:
    more["features"] = net.a(x).detach()
    return net.t(net.a(x))


@attack(27, data=_with(seen=lambda _: []), two_pass="right")
def appended_to_a_list_of_the_batch(net: Any, x: Tensor, more: Any) -> Tensor:
    more["seen"].append(len(more["seen"]) + 1)
    return net.t(net.a(x)) * len(more["seen"])


@attack(27, data=_with(mask=lambda b: torch.rand(b, H), k=lambda _: 1), two_pass="right")
def entry_replaced_in_the_batch(net: Any, x: Tensor, more: Any) -> Tensor:
    more["mask"] = more["mask"] * 2
    more["k"] += 1
    return net.t(net.a(x) * more["mask"] * more["k"])


@dataclasses.dataclass
class Batch:
    x: Tensor
    views: int = 0


@attack(27, data=lambda b: (Batch(torch.randn(b, D)), torch.randint(0, C, (b,))), two_pass="right")
def data_class_changed(net: Any, given: Batch) -> Tensor:
    given.views += 1
    given.x = given.x * 2
    return net.t(net.a(given.x) * given.views)


# 28. An activation checkpoint does it again in backward


def _checkpointed(function: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> Tensor:
    return checkpoint(function, x, use_reentrant=False, **options)  # type: ignore[return-value]


@attack(28, parts=lambda: {"norm": nn.BatchNorm1d(H)}, shared="refused")
def batch_norm_in_a_checkpoint(net: Any, x: Tensor) -> Tensor:
    return net.t(_checkpointed(lambda v: net.norm(net.a(v)), x))


@attack(28, shared="refused")
def buffer_moved_in_a_checkpoint(net: Any, x: Tensor) -> Tensor:
    def part(v: Tensor) -> Tensor:
        net.seen.add_(1)
        return net.a(v).tanh() * net.seen

    return net.t(_checkpointed(part, x))


@attack(28, shared="refused", two_pass="either")
def view_of_a_buffer_moved_in_a_checkpoint(net: Any, x: Tensor) -> Tensor:
    def part(v: Tensor) -> Tensor:
        net.scale.view(1)[0] += 1
        return net.a(v).tanh() / net.scale

    return net.t(_checkpointed(part, x))


@attack(28, shared="refused", two_pass="either")
def dropout_drawn_again_in_a_checkpoint(net: Any, x: Tensor) -> Tensor:
    return net.t(_checkpointed(lambda v: F.dropout(net.a(v), 0.3, net.training), x, preserve_rng_state=False))


@attack(28, shared="refused", two_pass="either")
def buffer_moved_in_a_checkpoint_of_a_checkpoint(net: Any, x: Tensor) -> Tensor:
    def part(v: Tensor) -> Tensor:
        net.seen.add_(1)
        return v.tanh() * net.seen

    return net.t(_checkpointed(lambda v: _checkpointed(part, net.a(v)), x))


@attack(28, shared="right", two_pass="right")
def checkpoint_that_draws_nothing(net: Any, x: Tensor) -> Tensor:
    return net.t(_checkpointed(lambda v: net.a(v).tanh().clone().mul_(2), x, preserve_rng_state=False))


# 1. An interaction that the loss does not show: too weak, of integers, or of what NaN does not reach


@attack(1)
def weak_signs_of_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + 1e-4 * (z > 0).float().mean(0))


@attack(1, data=tokens)
def weak_mean_of_words(net: Any, x: Tensor) -> Tensor:
    z = net.embed(x).mean(1)
    return net.t(z + 2e-4 * z.mean(0))


@attack(1, data=tokens)
def weak_mean_of_words_in_training(net: Any, x: Tensor) -> Tensor:
    z = F.dropout(net.embed(x).mean(1), 0.1, net.training)
    return net.t(z + 2e-4 * z.mean(0) if net.training else z)


# 2. Numbers drawn outside torch, which the tracer takes for inputs


@attack(2, two_pass="right")
def uniform_number_of_python(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * random.uniform(0.5, 1.5))


# 26. Several rows of another tensor for each sample


@attack(26, data=lambda b: ((torch.randn(b, D), torch.randn(5 * b, D)), torch.randint(0, C, (b,))), shared="right")
def five_negatives_of_each_sample(net: Any, x: Tensor, negatives: Tensor) -> Tensor:
    z = net.a(negatives).view(len(x), 5, H)
    return net.t(net.a(x) - z.mean(1))


@attack(26, data=lambda b: ((torch.randn(b, D), torch.randn(2 * b, D)), torch.randint(0, C, (b,))), shared="right")
def both_views_in_one_tensor(net: Any, x: Tensor, views: Tensor) -> Tensor:
    first, second = net.a(views).chunk(2)
    return net.t(net.a(x) + (first * second).tanh())
