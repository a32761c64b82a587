"""Common losses, hooks and training code, with separate and with interacting samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attacks.base import C, D, H, attack, regression, tokens
from attacks.layers import images

# 17. Layers and losses of many kinds


@attack(17, two_pass="right")
def straight_through(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    hard = F.one_hot(z.argmax(1), H).float()
    quantised = z + (torch.fake_quantize_per_tensor_affine(z, 0.1, 0, -128, 127) - z).detach()
    return net.t(hard + z.softmax(1) - z.softmax(1).detach() + quantised)


@attack(17, two_pass="right", loss=lambda: lambda out, y: F.cross_entropy(out[0], y, reduction="none")
        + 0.5 * F.cross_entropy(out[1], y, reduction="none", label_smoothing=0.1))  # fmt: skip
def auxiliary_head(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    z = net.a(x)
    return net.t(z.tanh()), net.h(z)


@attack(17, loss=lambda: lambda out, y: F.cross_entropy(out, y, reduction="none") + 0.1 * out.var())
def loss_with_a_term_of_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(
    17,
    loss=lambda: (
        lambda out, y: (-out.log_softmax(1) * (0.9 * F.one_hot(y, C) + 0.1 * out.detach().softmax(1).mean(0))).sum(1)
    ),
)
def smoothed_by_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(17, two_pass="right", loss=lambda: lambda out, y: -F.cosine_similarity(out[0], out[1].detach(), dim=1) + 0 * y)
def byol(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        target = net.h(net.a(x + 0.1))
    return net.t(net.b(net.a(x))), target


def pairs(out: Tensor, y: Tensor) -> Tensor:
    likeness = F.normalize(out, dim=1) @ F.normalize(out.detach() + 0.1, dim=1).T
    return F.cross_entropy(likeness, torch.arange(len(y)), reduction="none")


@attack(17, loss=lambda: pairs)
def contrastive(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(17)
def mixup_by_flipping(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(0.7 * x + 0.3 * x.flip(0)))


@attack(17, data=images, parts=lambda: {"conv": nn.Conv2d(2, H, 3)})
def cutmix_with_the_next(net: Any, x: Tensor) -> Tensor:
    box = torch.zeros(6, 6, dtype=torch.bool)
    box[1:4, 2:5] = True
    return net.t(net.conv(torch.where(box, x.roll(1, 0), x)).mean((2, 3)))


@attack(
    17,
    two_pass="right",
    data=regression,
    loss=lambda: lambda out, y: F.gaussian_nll_loss(out, y, out.exp() + 0.1, reduction="none").mean(1),
)
def gaussian(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(17, two_pass="either", data=lambda b: (torch.randn(b, 9, D), torch.randint(1, C, (b, 3))),
        loss=lambda: lambda out, y: F.ctc_loss(out.log_softmax(2).transpose(0, 1), y, torch.full((len(y),), 9),
                                               torch.full((len(y),), 3), reduction="none"))  # fmt: skip
def connectionist(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).tanh())


def labels(out: Tensor, y: Tensor) -> Tensor:
    each = F.binary_cross_entropy_with_logits(out, y, reduction="none", pos_weight=torch.arange(1.0, C + 1))
    return (each + F.multilabel_soft_margin_loss(out, y, reduction="none")[:, None]).mean(1)


@attack(17, two_pass="right", data=lambda b: (torch.randn(b, D), torch.rand(b, C).round()), loss=lambda: labels)
def many_labels(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(17, two_pass="right", loss=lambda: lambda out, y: F.multi_margin_loss(out, y, reduction="none"))
def margins(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(
    17,
    two_pass="right",
    loss=lambda: lambda out, y: F.kl_div(out.log_softmax(1), F.one_hot(y, C).float(), reduction="none").sum(1),
)
def divergence(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(
    17,
    two_pass="right",
    loss=lambda: lambda out, y: F.triplet_margin_loss(out[:, :2], out[:, 1:3], out[:, 3:], reduction="none"),
)
def triplets(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(
    17,
    two_pass="right",
    loss=lambda: lambda out, y: (1 - (p := out.log_softmax(1).gather(1, y[:, None])[:, 0]).exp()) ** 2 * -p,
)
def focal(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


def named(batch: int) -> tuple[dict[str, Tensor], Tensor]:
    x = {"x": torch.randn(batch, D), "scale": torch.rand(batch), "flag": torch.rand(batch) > 0.5}
    return x, torch.randint(0, C, (batch,))


@attack(17, two_pass="either", data=lambda b: ((torch.randn(12), torch.randn(b, D)), torch.randint(0, C, (b,))))
def constant_in_front(net: Any, scale: Tensor, x: Tensor) -> Tensor:
    return net.t(net.a(x) * scale[:H])


@attack(17, two_pass="right", data=named)
def named_inputs(net: Any, x: Tensor, scale: Tensor, flag: Tensor) -> dict[str, Any]:
    z = net.a(x) * scale[:, None]
    return net.t(torch.where(flag[:, None], z, -z))


class Scaled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / (1 + w.norm())


def _parametrised(net: nn.Module) -> nn.Module:
    parametrize.register_parametrization(net.b, "weight", Scaled())
    return net


@attack(17, wrap=_parametrised, two_pass="right")
def parametrised(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x)).tanh())


@attack(
    17, two_pass="right", parts=lambda: {"many": nn.ParameterList([nn.Parameter(torch.randn(H)) for _ in range(3)])}
)
def list_of_parameters(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    for each in net.many:
        z = z * each + z.tanh()
    return net.t(z)


@attack(17, two_pass="right")
def functional_call(net: Any, x: Tensor) -> Tensor:
    weights = {name: p * 1.1 for name, p in net.b.named_parameters()}
    return net.t(torch.func.functional_call(net.b, weights, (net.a(x),)))


@attack(17, two_pass="right")
def vectorised_map(net: Any, x: Tensor) -> Tensor:
    return net.t(torch.vmap(lambda v: net.a(v).tanh() * v.norm())(x))


@attack(17, two_pass="either")
def tangent(net: Any, x: Tensor) -> Tensor:
    out, along = torch.func.jvp(lambda v: net.a(v).tanh(), (x,), (torch.ones_like(x),))
    return net.t(out + along)


@attack(17)
def map_over_columns(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(torch.vmap(lambda v: v - v.mean(), in_dims=1, out_dims=1)(z))


@attack(17, two_pass="right")
def part_compiled_for_another_backend(net: Any, x: Tensor) -> Tensor:
    return net.t(torch.compile(net.a, backend="eager")(x).tanh())


@attack(17, two_pass="right")
def autocast_inside(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z = net.a(x)
    with torch.autocast("cpu", enabled=False):
        return net.t(z.float())


@attack(17, two_pass="right")
def frozen_then_trained(net: Any, x: Tensor) -> Tensor:
    net.n += 1
    net.b.weight.requires_grad_(net.n % 3 != 0)
    return net.t(net.b(net.a(x)).tanh())


@attack(17, two_pass="right")
def item_that_branches(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * (2.0 if net.t.bias.sum().item() > 0 else 1.0))


@attack(17)
def item_of_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * float(x.abs().max()))


def _clipping(net: nn.Module) -> nn.Module:
    net.a.register_full_backward_hook(
        lambda m, given, out: tuple(g if g is None else g.clamp(-0.01, 0.01) for g in given)
    )
    net.b.register_full_backward_pre_hook(lambda m, out: (out[0] / (1 + out[0].norm()),))
    return net


@attack(17, wrap=_clipping, two_pass="right")
def hooks_that_clip(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x)).tanh())


@attack(17)
def hook_with_a_number(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    if z.requires_grad:
        z.register_hook(lambda g: g + 0.01)
    return net.t(z)


@attack(17)
def hook_by_what_was_seen(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    if z.requires_grad:
        z.register_hook(lambda g: g * x.detach().abs().sum())
    return net.t(z)


@attack(17, two_pass="either")
def hook_by_a_number_that_was_seen(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    if z.requires_grad:
        z.register_hook(lambda g: g * float(x.detach().abs().sum()))
    return net.t(z)


@attack(17, two_pass="right")
def hook_on_a_weight(net: Any, x: Tensor) -> Tensor:
    w = net.b.weight * 1.0
    if w.requires_grad:
        w.register_hook(lambda g: g / (1 + g.norm()))
    return net.t(F.linear(net.a(x), w))


@attack(17, two_pass="right")
def double_backward(net: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        v = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net.a(v).square().sum(), v, create_graph=True)
    return net.t(net.a(x)) * (1 + g.norm(dim=1, keepdim=True))


@attack(17)
def rows_swapped_with_neighbours(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    n = len(x) // 2 * 2
    return net.t(torch.cat([z[:n].view(-1, 2, H).flip(1).reshape(n, H), z[n:]]) + z)


@attack(17, two_pass="right")
def every_second_feature(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).clone()
    z[:, ::2] = z[:, 1::2].exp()
    z[..., -1].mul_(0.5)
    z[:, [0, 3]] += z[:, [3, 0]]
    return net.t(torch.cat([z.narrow(1, 0, 3), z.index_select(1, torch.arange(3, H))], 1))


@attack(17)
def every_second_row(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).clone()
    z[::2] = z[::2] * 2
    return net.t(z)


@attack(17)
def segments(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(torch.zeros(3, H).index_add(0, torch.arange(len(x)) % 3, z)[torch.arange(len(x)) % 3])


@attack(17)
def spread_over_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    key = z.argmax(1, keepdim=True).expand(-1, H) % len(x)
    return net.t(torch.zeros_like(z).scatter_add(0, key, z))


@attack(17, two_pass="right")
def distances_to_codes(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(
        z * torch.cdist(z, net.embed.weight).amin(1, keepdim=True)
        + F.bilinear(z, z, net.b.weight[None].expand(H, H, H))
    )


@attack(17)
def distances_between_samples(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * torch.cdist(z, z).mean(1, keepdim=True))


@attack(17, two_pass="right", parts=lambda: {"b": nn.Bilinear(D, H, H)})
def bilinear(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(x, net.a(x)))


@attack(17, two_pass="right")
def many_activations(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    for f in (
        F.gelu,
        F.celu,
        F.selu,
        F.mish,
        F.hardswish,
        F.softshrink,
        F.tanhshrink,
        F.softsign,
        F.logsigmoid,
        F.relu6,
        F.silu,
    ):
        z = z + f(z)
    return net.t(F.glu(torch.cat([z, F.hardtanh(z)], 1)) + torch.nan_to_num(z.sinc()) + F.threshold(z, 0.1, 0.3))


@attack(17)
def in_double_precision(net: Any, x: Tensor) -> Tensor:
    net.double()
    return net.t(net.a(x.double()).to(torch.float32).double())


@attack(17, two_pass="right", loss=lambda: lambda out, y: F.cross_entropy(out[0], y, reduction="none"))
def view_of_the_input(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return net.t(net.a(x)), x[:, :2]


@attack(17, two_pass="right", data=tokens)
def whole_and_logical_outputs(net: Any, x: Tensor) -> dict[str, Tensor]:
    out = net.t(net.embed(x).masked_fill((x == 0)[..., None], 0).sum(1) / (x != 0).sum(1, keepdim=True).clamp_min(1))
    return out


@attack(17, two_pass="right")
def polynomials(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(
        torch.stack([z**n for n in range(4)], -1).sum(-1)
        + torch.hypot(z, z + 1)
        + torch.atan2(z, 1 + z.abs())
        + torch.logaddexp(z, -z)
    )
