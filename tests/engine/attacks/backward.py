"""Interactions in backward alone, unusual random operators, batch statistics written by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import C, D, H, V, attack, backward_of, tokens

# 4. Only backward looks at the batch


@attack(4, data=tokens, parts=lambda: {"embed": nn.Embedding(V, H, scale_grad_by_freq=True)})
def scaled_by_frequency(net: Any, x: Tensor) -> Tensor:
    return net.t(net.embed(x).mean(1))


@attack(4, data=tokens)
def scaled_by_frequency_as_a_function(net: Any, x: Tensor) -> Tensor:
    return net.t(F.embedding(x, net.embed.weight, scale_grad_by_freq=True).mean(1))


@attack(4)
def hook_that_counts(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    z.register_hook(lambda g: g * len(g))
    return net.t(z)


@attack(4)
def hook_that_counts_by_summing_ones(net: Any, x: Tensor) -> Tensor:
    z = net.a(torch.cat([x, 0.5 * x]))
    z.register_hook(lambda g: g * g.new_ones(len(g), 1).expand(len(g), len(g)).sum(1, keepdim=True))
    return sum(net.t(z).chunk(2))


@attack(4, shared="refused")
def hook_that_moves_a_buffer(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)

    def note(g: Tensor) -> None:
        net.seen.mul_(0.9).add_(g.abs().mean())

    if z.requires_grad:
        z.register_hook(note)
    return net.t(z)


@attack(4, shared="refused")
def hook_that_moves_a_weight(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)

    def move(g: Tensor) -> None:
        net.b.bias.data.sub_(g.sum(), alpha=0.1)

    if z.requires_grad:
        z.register_hook(move)
    return net.t(net.b(z))


class _Accumulates(torch.autograd.Function):
    """Adds a weight's gradient to a tensor of the weight's own, as kernels for large models do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensors
        weight.main_grad.add_(gradients[0].T @ x)
        return gradients[0] @ weight, None


def _with_main_grad(net: Any) -> Any:
    net.b.weight.main_grad = torch.zeros(H, H)
    return net


@attack(4, wrap=_with_main_grad, shared="refused")
def gradient_added_to_an_attribute(net: Any, x: Tensor) -> Tensor:
    return net.t(_Accumulates.apply(net.a(x), net.b.weight))


class _Scaled(torch.autograd.Function):
    """Rounds a gradient by the largest entry of the step before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: Tensor) -> Tensor:
        ctx.largest = largest
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        unit = ctx.largest / 100 + 1e-6
        rounded = (gradients[0] / unit).round() * unit
        ctx.largest.copy_(gradients[0].abs().max())
        return rounded, None


@attack(4, shared="refused")
def gradients_rounded_by_the_step_before(net: Any, x: Tensor) -> Tensor:
    return net.t(_Scaled.apply(net.a(x), net.scale))


@attack(4)
def hook_that_centres(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    if z.requires_grad:
        z.register_hook(lambda g: g - g.mean(0))
    return net.t(z)


_counts = backward_of(lambda g: g / len(g))


@attack(4)
def function_that_counts(net: Any, x: Tensor) -> Tensor:
    return net.t(_counts(net.a(x)))


_normalised = backward_of(lambda g: g / (g.norm() + 1e-6))


@attack(4, two_pass="right")
def function_that_normalises(net: Any, x: Tensor) -> Tensor:
    return net.t(_normalised(net.a(x)))


def _hooked(net: nn.Module) -> nn.Module:
    net.a.register_full_backward_hook(
        lambda _, __, out: (out[0].sum(0, keepdim=True).expand_as(out[0]).mean(1, True) * torch.ones(D),)
    )
    return net


@attack(4, wrap=_hooked, data=lambda b: (torch.randn(b, D).requires_grad_(), torch.randint(0, C, (b,))))
def full_backward_hook_on_inputs(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(net.b(F.pad(x, (0, H - D)))[:, :D]))


@attack(4)
def tensor_hook_by_rank_of_gradients(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    if z.requires_grad:
        z.register_hook(lambda g: g * (g.norm(dim=1, keepdim=True) >= g.norm(dim=1).median()))
    return net.t(z)


# 5. A random operator of its own form


@attack(5, parts=lambda: {"act": nn.RReLU()}, two_pass="approximate")
def rrelu(net: Any, x: Tensor) -> Tensor:
    return net.t(net.act(net.a(x)))


@attack(5, two_pass="approximate")
def bernoulli_in_place(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * torch.empty_like(z).bernoulli_(0.7) if net.training else z)


@attack(5, two_pass="approximate")
def noise_in_place(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + torch.zeros_like(z).normal_() if net.training else z)


@attack(5)
def gumbel(net: Any, x: Tensor) -> Tensor:
    return net.t(F.gumbel_softmax(net.a(x), hard=True))


@attack(5)
def multinomial(net: Any, x: Tensor) -> Tensor:
    picked = torch.multinomial(net.a(x).softmax(1), 2)
    return net.t(F.one_hot(picked, H).sum(1) * net.a(x))


@attack(5, data=lambda b: (torch.randn(b, 4, D), torch.randint(0, C, (b,))))
def fractional_pool(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).unsqueeze(1)
    return net.t(F.fractional_max_pool2d(z, 2, output_size=(2, 5)).flatten(1)[:, :H])


@attack(5)
def variational(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + torch.randn_like(z) * net.b(z).sigmoid())


# 9. Batch statistics that are no nn.BatchNorm


@attack(9)
def functional_batch_norm(net: Any, x: Tensor) -> Tensor:
    return net.t(F.batch_norm(net.a(x), None, None, training=True))


@attack(9)
def standardised_by_hand(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t((z - z.mean(0)) / (z.std(0) + 1e-3))


@attack(9)
def detached_mean(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z - z.mean(0).detach())


@attack(9)
def instance_norm_along_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(F.instance_norm(net.a(x).T.unsqueeze(0)).squeeze(0).T)


@attack(9)
def layer_norm_along_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).T
    return net.t(F.layer_norm(z, (z.shape[1],)).T)


@attack(9)
def normalised_along_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(F.normalize(net.a(x), dim=0))


@attack(9)
def weight_standardised_with_the_batch(net: Any, x: Tensor) -> Tensor:
    w = net.b.weight / (1 + net.a(x).var())
    return net.t(F.linear(net.a(x), w))


@attack(9, two_pass="right", shared="right", parts=lambda: {"norm": nn.BatchNorm1d(H).eval()})
def frozen_batch_norm(net: Any, x: Tensor) -> Tensor:
    net.norm.training = False
    return net.t(net.norm(net.a(x)))
