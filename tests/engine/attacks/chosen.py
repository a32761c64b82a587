"""Indices computed from the batch, and random numbers drawn for each sample or for all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import C, D, H, attack, tokens
from attacks.layers import images, sequences

# 20. Indices made of the batch


@attack(20, data=lambda b: ((torch.randn(b, D), torch.arange(b) // 3), torch.randint(0, C, (b,))))
def pooled_by_group(net: Any, x: Tensor, group: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + torch.zeros(8, H).index_reduce(0, group, z, "mean", include_self=False)[group])


@attack(20)
def ranked_by_argsort(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * z[:, 0].argsort().argsort()[:, None].float())


@attack(20)
def unique_values_counted(net: Any, x: Tensor) -> Tensor:
    _, inverse, counts = x[:, 0].round().unique(return_inverse=True, return_counts=True)
    return net.t(net.a(x) / counts[inverse, None])


@attack(20, data=tokens)
def counted_words(net: Any, x: Tensor) -> Tensor:
    weight = 1 / torch.bincount(x.flatten(), minlength=11).clamp_min(1)
    return net.t((net.embed(x) * weight[x][..., None]).sum(1))


@attack(20, data=tokens, two_pass="right")
def counted_words_of_each_sample(net: Any, x: Tensor) -> Tensor:
    counts = F.one_hot(x, 11).sum(1)
    return net.t((net.embed(x) / counts.gather(1, x)[..., None]).sum(1))


@attack(20)
def quantiles_of_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * (z > z.detach().quantile(0.5, dim=0)))


@attack(20, two_pass="right")
def quantile_of_each_sample(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * (z > z.detach().median(1, keepdim=True).values))


@attack(20)
def histogram_of_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * torch.histc(x.detach(), 8, -2, 2) / len(x))


@attack(20)
def best_of_the_batch_swapped_in(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    best = z.detach()[:, 0].argmax()
    return net.t(torch.where(torch.arange(len(x))[:, None] == 0, z[best], z))


@attack(20, data=sequences, two_pass="right")
def tokens_in_order_of_their_score(net: Any, x: Tensor) -> Tensor:
    z = net.b(x)
    order = z[..., 0].argsort(1, descending=True)[:, :3]
    return net.t(z.gather(1, order[..., None].expand(-1, -1, H)).mean(1))


@attack(20, data=sequences, two_pass="right")
def tokens_taken_along_a_dimension(net: Any, x: Tensor) -> Tensor:
    z = net.b(x)
    return net.t(torch.take_along_dim(z, z.argsort(1), 1).cumsum(1).mean(1))


@attack(20, data=sequences)
def tokens_kept_over_the_batch(net: Any, x: Tensor) -> Tensor:
    """The same tokens of all samples, those of largest score together."""
    z = net.b(x)
    return net.t(z.index_select(1, z.detach().sum((0, 2)).topk(3).indices).mean(1))


@attack(20, data=sequences, two_pass="right")
def tokens_merged_within_a_sample(net: Any, x: Tensor) -> Tensor:
    z = net.b(x)
    to = (z[:, 3:] @ z[:, :3].mT).argmax(2)
    return net.t(z[:, :3].scatter_reduce(1, to[..., None].expand(-1, -1, H), z[:, 3:], "mean").mean(1))


@attack(20, data=sequences, two_pass="either")
def padded_away(net: Any, x: Tensor) -> Tensor:
    """Tokens that count, one after another, without padding."""
    counts = x[..., 0] > -1
    flat = net.b(x[counts])
    whole = torch.zeros(len(x), 5, H).masked_scatter(counts[..., None].expand(-1, -1, H), flat)
    return net.t(whole.sum(1))


@attack(20, data=sequences, two_pass="either")
def nested_tensors(net: Any, x: Tensor) -> Tensor:
    n = torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged)
    return net.t(net.b(n).to_padded_tensor(0.0).mean(1))


@attack(20, two_pass="right")
def edges_of_a_table(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    at = torch.searchsorted(net.t.bias.detach().sort().values, z.detach())
    return net.t(z * at)


# 21. Numbers drawn for each sample or for all


@attack(21, data=images, two_pass="approximate", parts=lambda: {"conv": nn.Conv2d(2, H, 3), "drop": nn.Dropout2d(0.4)})
def feature_dropout(net: Any, x: Tensor) -> Tensor:
    return net.t(net.drop(net.conv(x)).mean((2, 3)))


@attack(21, two_pass="approximate", parts=lambda: {"drop": nn.AlphaDropout(0.4)})
def alpha_dropout(net: Any, x: Tensor) -> Tensor:
    return net.t(net.drop(net.a(x)))


@attack(21, data=sequences, two_pass="approximate", parts=lambda: {"drop": nn.FeatureAlphaDropout(0.4)})
def feature_alpha_dropout(net: Any, x: Tensor) -> Tensor:
    return net.t(net.drop(net.b(x)).mean(1))


@attack(21, data=sequences, two_pass="approximate", parts=lambda: {"drop": nn.Dropout1d(0.4)})
def word_dropout(net: Any, x: Tensor) -> Tensor:
    return net.t(net.drop(net.b(x)).mean(1))


@attack(21, two_pass="either")
def stochastic_depth_of_each_sample(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + net.b(z).tanh() * x.new_empty(len(x), 1).bernoulli_(0.6) / 0.6) if net.training else net.t(z)


@attack(21, two_pass="either")
def stochastic_depth_of_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + net.b(z).tanh() * x.new_empty(()).bernoulli_(0.6) / 0.6) if net.training else net.t(z)


@attack(21, two_pass="either")
def one_mask_for_all(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(F.dropout(torch.ones(H), 0.5, net.training) * z)


@attack(21, two_pass="either")
def mixed_by_a_permutation(net: Any, x: Tensor) -> Tensor:
    lam = torch.rand(()) if net.training else 0.5
    return net.t(net.a(lam * x + (1 - lam) * x[torch.randperm(len(x))]))


@attack(21, two_pass="either")
def styles_swapped(net: Any, x: Tensor) -> Tensor:
    """MixStyle: the statistics of another sample."""
    z = net.a(x)
    mean, std = z.mean(1, keepdim=True).detach(), z.std(1, keepdim=True).detach()
    other = torch.randperm(len(x))
    return net.t((z - mean) / std * std[other] + mean[other])


@attack(21, data=images, two_pass="either", parts=lambda: {"conv": nn.Conv2d(2, H, 3)})
def flipped_at_random(net: Any, x: Tensor) -> Tensor:
    turned = torch.rand(len(x), 1, 1, 1) < 0.5
    return net.t(net.conv(torch.where(turned, x.flip(3), x)).amax((2, 3)))


@attack(21, data=images, two_pass="either", parts=lambda: {"conv": nn.Conv2d(2, H, 3)})
def cropped_at_random(net: Any, x: Tensor) -> Tensor:
    at = torch.randint(0, 3, (len(x),))
    rows = (at[:, None] + torch.arange(4))[:, None, :, None].expand(-1, 2, -1, 6)
    return net.t(net.conv(x.gather(2, rows)).amax((2, 3)))


@attack(21, data=images, two_pass="either", parts=lambda: {"conv": nn.Conv2d(2, H, 3)})
def blocks_dropped(net: Any, x: Tensor) -> Tensor:
    """DropBlock, scaled by what is left of the whole batch."""
    z = net.conv(x)
    mask = 1 - F.max_pool2d((torch.rand(len(x), 1, 4, 4) < 0.2).float(), 3, 1, 1)
    return net.t((z * mask * mask.numel() / mask.sum()).mean((2, 3)))


@attack(21, two_pass="either")
def rounded_at_random(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + ((z * 8 + torch.rand_like(z)).floor() / 8 - z).detach())


@attack(21, two_pass="either")
def categories_drawn(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    picked = torch.distributions.Categorical(logits=z).sample()
    return net.t(z * F.one_hot(picked, H) + z.gather(1, picked[:, None]))


@attack(21, two_pass="either")
def normals_reparametrised(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(torch.distributions.Normal(z, z.exp().clamp(0.1, 2)).rsample())
