"""Running state other than BatchNorm's, and losses that divide by a statistic of the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from attacks.base import C, D, H, V, attack, regression, tokens
from attacks.layers import images, sequences

# 18. State that a forward keeps, outside of BatchNorm


def _buffers(**shapes: tuple[int, ...]) -> Any:
    def parts() -> dict[str, nn.Module]:
        holder = nn.Module()
        for name, shape in shapes.items():
            holder.register_buffer(name, torch.randn(shape).abs() + 0.5)
        return {"kept": holder}

    return parts


@attack(18, parts=_buffers(codes=(7, H)), two_pass="either")
def codebook_moved_after_use(net: Any, x: Tensor) -> Tensor:
    """Codes follow the samples that fall to them (VQ-VAE with an exponential mean)."""
    z = net.a(x)
    nearest = torch.cdist(z.detach(), net.kept.codes).argmin(1)
    out = z + (net.kept.codes[nearest] - z).detach()
    with torch.no_grad():
        hits = F.one_hot(nearest, 7).float()
        means = hits.T @ z / hits.sum(0)[:, None].clamp_min(1)
        net.kept.codes.lerp_(means, 0.1)
    return net.t(out)


@attack(18, parts=_buffers(codes=(7, H)))
def codebook_moved_before_use(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    with torch.no_grad():
        hits = F.one_hot(torch.cdist(z, net.kept.codes).argmin(1), 7).float()
        net.kept.codes.lerp_(hits.T @ z / hits.sum(0)[:, None].clamp_min(1), 0.5)
    return net.t(z + net.kept.codes[torch.cdist(z, net.kept.codes).argmin(1)])


@attack(18, parts=_buffers(queue=(21, H)), two_pass="either")
def queue_that_wraps(net: Any, x: Tensor) -> Tensor:
    """The keys of the last batches as negatives (MoCo): this batch goes in after use."""
    z = F.normalize(net.a(x), dim=1)
    against = z @ net.kept.queue.clone().T
    with torch.no_grad():
        net.kept.queue.copy_(torch.cat([z.detach(), net.kept.queue])[:21])
    return net.t(z) + against.logsumexp(1, keepdim=True)


@attack(18, parts=_buffers(queue=(21, H)))
def queue_filled_before_use(net: Any, x: Tensor) -> Tensor:
    z = F.normalize(net.a(x), dim=1)
    with torch.no_grad():
        net.kept.queue.copy_(torch.cat([z.detach(), net.kept.queue])[:21])
    return net.t(z) + (z @ net.kept.queue.clone().T).logsumexp(1, keepdim=True)


@attack(18, parts=lambda: {"slow": nn.Linear(D, H)})
def momentum_encoder(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        for slow, fast in zip(net.slow.parameters(), net.a.parameters(), strict=True):
            slow.lerp_(fast, 0.1)
        key = net.slow(x)
    return net.t(net.a(x) * key.tanh())


@attack(18, parts=lambda: {"slow": nn.Linear(D, H)})
def average_of_the_weights_beside(net: Any, x: Tensor) -> Tensor:
    """The loss does not see what moves."""
    torch._foreach_lerp_([p.data for p in net.slow.parameters()], [p.data for p in net.a.parameters()], 0.1)
    return net.t(net.a(x).tanh())


@attack(18, parts=lambda: {"slow": nn.Linear(D, H)})
def momentum_encoder_by_assignment(net: Any, x: Tensor) -> Tensor:
    """As MoCo's own code moves it: no operator writes into the parameter."""
    with torch.no_grad():
        for slow, fast in zip(net.slow.parameters(), net.a.parameters(), strict=True):
            slow.data = slow.data * 0.9 + fast.data * 0.1
        key = net.slow(x)
    return net.t(net.a(x) * key.tanh())


@attack(18)
def weights_clipped_in_the_forward(net: Any, x: Tensor) -> Tensor:
    """The critic of a Wasserstein GAN."""
    with torch.no_grad():
        net.b.weight.clamp_(-0.2, 0.2)
    return net.t(net.b(net.a(x)).tanh())


@attack(18, parts=lambda: {"b": parametrizations.spectral_norm(nn.Linear(H, H))}, two_pass="either")
def spectral_norm_by_parametrization(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x)).tanh())


@attack(18, parts=lambda: {"b": parametrizations.weight_norm(nn.Linear(H, H))}, two_pass="right")
def weight_norm_by_parametrization(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x)).tanh())


@attack(18, parts=lambda: {"b": parametrizations.orthogonal(nn.Linear(H, H))}, two_pass="right")
def orthogonal_by_parametrization(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x)).tanh())


@attack(18, parts=_buffers(mean=(H,), var=(H,)))
def batch_renorm(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    mean, std = z.mean(0), z.std(0, unbiased=False) + 1e-3
    r = (std / net.kept.var.sqrt()).detach().clamp(0.5, 2)
    d = ((mean - net.kept.mean) / net.kept.var.sqrt()).detach().clamp(-1, 1)
    with torch.no_grad():
        net.kept.mean.lerp_(mean, 0.1)
        net.kept.var.lerp_(std.square(), 0.1)
    return net.t((z - mean) / std * r + d)


@attack(18, parts=_buffers(mean=(H,), var=(H,)), two_pass="either")
def normalised_by_what_was_before(net: Any, x: Tensor) -> Tensor:
    """By the statistics of earlier batches alone; this batch's go in afterwards."""
    z = net.a(x)
    out = (z - net.kept.mean) / net.kept.var.clone().sqrt()
    with torch.no_grad():
        net.kept.mean.lerp_(z.mean(0), 0.1)
        net.kept.var.lerp_(z.var(0), 0.1)
    return net.t(out)


@attack(18, data=lambda b: (torch.randn(b // 2 * 2, D), torch.randint(0, C, (b // 2 * 2,))))
def ghost_batch_norm(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).view(-1, 2, H)
    return net.t(((z - z.mean(0)) / (z.std(0) + 1e-2)).reshape(-1, H))


@attack(18, data=images, parts=lambda: {"conv": nn.Conv2d(2, H, 3)})
def evolving_norm(net: Any, x: Tensor) -> Tensor:
    """EvoNorm-B0: the larger of the batch's deviation and the sample's."""
    z = net.conv(x)
    batch, own = z.var((0, 2, 3), keepdim=True), z.var((2, 3), keepdim=True)
    return net.t((z / torch.maximum((batch + 1e-3).sqrt(), z.abs() * 0.1 + (own + 1e-3).sqrt())).mean((2, 3)))


@attack(18, data=images, parts=lambda: {"conv": nn.Conv2d(2, H, 3)}, two_pass="right")
def filter_response_norm(net: Any, x: Tensor) -> Tensor:
    z = net.conv(x)
    return net.t((z * torch.rsqrt(z.square().mean((2, 3), keepdim=True) + 1e-6)).mean((2, 3)))


@attack(18, parts=_buffers(usage=(4,)), two_pass="either")
def experts_balanced_by_their_past(net: Any, x: Tensor) -> Tensor:
    """A bias against experts that were busy (DeepSeek's balancing without a loss)."""
    z = net.a(x)
    weight, at = (z[:, :4].softmax(1) - 0.1 * net.kept.usage).topk(2, 1)
    with torch.no_grad():
        net.kept.usage.add_(F.one_hot(at, 4).float().mean((0, 1)), alpha=0.1)
    gate = torch.zeros_like(z[:, :4]).scatter(1, at, weight)
    return net.t((gate.repeat(1, 2) * z).tanh())


@attack(18, loss=lambda: lambda out, y: F.cross_entropy(out[0], y, reduction="none") + out[1])
def experts_balanced_by_a_loss(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    z = net.a(x)
    gate = z[:, :4].softmax(1)
    return net.t(z), 4 * (gate.mean(0) * F.one_hot(gate.argmax(1), 4).float().mean(0)).sum()


@attack(18, two_pass="either")
def attribute_that_remembers_a_tensor(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    before = getattr(net, "remembered", None)
    net.remembered = z.detach().mean(0)
    return net.t(z if before is None else z + 0.1 * before)


# 19. Losses that divide by something of the batch


def _weighted(out: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(out, y, reduction="none")
    weight = 1 + y.float()
    return each * weight / weight.sum() * len(y)


@attack(19, loss=lambda: _weighted)
def weights_that_sum_to_one(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


def _by_label(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none") / torch.bincount(y, minlength=C)[y]


@attack(19, loss=lambda: _by_label)
def divided_by_how_often_a_label_comes(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


def _valid(out: Tensor, y: Tensor) -> Tensor:
    counts = (y != 0).float()
    each = F.cross_entropy(out.reshape(-1, H), y.reshape(-1), reduction="none").view_as(y) * counts
    return each.sum(1) / counts.sum() * len(y)


@attack(19, data=lambda b: (torch.randint(0, V, (b, 5)), torch.randint(0, 4, (b, 5))), loss=lambda: _valid)
def divided_by_the_valid_tokens_of_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.b(net.embed(x))


def _own_valid(out: Tensor, y: Tensor) -> Tensor:
    counts = (y != 0).float()
    each = F.cross_entropy(out.reshape(-1, H), y.reshape(-1), reduction="none").view_as(y) * counts
    return each.sum(1) / counts.sum(1).clamp_min(1)


@attack(
    19, data=lambda b: (torch.randint(0, V, (b, 5)), torch.randint(0, 4, (b, 5))), loss=lambda: _own_valid,
    two_pass="right",
)  # fmt: skip
def divided_by_its_own_valid_tokens(net: Any, x: Tensor) -> Tensor:
    return net.b(net.embed(x))


def _lengths(b: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    return torch.randn(b, 9, D), (
        torch.randint(1, C, (b, 4)), torch.randint(8, 10, (b,)), torch.randint(1, 5, (b,)),
    )  # fmt: skip


def _ctc(out: Tensor, y: Any) -> Tensor:
    labels, frames, lengths = y
    return F.ctc_loss(out.log_softmax(2).transpose(0, 1), labels, frames, lengths, reduction="none", zero_infinity=True)


@attack(19, data=_lengths, loss=lambda: _ctc, two_pass="right")
def ctc_with_lengths(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).tanh())


@attack(19, data=_lengths, loss=lambda: lambda out, y: _ctc(out, y) / y[2], two_pass="right")
def ctc_by_the_length_of_its_label(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).tanh())


def _ranked(out: Tensor, y: Tensor) -> Tensor:
    score = out[:, 0]
    return F.softplus(-(score[:, None] - score[None]) * (y[:, None] > y[None])).mean(1)


@attack(19, loss=lambda: _ranked)
def ranked_against_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(19, loss=lambda: lambda out, y: F.cross_entropy(out, y, reduction="none") / out.detach().std())
def divided_by_the_deviation_of_outputs(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(19, data=regression, loss=lambda: lambda out, y: ((out - y) / y.std(0)).square().mean(1))
def targets_in_units_of_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


def _group(out: Tensor, y: Tensor) -> Tensor:
    """Advantages in units of the group (GRPO)."""
    reward = (out.argmax(1) == y).float() + 0.1 * y
    return -out.log_softmax(1).amax(1) * ((reward - reward.mean()) / (reward.std() + 1e-3))


@attack(19, loss=lambda: _group)
def advantages_of_a_group(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(19, loss=lambda: lambda out, y: F.cross_entropy(out - out.mean(0).detach().log_softmax(0), y, reduction="none"))
def logits_adjusted_by_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(19, data=sequences, loss=lambda: lambda out, y: F.cross_entropy(out.mT, y[:, None].expand(-1, 5),
        reduction="none").amax(1), two_pass="right")  # fmt: skip
def worst_token(net: Any, x: Tensor) -> Tensor:
    return net.t(x)


@attack(19, data=tokens, loss=lambda: lambda out, y: F.cross_entropy(out, y, reduction="none").sort().values)
def losses_in_rising_order(net: Any, x: Tensor) -> Tensor:
    return net.t(net.embed(x).mean(1))
