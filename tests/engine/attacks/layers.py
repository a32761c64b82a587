"""Common layers, losses and training code, with separate and with interacting samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attacks.base import C, H, V, attack, tokens


def sequences(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 5, H), torch.randint(0, C, (batch,))


def images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, 6, 6), torch.randint(0, C, (batch,))


def weighted(batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    return (torch.randn(batch, 5, H), torch.randint(1, 6, (batch,))), torch.randint(0, C, (batch,))


# 17. Layers and losses of many kinds


@attack(
    17, data=sequences, two_pass="right", parts=lambda: {"rnn": nn.LSTM(H, H, 2, batch_first=True, bidirectional=True)}
)
def lstm_of_two_layers(net: Any, x: Tensor) -> Tensor:
    out, (h, c) = net.rnn(x)
    return net.t(out[..., :H].mean(1) + h[-1] + c[0].tanh())


@attack(17, data=lambda b: (torch.randn(5, b, H), torch.randint(0, C, (b,))), batch_dim=1, two_pass="right",
        parts=lambda: {"rnn": nn.GRU(H, H)})  # fmt: skip
def gru_time_major(net: Any, x: Tensor) -> Tensor:
    return net.t(net.rnn(x)[1][0])


@attack(17, data=sequences, parts=lambda: {"rnn": nn.RNN(H, H)})
def rnn_with_batch_and_time_mistaken(net: Any, x: Tensor) -> Tensor:
    return net.t(net.rnn(x)[0][:, -1])


@attack(17, data=weighted, two_pass="either", parts=lambda: {"rnn": nn.GRU(H, H, batch_first=True)})
def packed_inside(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    return net.t(pad_packed_sequence(net.rnn(packed)[0], batch_first=True)[0].sum(1))


@attack(17, data=weighted, two_pass="right", parts=lambda: {"mha": nn.MultiheadAttention(H, 2, batch_first=True)})
def attention_with_padding(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    padded = torch.arange(5) >= lengths[:, None]
    out, weights = net.mha(x, x, x, key_padding_mask=padded, average_attn_weights=False)
    return net.t(out[:, 0] * weights.mean((1, 2, 3))[:, None])


@attack(17, data=sequences, two_pass="right", parts=lambda: {"mha": nn.MultiheadAttention(H, 2, batch_first=True)})
def attention_causal(net: Any, x: Tensor) -> Tensor:
    mask = torch.full((5, 5), float("-inf")).triu(1)
    return net.t(net.mha(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))


@attack(17, data=sequences)
def attention_over_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.b(x).transpose(0, 1)
    return net.t(F.scaled_dot_product_attention(z, z, z).transpose(0, 1).mean(1))


@attack(17, data=sequences, two_pass="right")
def attention_with_the_batch_as_heads(net: Any, x: Tensor) -> Tensor:
    z = net.b(x)[None]
    return net.t(F.scaled_dot_product_attention(z, z, z, is_causal=True)[0].mean(1))


@attack(17, data=sequences, two_pass="right")
def grouped_queries(net: Any, x: Tensor) -> Tensor:
    q = net.b(x).view(len(x), 5, 4, 2).transpose(1, 2)
    kv = x.view(len(x), 5, 4, 2).transpose(1, 2)[:, :2]
    return net.t(
        F.scaled_dot_product_attention(q, kv, kv, scale=0.3, enable_gqa=True).transpose(1, 2).flatten(2).mean(1)
    )


@attack(17, data=tokens, two_pass="right")
def alibi_and_rotary(net: Any, x: Tensor) -> Tensor:
    z, t = net.embed(x), torch.arange(5)
    angle = t[:, None] / 10 ** torch.arange(4)
    left, right = z.chunk(2, -1)
    q = torch.cat([left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()], -1)
    bias = -(t[:, None] - t).abs() * 0.5
    return net.t(((q @ q.mT + bias).softmax(-1) @ z).mean(1))


@attack(17, data=tokens, two_pass="right")
def key_value_cache(net: Any, x: Tensor) -> Tensor:
    z, keys = net.embed(x), []
    out = torch.zeros(len(x), H)
    for step in range(5):
        keys.append(net.b(z[:, step]))
        k = torch.stack(keys, 1)
        out = out + ((k @ z[:, step, :, None]).softmax(1) * k).sum(1)
    return net.t(out)


@attack(17, data=tokens, two_pass="right", parts=lambda: {"bag": nn.EmbeddingBag(V, H, mode="mean")})
def bag_of_words(net: Any, x: Tensor) -> Tensor:
    return net.t(net.bag(x))


@attack(17, data=tokens, two_pass="right", parts=lambda: {"bag": nn.EmbeddingBag(V, H, mode="max", padding_idx=0)})
def bag_with_maximum(net: Any, x: Tensor) -> Tensor:
    return net.t(net.bag(x))


@attack(17, data=images, two_pass="right", parts=lambda: {"conv": nn.Conv2d(2, H, 3, padding=1)})
def sampled_by_a_grid(net: Any, x: Tensor) -> Tensor:
    z = net.conv(x)
    grid = F.affine_grid(
        torch.eye(2, 3).expand(len(x), 2, 3) + z.mean((2, 3))[:, :6].view(-1, 2, 3) * 0.1, list(z.shape), False
    )
    return net.t(F.grid_sample(z, grid, align_corners=False).amax((2, 3)))


@attack(17, data=images, two_pass="right")
def unfolded_and_folded(net: Any, x: Tensor) -> Tensor:
    z = F.unfold(x, 2, stride=2)
    z = net.b(z.transpose(1, 2)).transpose(1, 2)
    return net.t(F.fold(z, (6, 6), 2, stride=2).flatten(1)[:, :H])


@attack(
    17, data=images, two_pass="right", parts=lambda: {"conv": nn.Conv2d(2, H, 3, padding=1, padding_mode="reflect")}
)
def pooled_and_upsampled(net: Any, x: Tensor) -> Tensor:
    z = net.conv(x)
    y, at = F.max_pool2d(z, 2, return_indices=True)
    z = F.max_unpool2d(y, at, 2) + F.interpolate(F.avg_pool2d(z, 2), scale_factor=2, mode="bilinear")
    return net.t(F.adaptive_avg_pool2d(F.pixel_unshuffle(F.pixel_shuffle(z, 2), 2), 1).flatten(1))


@attack(17, data=images, two_pass="right",
        parts=lambda: {"conv": nn.ConvTranspose2d(2, H, 2, 2), "norm": nn.InstanceNorm2d(H, affine=True)})  # fmt: skip
def instance_normed(net: Any, x: Tensor) -> Tensor:
    return net.t(net.norm(net.conv(x)).square().mean((2, 3)))


@attack(17, data=images, two_pass="either", parts=lambda: {"norm": nn.InstanceNorm2d(2, track_running_stats=True)})
def instance_norm_with_running_statistics(net: Any, x: Tensor) -> Tensor:
    return net.t(net.norm(x).square().mean(2).flatten(1)[:, :H])


@attack(17, data=images, parts=lambda: {"conv": nn.Conv2d(2, H, 3)})
def group_norm_over_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.conv(x).transpose(0, 1).flatten(2)
    return net.t(F.group_norm(z, 2).mean(2).t().contiguous()) if len(x) % 2 == 0 else net.t(net.conv(x).mean((2, 3)))


@attack(17, data=images, two_pass="right", parts=lambda: {"conv": nn.Conv2d(2, H, 3)})
def weight_standardised(net: Any, x: Tensor) -> Tensor:
    w = net.conv.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
    return net.t(F.local_response_norm(F.conv2d(x, w), 2).mean((2, 3)))


@attack(17, two_pass="right", parts=lambda: {"norm": nn.RMSNorm(H)})
def rms_norm(net: Any, x: Tensor) -> Tensor:
    return net.t(net.norm(net.a(x)))


@attack(17, data=sequences, two_pass="right")
def spectra(net: Any, x: Tensor) -> Tensor:
    z = torch.fft.fft2(net.b(x)).real + torch.fft.irfft(torch.fft.rfft(x, dim=1) * net.gate.exp(), n=5, dim=1)
    return net.t(z.mean(1))


@attack(17, data=sequences)
def spectrum_over_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(torch.fft.rfft(net.b(x), dim=0).abs().mean((0, 1)) + net.b(x).mean(1))


@attack(17, data=lambda b: (torch.randn(b, H, H), torch.randint(0, C, (b,))), two_pass="right")
def systems_solved(net: Any, x: Tensor) -> Tensor:
    m = net.b(x) @ x.mT + 3 * torch.eye(H)
    return net.t(torch.linalg.solve(m, x).mean(1) + torch.linalg.inv(m).mean(2))


@attack(17, data=lambda b: (torch.randn(b, H, H), torch.randint(0, C, (b,))), two_pass="right")
def decomposed_matrices(net: Any, x: Tensor) -> Tensor:
    m = net.b(x)
    return net.t(
        torch.linalg.svdvals(m)
        + torch.linalg.qr(m + torch.eye(H)).R.mean(1)
        + torch.logdet(m @ m.mT + torch.eye(H))[:, None]
    )


@attack(17, data=lambda b: (torch.randn(b, H, H), torch.randint(0, C, (b,))), two_pass="right")
def einsums(net: Any, x: Tensor) -> Tensor:
    z = net.b(x)
    return net.t(
        torch.einsum("bij,bjk,kl->bi", z, x, net.b.weight) + torch.einsum("bii->bi", z) + torch.einsum("bij->bj", z)
    )


@attack(17, data=lambda b: (torch.randn(b, H, H), torch.randint(0, C, (b,))))
def pairs_by_einsum(net: Any, x: Tensor) -> Tensor:
    return net.t(torch.einsum("bij,cij->bi", net.b(x), x))


@attack(17, two_pass="right")
def sorted_and_accumulated(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    y = z.sort(1).values.cumsum(1) + z.flip(1).cumprod(1) + z.roll(2, -1).logcumsumexp(1) + z.cummax(1).values
    return net.t(y + z.topk(H, 1).values.diff(dim=1, prepend=z[:, :1]))


@attack(17)
def accumulated_over_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + 0.1 * z.cumsum(0) + z.cummax(0).values)


@attack(17)
def differences_over_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(torch.diff(z, dim=0, prepend=z[-1:]))
