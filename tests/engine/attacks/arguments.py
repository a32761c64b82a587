"""Operators that keep rows separate, or keep zeros zero, only for some of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import H, attack, backward_of, tokens, vectors

aten = torch.ops.aten


def _entered(name: str, change: Callable[[Tensor], Tensor], two_pass: str = "either") -> None:
    function = backward_of(change)

    def inside(net: Any, x: Tensor) -> Tensor:
        return net.t(function(net.a(x)).tanh())

    def outside(net: Any, x: Tensor) -> Tensor:
        return function(net.t(net.a(x).tanh()))

    for run, where in ((inside, "inside"), (outside, "outside")):
        run.__name__ = f"{name}_{where}"
        attack(16, two_pass=two_pass)(run)


# 16. A rule that holds for some arguments only

# not zero at zero
_entered("clamp_min", lambda g: aten.clamp_min(g, 0.1))
_entered("clamp_of_tensors", lambda g: torch.clamp(g, torch.tensor(0.01), torch.tensor(1.0)))
_entered("hardtanh", lambda g: F.hardtanh(g, 0.01, 0.5))
_entered("threshold", lambda g: F.threshold(g, 0.1, 0.02))
_entered("added_in_another_type", lambda g: (g.half() + torch.tensor(0.01, dtype=torch.float64)).float())
_entered("added_to_a_number", lambda g: torch.add(g, 0.01, alpha=0.5))
_entered("subtracted_from", lambda g: torch.rsub(g, 0.01))
_entered("power_of_zero", lambda g: (g.abs() + 0.0).pow(0.0) * 0.01)
_entered("maximum_with_a_constant", lambda g: torch.maximum(g, torch.full((), 0.01)))
_entered("lerped", lambda g: torch.lerp(g, torch.ones_like(g), 0.01))
_entered("where_it_is_zero", lambda g: torch.where(g == 0, 0.01, g))
_entered("masked_filled", lambda g: g.masked_fill(g.abs() < 0.01, 0.02))
_entered("softmaxed", lambda g: g.softmax(1) * 0.01)
_entered("normalised_with_eps", lambda g: (g + 1e-3) / (g.norm(dim=1, keepdim=True) + 1e-3))
_entered("as_ones", lambda g: torch.ones_like(g) * 0.01)
_entered("padded_with_ones", lambda g: F.pad(g[:, :-1], (0, 1), value=0.01))
# zero at zero
_entered("clamped", lambda g: g.clamp(-0.1, 0.1), "right")
_entered("nan_to_num", lambda g: torch.nan_to_num(g, nan=1.0), "right")
_entered("clipped_by_its_norm", lambda g: g / g.norm(dim=1, keepdim=True).clamp_min(1.0), "right")
_entered("in_half_precision", lambda g: g.half().float(), "either")
# by the number of rows, or of the row
_entered("rolled_by_the_batch", lambda g: g.roll(len(g), 1))
_entered("scaled_by_rank", lambda g: g * torch.arange(len(g))[:, None])
_entered("cut_by_the_batch", lambda g: torch.cat([g[:, : len(g) % 3], 2 * g[:, len(g) % 3 :]], 1))


@attack(16)
def rolled_by_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).roll(len(x), 1))


@attack(16)
def dilated_by_the_batch(net: Any, x: Tensor) -> Tensor:
    w = net.b.weight[:1, None, :3]
    return net.t(F.conv1d(net.a(x)[:, None], w, padding=len(x), dilation=len(x))[:, 0])


@attack(16, parts=lambda: {"where": nn.Linear(1, H)})
def number_in_the_batch(net: Any, x: Tensor) -> Tensor:
    places = torch.arange(len(x), dtype=torch.float32)[:, None]
    return net.t(net.a(x) + net.where(places))


@attack(16, parts=lambda: {"embed": nn.Embedding(40, H)})
def embedded_number_in_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) + net.embed(torch.arange(len(x))))


@attack(16)
def numbers_side_by_side(net: Any, x: Tensor) -> Tensor:
    places = torch.arange(len(x), dtype=torch.float32)[:, None]
    return net.t(torch.cat([net.a(x)[:, 1:], places.mul(0.1)], 1) * torch.cat([places, places], 1).sum(1, keepdim=True))


@attack(16)
def number_as_boolean(net: Any, x: Tensor) -> Tensor:
    rows = torch.arange(len(x)).bool().long()
    return net.t(net.a(x)[rows])


@attack(16)
def number_as_class(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).repeat(1, 3)
    own = F.cross_entropy(z, torch.arange(len(x)), reduction="none")
    return net.t(net.a(x)) * own[:, None]


@attack(16)
def number_gathered(net: Any, x: Tensor) -> Tensor:
    places = torch.arange(len(x)).repeat(2).view(2, -1).t()
    return net.t(net.a(x) * places.gather(1, net.a(x)[:, :1].gt(0).long()) * 0.1)


@attack(16, two_pass="right")
def number_of_each_copy(net: Any, x: Tensor) -> Tensor:
    places = torch.arange(len(x)).expand(2, len(x)).reshape(-1)
    return net.t(net.a(x).tanh()[places].sin().view(2, len(x), H).sum(0))


@attack(16, shared="either", two_pass="refused")
def size_of_a_square(net: Any, x: Tensor) -> Tensor:
    z = torch.cat([net.a(x).expand(len(x), len(x), H)] * 2, 2) @ net.b.weight.detach().repeat(2, 2)
    return net.t(sum(z.unbind(2)).sum(0).reshape(len(x), -1).expand(len(x), H))


@attack(16, two_pass="either")
def noise_of_many_rows(net: Any, x: Tensor) -> Tensor:
    """Rows lie sample by sample in ``z``, and nothing but ``z`` tells where they lie in the noise."""
    z = net.a(x)[:, None].expand(-1, 3, -1).reshape(3 * len(x), H)
    noise = torch.rand_like(torch.ones(3 * len(x), H))
    return net.t((z * noise).tanh().view(len(x), 3, H).mean(1))


@attack(16, two_pass="either")
def dropout_of_ones(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)[:, None].expand(-1, 3, -1).reshape(3 * len(x), H)
    mask = F.dropout(torch.ones(3 * len(x), 1), 0.5, net.training)
    return net.t((z * mask).tanh().view(len(x), 3, H).mean(1))


@attack(16, two_pass="either")
def drawn_in_place_for_many_rows(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)[:, None].expand(-1, 3, -1).reshape(3 * len(x), H)
    noise = torch.empty(3 * len(x), 1).uniform_(0.5, 1)
    return net.t((z * noise).tanh().view(len(x), 3, H).mean(1))


@attack(16, two_pass="right", keep=(0.1, 0.15, 0.3))
def squeezed_with_one_kept(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)[:, None, :].squeeze()
    return net.t(z.tanh().squeeze(0).squeeze(1))


squeezed = backward_of(lambda g: (g[:, None] * torch.ones(1, 1, H)).squeeze())


@attack(16, two_pass="either", keep=(0.1, 0.15, 0.3))
def squeezed_gradient_with_one_kept(net: Any, x: Tensor) -> Tensor:
    return net.t(squeezed(net.a(x)).tanh())


@attack(16)
def scales_of_instance_norm_mistaken(net: Any, x: Tensor) -> Tensor:
    """One scale for each channel of each sample, in the order of another layout."""
    z = net.a(x).view(1, len(x) * 2, 4)
    scale = net.gate + net.t.bias[:2][:, None].expand(2, len(x)).reshape(-1)
    return net.t(F.batch_norm(z, None, None, scale, training=True).view(len(x), H))


@attack(16, two_pass="right")
def scales_of_instance_norm(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).view(1, len(x) * 2, 4)
    return net.t(F.batch_norm(z, None, None, net.t.bias[:2].repeat(len(x)), training=True).view(len(x), H))


@attack(16, two_pass="right")
def values_repeated_for_two_views(net: Any, x: Tensor) -> Tensor:
    z = net.a(torch.cat([x, 0.5 * x]))
    gate = net.b.weight.detach()[:2, :4].expand(len(z), 2, 4).reshape(-1, 4) @ net.b.weight.detach()[:4, :4]
    return sum(net.t((z.view(-1, 4) * gate.exp()).view(-1, H)).chunk(2))


@attack(16)
def bucketized_by_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    edges = z.detach()[:, 0].sort().values
    return net.t(z * torch.bucketize(z.detach(), edges))


@attack(16, two_pass="right")
def bucketized(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * torch.bucketize(z.detach(), torch.linspace(-1, 1, 5)))


@attack(16)
def searched_in_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * torch.searchsorted(z.detach()[:, 0].sort().values, z.detach()))


@attack(16, two_pass="right")
def searched_in_its_row(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * torch.searchsorted(z.detach().sort(1).values, z.detach()))


@attack(16, two_pass="right")
def alternating_layouts(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    major = z[:, None].expand(-1, 3, -1).reshape(-1, H)
    minor = z[None].expand(3, -1, -1).reshape(-1, H)
    return net.t(major.view(-1, 3, H).mean(1) * minor.view(3, -1, H).mean(0))


@attack(16)
def layouts_confused(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    major = z[:, None].expand(-1, 3, -1).reshape(-1, H)
    minor = z[None].expand(3, -1, -1).reshape(-1, H)
    return net.t((major * minor.tanh()).view(-1, 3, H).mean(1))


@attack(16, data=tokens)
def targets_in_another_layout(net: Any, x: Tensor) -> Tensor:
    z = net.embed(x)
    own = F.cross_entropy(z.reshape(-1, H), x.t().reshape(-1) % H, reduction="none")
    return net.t(z.mean(1)) * own.view(len(x), -1).mean(1, keepdim=True)


@attack(16, data=vectors, two_pass="right")
def complex_numbers(net: Any, x: Tensor) -> Tensor:
    z = torch.view_as_complex(net.a(x).view(-1, 4, 2))
    return net.t(torch.view_as_real(z * z.conj() + z.exp()).flatten(1))
