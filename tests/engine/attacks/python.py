"""Compiled models, and models that run with a graph but not in every other mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attacks.base import C, H, V, attack, tokens, zero

# 8. Compiled models


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


@attack(8, wrap=compiled)
def compiled_mean(net: Any, x: Tensor) -> Tensor:
    return net.t(x.new_zeros(1) + net.a(x - x.mean(0)))


@attack(8, wrap=compiled, parts=lambda: {"h": zero(nn.Linear(H, C))})
def compiled_zero_head(net: Any, x: Tensor) -> Tensor:
    return net.h((net.a(x) - net.a(x).mean(0)).tanh())


@attack(8, wrap=compiled, two_pass="right", shared="right")
def compiled_plain(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).tanh())


@attack(8, wrap=compiled, two_pass="right")
def compiled_in_place(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x.mul_(2)))


def compiled_inside(net: nn.Module) -> nn.Module:
    net.b = torch.compile(net.b, backend="eager")  # type: ignore[assignment]
    return net


@attack(8, wrap=compiled_inside)
def compiled_part(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + net.b(z.mean(0, keepdim=True)))


# 11. Runs with a graph, and not in every other way


class Eighths(Tensor):
    """Quantised weights, as libraries for quantisation make them: whole eighths, in one tensor."""

    @staticmethod
    def __new__(cls, eighths: Tensor) -> Eighths:
        return Tensor._make_wrapper_subclass(cls, eighths.shape, dtype=torch.float32)

    def __init__(self, eighths: Tensor) -> None:
        self.eighths = eighths

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["eighths"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Eighths:
        return Eighths(inner["eighths"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Eighths(func(args[0].eighths))
        plain = torch.utils._pytree.tree_map_only(Eighths, lambda each: each.eighths / 8.0, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def quantised(net: nn.Module) -> nn.Module:
    net.b.weight = nn.Parameter(Eighths((net.b.weight.detach() * 8).round()), requires_grad=False)
    return net


@attack(11, wrap=quantised, two_pass="right", shared="right")
def frozen_weight_of_a_tensor_class(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x).tanh()).tanh())


@attack(11, two_pass="right", shared="right")
def scanned_with_a_captured_weight(net: Any, x: Tensor) -> Tensor:
    """The operator compiles itself, and fails where that is switched off."""
    from torch._higher_order_ops.scan import scan

    def body(state: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(state @ net.b.weight + own)
        return state, state.clone()

    return net.t(scan(body, x.new_zeros(len(x), H), net.a(x)[None].repeat(2, 1, 1))[0])


@attack(11, two_pass="either")
def gradient_inside(net: Any, x: Tensor) -> Tensor:
    g = torch.func.vmap(torch.func.grad(lambda v: net.a(v).tanh().sum()))(x)
    return net.t(net.a(x + g))


@attack(11, two_pass="either")
def autograd_inside(net: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        v = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net.a(v).tanh().sum(), v, create_graph=True)
    return net.t(net.a(x + g))


@attack(11, two_pass="refused")
def needs_a_graph(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    (g,) = torch.autograd.grad(z.tanh().sum(), z, create_graph=True)
    return net.t(z + g)


@attack(11, two_pass="right", parts=lambda: {"a": nn.LazyLinear(H)})
def lazy_linear(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).tanh())


@attack(11, two_pass="either")
def conditional(net: Any, x: Tensor) -> Tensor:
    return net.t(torch.cond(x.sum() > 0, lambda v: net.a(v).tanh(), lambda v: net.a(v).sin(), (x,)))


@attack(11, data=tokens, parts=lambda: {"embed": nn.Embedding(V, H, sparse=True)}, two_pass="right")
def sparse_gradient(net: Any, x: Tensor) -> Tensor:
    return net.t(net.embed(x).mean(1))


@attack(11, two_pass="right")
def checkpointed(net: Any, x: Tensor) -> Tensor:
    return net.t(torch.utils.checkpoint.checkpoint(lambda v: net.a(v).tanh(), x, use_reentrant=False))


@attack(11)
def double_precision(net: Any, x: Tensor) -> Tensor:
    net.double()
    return net.t(net.a(x.double()))


@attack(11, parts=lambda: {"embed": nn.Embedding(V, H, max_norm=0.5)}, data=tokens)
def renormalised_embedding(net: Any, x: Tensor) -> Tensor:
    return net.t(net.embed(x).mean(1))


@attack(11, two_pass="refused")
def branches_by_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z.tanh() if int(x.abs().sum() * 10) % 2 else z.sin())
