"""Parts of training programs: quantisation, normalisation, custom operators, memory banks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from attacks.base import C, D, H, attack, regression
from attacks.layers import images, sequences, weighted
from attacks.running import _buffers

# 26. What training programs are made of; more in combined.py


@attack(26, parts=_buffers(top=()))
def quantised_by_what_was_seen(net: Any, x: Tensor) -> Tensor:
    """Quantisation-aware training: an observer moves with the batch, and scales it."""
    z = net.a(x)
    with torch.no_grad():
        net.kept.top.lerp_(z.abs().amax(), 0.1)
    return net.t(
        torch.fake_quantize_per_tensor_affine(z, net.kept.top / 127, torch.zeros((), dtype=torch.int32), -9, 9)
    )


@attack(26, parts=lambda: {"norm": nn.BatchNorm1d(H)}, two_pass="approximate")
def batch_norm_twice_a_step(net: Any, x: Tensor) -> Tensor:
    return net.t(net.norm(net.a(x)) + net.norm(net.a(x + 0.3)).tanh())


@attack(26, parts=lambda: {"norm": nn.BatchNorm1d(H, momentum=None)}, two_pass="approximate")
def batch_norm_by_an_average_of_all_batches(net: Any, x: Tensor) -> Tensor:
    return net.t(net.norm(net.a(x)))


@attack(26, parts=lambda: {"norm": nn.BatchNorm1d(H)}, two_pass="approximate", data=weighted)
def batch_norm_over_valid_tokens(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    z = net.b(x)
    valid = torch.arange(5) < lengths[:, None]
    out = torch.zeros_like(z)
    out[valid] = net.norm(z[valid])
    return net.t(out.sum(1))


@attack(26, parts=lambda: {"norm": nn.BatchNorm1d(H), "other": nn.BatchNorm1d(H)}, two_pass="either")
def batch_norms_of_two_halves(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    n = len(x) // 2
    return net.t(torch.cat([net.norm(z[:n]), net.other(z[n:])]))


@attack(26, data=images, parts=lambda: {"conv": nn.Conv2d(2, H, 3)})
def deviation_of_the_batch_as_a_feature(net: Any, x: Tensor) -> Tensor:
    z = net.conv(x)
    return net.t(z.mean((2, 3)) + z.std(0).mean())


@attack(26, data=weighted, two_pass="right")
def cropped_to_the_longest(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    n = int(lengths.max())
    return net.t((net.b(x[:, :n]) * (torch.arange(n) < lengths[:, None])[..., None]).sum(1))


@attack(26, data=weighted, two_pass="right")
def tokens_without_padding(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """As attention over sequences of various lengths takes them."""
    flat = net.b(x[torch.arange(5) < lengths[:, None]])
    sample = torch.arange(len(x)).repeat_interleave(lengths)
    return net.t(torch.zeros(len(x), H).index_add(0, sample, flat))


@attack(26, two_pass="right")
def halted_by_its_own_score(net: Any, x: Tensor) -> Tensor:
    z, done, out = net.a(x), torch.zeros(len(x)), torch.zeros(len(x), H)
    for _ in range(3):
        score = z[:, 0].sigmoid() * (done < 0.9)
        done, out = done + score, out + score[:, None] * z
        z = net.b(z).tanh()
    return net.t(out)


@attack(26)
def transported(net: Any, x: Tensor) -> Tensor:
    """Sinkhorn's iteration over the batch, as in SwAV."""
    z = net.a(x)
    plan = z.exp()
    for _ in range(2):
        plan = plan / plan.sum(0, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return net.t(z * plan)


@attack(26)
def whitened(net: Any, x: Tensor) -> Tensor:
    z = net.a(x) - net.a(x).mean(0)
    root = torch.linalg.cholesky(z.T @ z / len(x) + 0.1 * torch.eye(H))
    return net.t(torch.linalg.solve_triangular(root, z.T, upper=False).T)


@attack(26, two_pass="right")
def weights_dropped(net: Any, x: Tensor) -> Tensor:
    """DropConnect: one mask for all samples."""
    return net.t(F.linear(net.a(x), F.dropout(net.b.weight, 0.3, net.training)))


@attack(26, parts=lambda: {"heat": 2.0}, two_pass="right")  # type: ignore[dict-item]
def temperature_that_falls(net: Any, x: Tensor) -> Tensor:
    net.heat *= 0.9
    return net.t(net.a(x)) / net.heat


def _chained(net: nn.Module) -> nn.Module:
    net.chain = nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, H), nn.Dropout(0.2), nn.Linear(H, H))
    return net


@attack(26, wrap=_chained, two_pass="approximate")
def checkpointed_in_segments(net: Any, x: Tensor) -> Tensor:
    return net.t(checkpoint_sequential(net.chain, 2, net.a(x), use_reentrant=False))


def _operator(name: str, run: Any, change: Any) -> Any:
    operator = torch.library.custom_op(f"attacks::{name}", mutates_args=())(run)
    operator.register_fake(torch.empty_like)
    operator.register_autograd(lambda _, g: change(g))
    return operator


def _double(x: Tensor) -> Tensor:
    return x * 2


def _centre(x: Tensor) -> Tensor:
    return x - x.mean(0)


def _as_it_is(x: Tensor) -> Tensor:
    return x.clone()


doubled = _operator("doubled", _double, _double)
centred = _operator("centred", _centre, _centre)
counted = _operator("counted", _as_it_is, lambda g: g * len(g))


@attack(26, two_pass="right")
def operator_of_its_own(net: Any, x: Tensor) -> Tensor:
    return net.t(doubled(net.a(x)).tanh())


@attack(26)
def operator_of_its_own_that_centres(net: Any, x: Tensor) -> Tensor:
    return net.t(centred(net.a(x)).tanh())


@attack(26)
def operator_of_its_own_that_counts(net: Any, x: Tensor) -> Tensor:
    return net.t(counted(net.a(x)).tanh())


# named like operators of torch, which do something else
for _name in ("relu", "softmax", "mm", "convolution", "embedding", "linear_attention"):
    _operator(_name, _as_it_is, _double)
_operator("hardswish", _centre, _centre)
backward_by_hardswish = _operator("as_it_is", _as_it_is, lambda g: torch.ops.attacks.hardswish(g))


@attack(26, two_pass="right", shared="right")
def operators_of_its_own_named_as_those_of_torch(net: Any, x: Tensor) -> Tensor:
    own, z = torch.ops.attacks, net.a(x)
    z = own.mm(own.relu(z)) + own.softmax(z) + own.convolution(z)
    return net.t((z + own.embedding(z) + own.linear_attention(z)).tanh())


@attack(26)
def backward_by_an_operator_named_as_one_of_torch(net: Any, x: Tensor) -> Tensor:
    return net.t(backward_by_hardswish(net.a(x)).tanh())


@attack(26)
def gradient_of_the_step_before(net: Any, x: Tensor) -> Tensor:
    before = getattr(net, "before", None)
    size = 0.0 if before is None or before.grad is None else before.grad.norm()
    z = net.a(x)
    if z.requires_grad:
        z.retain_grad()
    net.before = z
    return net.t(z.tanh()) * (1 + size)


@attack(26, two_pass="either")
def hook_on_a_node_of_the_graph(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    if z.grad_fn is not None:
        z.grad_fn.register_prehook(lambda gradients: tuple(g * len(g) for g in gradients))
    return net.t(z.tanh())


@attack(26)
def hook_on_two_gradients(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    other = net.b(z)
    if z.requires_grad:
        torch.autograd.graph.register_multi_grad_hook((z, other), lambda _: net.seen.add_(1))
    return net.t(z + other.tanh() + net.seen * 0.1)


def _noise(out: Any, y: Tensor) -> Tensor:
    return (out[0] - out[1]).square().mean(1)


@attack(26, data=regression, loss=lambda: _noise)
def noise_to_be_predicted(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A diffusion model draws times and noise in its forward."""
    time, noise = torch.rand(len(x), 1), torch.randn_like(x)
    return net.t(net.a(time.sqrt() * noise + (1 - time).sqrt() * x)), noise[:, :C]


def _by_number(batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    return (torch.randn(batch, D), torch.randperm(30)[:batch]), torch.randint(0, C, (batch,))


@attack(26, data=_by_number, parts=_buffers(past=(30, C)), two_pass="right")
def predictions_of_earlier_epochs(net: Any, x: Tensor, number: Tensor) -> Tensor:
    """Temporal ensembling: each sample's own past."""
    out = net.t(net.a(x))
    target = net.kept.past[number].clone()
    with torch.no_grad():
        net.kept.past[number] = 0.6 * target + 0.4 * out.detach()
    return out + 0.3 * (out - target).square()


@attack(26, data=lambda b: ((torch.randn(b, D), torch.arange(b) % 4), torch.randint(0, C, (b,))))
def prototypes_of_the_batch(net: Any, x: Tensor, of: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z - (torch.zeros(4, H).index_add(0, of, z) / 3)[of])


@attack(26, two_pass="right", loss=lambda: lambda out, y: F.cross_entropy(out[0] / out[1].exp(), y, reduction="none"))
def temperature_among_the_outputs(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return net.t(net.a(x)), net.gate


@attack(26, two_pass="right")
def sample_by_sample(net: Any, x: Tensor) -> Tensor:
    return torch.stack([net.t(net.a(row)) for row in x])


@attack(26)
def padded_and_shifted(net: Any, x: Tensor) -> Tensor:
    return net.t(F.pad(net.a(x), (0, 0, 1, 0))[:-1])


@attack(26)
def blurred_over_all_samples(net: Any, x: Tensor) -> Tensor:
    return net.t(F.avg_pool1d(net.a(x).reshape(1, 1, -1), 3, 1, 1).view(len(x), -1))


@attack(26, data=sequences, two_pass="right", parts=lambda: {"whole": nn.Transformer(H, 2, 1, 1, 16, 0.0,
        batch_first=True)})  # fmt: skip
def encoder_and_decoder(net: Any, x: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    return net.t(net.whole(x, x[:, 1:], tgt_mask=mask, tgt_is_causal=True).mean(1))


@attack(26, two_pass="right")
def written_where_positive(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).clone()
    z[z > 0.5] = 0.1
    z[x[:, 0] > 0] *= 2
    return net.t(z)


@attack(26)
def seeded_in_the_forward(net: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        mask = torch.rand(len(x), 1) > 0.3
    return net.t(net.a(x) * mask)


# Several copies of the batch in one tensor


def triplets(batch: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    return (torch.randn(batch, D), torch.randn(batch, D), torch.randn(batch, D)), torch.randint(0, C, (batch,))


@attack(26, data=triplets, two_pass="right")
def anchor_positive_negative(net: Any, x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    z, p, n = net.a(torch.cat([x, positive, negative])).chunk(3)
    return net.t(z) * ((z - p).square().sum(1) - (z - n).square().sum(1) + 1).relu()[:, None]


def _two(net: Any, x: Tensor) -> Tensor:
    return net.a(torch.cat([x, 2 * x]))


@attack(26, two_pass="right")
def interleaved_views(net: Any, x: Tensor) -> Tensor:
    z = net.a(torch.stack([x, 2 * x], 1).flatten(0, 1))
    return net.t(z[0::2] + z[1::2].tanh())


@attack(26)
def views_shifted_by_one(net: Any, x: Tensor) -> Tensor:
    return net.t(_two(net, x)[1 : len(x) + 1])


@attack(26, two_pass="right")
def views_swapped(net: Any, x: Tensor) -> Tensor:
    left, right = _two(net, x).chunk(2)
    return net.t(torch.cat([right, left]).view(2, -1, H).mean(0))


@attack(26)
def views_taken_for_pairs(net: Any, x: Tensor) -> Tensor:
    return net.t(_two(net, x).view(-1, 2, H).mean(1))


@attack(26)
def views_flipped(net: Any, x: Tensor) -> Tensor:
    return net.t(_two(net, x).flip(0)[: len(x)])


@attack(26)
def views_centred_together(net: Any, x: Tensor) -> Tensor:
    z = _two(net, x)
    left, right = (z - z.mean(0)).chunk(2)
    return net.t(left + right.tanh())


@attack(26, parts=lambda: {"norm": nn.BatchNorm1d(H)}, two_pass="approximate")
def views_through_batch_norm(net: Any, x: Tensor) -> Tensor:
    left, right = net.norm(_two(net, x)).chunk(2)
    return net.t(left + right.tanh())


@attack(26)
def likeness_of_all_views(net: Any, x: Tensor) -> Tensor:
    z = F.normalize(_two(net, x))
    return net.t(z[: len(x)]) + (z @ z.T)[: len(x)].logsumexp(1, keepdim=True)


@attack(26, data=images, parts=lambda: {"conv": nn.Conv2d(2, H, 3), "norm": nn.GroupNorm(2, H)}, two_pass="right")
def images_and_their_mirrors(net: Any, x: Tensor) -> Tensor:
    z = net.norm(net.conv(torch.cat([x, x.flip(3)]))).relu().mean((2, 3))
    return net.t(z[: len(x)] - z[len(x) :])


@attack(26, two_pass="right")
def views_written_into(net: Any, x: Tensor) -> Tensor:
    n, z = len(x), _two(net, x).clone()
    z[:n] = z[:n] * 2
    z[n:].mul_(0.5)
    return net.t(z[:n] + z[n:])


@attack(26, two_pass="right")
def views_of_views(net: Any, x: Tensor) -> Tensor:
    n, z = len(x), net.a(torch.cat([x, 2 * x, 3 * x]))
    return net.t(z[n:][:n] + z[: 2 * n][n:] + z[-n:])


@attack(26, two_pass="approximate")
def three_dropouts_of_one_sample(net: Any, x: Tensor) -> Tensor:
    z = F.dropout(net.a(torch.cat([x, x, x])), 0.3, net.training).chunk(3)
    return net.t(torch.stack(z).mean(0) + torch.stack(z, 1).std(1))


@attack(26, two_pass="right")
def row_for_all_in_front(net: Any, x: Tensor) -> Tensor:
    z = torch.cat([net.t.weight[:1], net.a(x)])
    return net.t(z[1:] - z[:1])


@attack(26)
def bank_in_front(net: Any, x: Tensor) -> Tensor:
    z = torch.cat([net.embed.weight, net.a(x)])
    return net.t((z[11:] @ z.T).softmax(1) @ z)
