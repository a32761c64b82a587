"""Training code: ways to run forward and backward, many kinds of attention, inputs that require a gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from attacks.base import C, D, H, attack, backward_of, tokens
from attacks.layers import sequences, weighted

# 22. How forward and backward are run


@attack(22, two_pass="either")
def checkpointed_with_reentry(net: Any, x: Tensor) -> Tensor:
    return net.t(checkpoint(lambda v: net.b(v).tanh(), net.a(x), use_reentrant=True))


class _Reversible(torch.autograd.Function):
    """Computes ``x + tanh(layer(x))`` again in backward, by a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, _: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x.detach())
        with torch.no_grad():
            return x + layer(x).tanh()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        x = ctx.saved_tensors[0].requires_grad_()
        with torch.enable_grad():
            out = x + ctx.layer(x).tanh()
        torch.autograd.backward(out, gradients[0])
        return x.grad, None, None


@attack(22, two_pass="right")
def backward_inside_of_a_backward(net: Any, x: Tensor) -> Tensor:
    return net.t(_Reversible.apply(net.a(x), net.b, net.b.weight))


@attack(22)
def mean_in_a_checkpoint(net: Any, x: Tensor) -> Tensor:
    return net.t(checkpoint(lambda v: v - v.mean(0), net.a(x), use_reentrant=False))


@attack(22, two_pass="approximate")
def two_checkpoints_with_dropout(net: Any, x: Tensor) -> Tensor:
    z = checkpoint(lambda v: F.dropout(net.a(v), 0.4, net.training), x, use_reentrant=False)
    return net.t(checkpoint(lambda v: F.dropout(net.b(v).tanh(), 0.4, net.training), z, use_reentrant=False))


@attack(22, two_pass="right")
def saved_tensors_packed(net: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
        return net.t(net.b(net.a(x)).tanh())


@attack(22, two_pass="either")
def saved_tensors_changed_by_the_batch(net: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t, t.abs().amax()), lambda p: p[0] / (1 + p[1])):
        z = net.a(x).tanh()
    return net.t(z)


@attack(22, two_pass="right")
def saved_on_another_device(net: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return net.t(net.b(net.a(x)).tanh())


def _step_of(p: Tensor) -> None:
    p.data.sub_(p.grad, alpha=0.01)  # type: ignore[arg-type]


def _stepping(net: nn.Module) -> None:
    """Step each weight in backward, once its gradient is there."""
    if not hasattr(net, "stepping"):
        net.stepping = True
        for p in (net.t.weight, net.a.weight):
            p.register_post_accumulate_grad_hook(_step_of)


@attack(22, two_pass="either")
def optimizer_in_backward(net: Any, x: Tensor) -> Tensor:
    _stepping(net)
    return net.t(net.a(x).tanh())


def _weight_hooks(net: nn.Module) -> None:
    if not hasattr(net, "hooked"):
        net.hooked = True
        net.b.weight.register_hook(lambda g: g / (1 + g.norm()))


@attack(22, two_pass="right")
def hook_on_a_parameter(net: Any, x: Tensor) -> Tensor:
    """Its gradient is the same in every engine, and the hook sees it once."""
    _weight_hooks(net)
    return net.t(net.b(net.a(x)).tanh())


def _backward_hooks(net: nn.Module) -> nn.Module:
    net.b.register_full_backward_hook(lambda _, given, out: tuple(None if g is None else 2 * g for g in given))
    return net


@attack(22, wrap=_backward_hooks, two_pass="right")
def module_hook_that_doubles(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x)).tanh())


class _Standardised(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-3)


def _standardised(net: nn.Module) -> nn.Module:
    parametrize.register_parametrization(net.b, "weight", _Standardised())
    return net


@attack(22, wrap=_standardised, two_pass="right")
def standardised_weights(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x)).tanh())


@attack(22)
def island_without_graph(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    with torch.no_grad():
        centre = z.mean(0)
    return net.t(z - centre)


@attack(22, two_pass="right")
def island_with_a_graph(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = net.a(x)
        with torch.enable_grad():
            own = net.b(z)
    return net.t(own + z)


@attack(22, two_pass="either")
def island_of_inference(net: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = x.abs().sum(1, keepdim=True)
    return net.t(net.a(x)) / (1 + scale.clone())


@attack(22, two_pass="right")
def views_written_in_place(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).clone()
    left, right = z[:, : H // 2], z[:, H // 2 :]
    left.mul_(right.detach().clone())
    z.view(-1, 2, H // 2)[:, 1].add_(left.detach().clone())
    z.t()[0].mul_(0.5)
    return net.t(z)


@attack(22)
def rows_written_over_rows(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).clone()
    z[1:] = z[:-1].clone()
    return net.t(z)


@attack(22, two_pass="right")
def complex_weights(net: Any, x: Tensor) -> Tensor:
    w = torch.complex(net.b.weight, net.b.weight.T)
    return net.t((net.a(x).to(torch.complex64) @ w).abs())


@attack(22)
def complex_mean(net: Any, x: Tensor) -> Tensor:
    z = torch.complex(net.a(x), net.a(x).tanh())
    return net.t((z * z.mean(0).conj()).imag)


def _penalised(out: Any, y: Tensor) -> Tensor:
    logits, slope = out
    return F.cross_entropy(logits, y, reduction="none") + slope


@attack(22, loss=lambda: _penalised, two_pass="either")
def gradient_penalty(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        v = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net.t(net.a(v).tanh()).sum(), v, create_graph=True)
    return net.t(net.a(x).tanh()), g.square().sum(1)


@attack(22, two_pass="either")
def scanned(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    for _ in torch.arange(3):
        z = torch.utils.checkpoint.checkpoint(net.b, z, use_reentrant=False).tanh()
    return net.t(z)


@attack(22, two_pass="either")
def branch_of_the_batch_by_cond(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(torch.cond(z.detach().mean() > 0, lambda v: v.tanh(), lambda v: v.sin(), (z,)))


@attack(22, two_pass="either")
def associative_scan_over_the_batch(net: Any, x: Tensor) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    return net.t(associative_scan(lambda a, b: a * 0.5 + b, net.a(x), 0, combine_mode="generic"))


# Gradients clipped row by row at the output

_clipped_rows = backward_of(lambda g: g * (0.05 / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1))


@attack(22, two_pass="right")
def rows_clipped_by_a_function(net: Any, x: Tensor) -> Tensor:
    return _clipped_rows(net.t(net.a(x).tanh()))


@attack(22, two_pass="right")
def rows_clipped_inside_by_a_function(net: Any, x: Tensor) -> Tensor:
    return net.t(_clipped_rows(net.a(x)).tanh())


@attack(22, two_pass="right")
def rows_clipped_by_a_hook(net: Any, x: Tensor) -> Tensor:
    out = net.t(net.a(x).tanh())
    if out.requires_grad:
        out.register_hook(lambda g: g * (0.05 / g.norm(dim=1, keepdim=True).clamp_min(1e-6)).clamp(max=1))
    return out


def _normalising(net: nn.Module) -> nn.Module:
    net.t.register_full_backward_pre_hook(lambda _, out: (F.normalize(out[0], dim=1),))
    return net


@attack(22, wrap=_normalising, two_pass="right")
def rows_normalised_by_a_module_hook(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).tanh())


@attack(22, two_pass="right")
def forward_mode_in_the_model(net: Any, x: Tensor) -> Tensor:
    return net.t(torch.func.jvp(lambda v: net.a(v).tanh(), (x,), (torch.ones_like(x),))[1])


@attack(22)
def forward_mode_over_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(torch.func.jvp(lambda v: net.a(v - v.mean(0)).tanh(), (x,), (x.cos(),))[1])


# 23. Attention of many kinds


def _heads(z: Tensor) -> Tensor:
    return z.view(len(z), 5, 2, H // 2).transpose(1, 2)


@attack(23, data=weighted, two_pass="right")
def additive_mask_of_each_sample(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.zeros(len(x), 1, 1, 5).masked_fill((torch.arange(5) >= lengths[:, None])[:, None, None], -1e9)
    z = _heads(net.b(x))
    return net.t(F.scaled_dot_product_attention(z, z, z, attn_mask=mask).transpose(1, 2).flatten(2).mean(1))


@attack(23, data=weighted, two_pass="right")
def causal_and_padded(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = causal & ((torch.arange(5) < lengths[:, None])[:, None, None] | torch.eye(5, dtype=torch.bool))
    z = _heads(net.b(x))
    return net.t(F.scaled_dot_product_attention(z, z, z, attn_mask=mask).transpose(1, 2).flatten(2).mean(1))


@attack(23, data=sequences, parts=lambda: {"bias": nn.Embedding(9, 2)}, two_pass="right")
def learned_bias_for_all(net: Any, x: Tensor) -> Tensor:
    """A relative position bias, as in T5 and Swin."""
    places = torch.arange(5)
    bias = net.bias(places[:, None] - places + 4).permute(2, 0, 1)
    z = _heads(net.b(x))
    return net.t(F.scaled_dot_product_attention(z, z, z, attn_mask=bias).transpose(1, 2).flatten(2).mean(1))


@attack(23, data=sequences)
def mask_of_the_batch(net: Any, x: Tensor) -> Tensor:
    z = _heads(net.b(x))
    likeness = z.mean((0, 1)) @ z.mean((0, 1)).T
    return net.t(F.scaled_dot_product_attention(z, z, z, attn_mask=likeness).transpose(1, 2).flatten(2).mean(1))


@attack(23, data=sequences, two_pass="right")
def linear_attention(net: Any, x: Tensor) -> Tensor:
    q, k = net.b(x).softmax(-1), net.b(x).exp()
    return net.t((q @ (k.mT @ x) / (q @ k.sum(1)[..., None])).mean(1))


@attack(23, data=sequences, two_pass="right")
def rotary_from_a_cache(net: Any, x: Tensor) -> Tensor:
    if not hasattr(net, "angles"):
        net.angles = torch.outer(torch.arange(5.0), 10 ** -torch.arange(4.0))
    left, right = net.b(x).chunk(2, -1)
    cos, sin = net.angles.cos(), net.angles.sin()
    return net.t(torch.cat([left * cos - right * sin, left * sin + right * cos], -1).square().mean(1))


@attack(23, data=sequences)
def keys_of_the_last_batch(net: Any, x: Tensor) -> Tensor:
    """A cache that outlives the step."""
    z = net.b(x)
    past = getattr(net, "past", z.detach()[:2].mean((0, 1), keepdim=True))
    net.past = z.detach().mean((0, 1), keepdim=True)
    keys = torch.cat([past.expand(len(x), 1, H), z], 1)
    return net.t(F.scaled_dot_product_attention(z, keys, keys).mean(1))


@attack(23, data=sequences, two_pass="either", parts=lambda: {"enc": nn.TransformerEncoderLayer(H, 2, 16, 0.0,
        batch_first=True)})  # fmt: skip
def encoder_layer_with_padding(net: Any, x: Tensor) -> Tensor:
    return net.t(net.enc(x, src_key_padding_mask=torch.arange(5).expand(len(x), 5) > 3).mean(1))


@attack(23, data=tokens, two_pass="right")
def windows_of_tokens(net: Any, x: Tensor) -> Tensor:
    z = net.embed(x)
    windows = F.pad(z, (0, 0, 1, 1)).unfold(1, 3, 1)
    return net.t((windows.softmax(-1) * windows).sum(-1).mean(1))


# 24. The batch itself requires a gradient


def asking(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, D, requires_grad=True), torch.randint(0, C, (batch,))


def _at_the_input(name: str, change: Any, two_pass: str = "refused") -> None:
    function = backward_of(change)

    def run(net: Any, x: Tensor) -> Tensor:
        return net.t(net.a(function(x)).tanh())

    run.__name__ = name
    attack(24, data=asking, two_pass=two_pass)(run)


_at_the_input("input_gradient_centred", lambda g: g - g.mean(0))
_at_the_input("input_gradient_counted", lambda g: g * len(g))
_at_the_input("input_gradient_shuffled", lambda g: g.flip(0))
_at_the_input("input_gradient_scaled_by_the_batch", lambda g: g / g.abs().mean().clamp_min(1e-9))
# the zeros of dropped rows do not move a maximum
_at_the_input("input_gradient_scaled_by_the_largest", lambda g: g / g.abs().amax().clamp_min(1e-9), "right")
_at_the_input("input_gradient_clipped_by_row", lambda g: g / g.norm(dim=1, keepdim=True).clamp_min(1), "right")


def asking_targets(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, D), torch.randn(batch, C, requires_grad=True)


_counted = backward_of(lambda g: g * len(g))


@attack(24, data=asking_targets, loss=lambda: lambda out, y: (out - _counted(y)).square().mean(1))
def target_gradient_counted(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(24, data=asking_targets, loss=lambda: lambda out, y: (out - y).square().mean(1), two_pass="right")
def target_gradient(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


def asking_all(batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    prompt = torch.randn(3, H, requires_grad=True)
    return (torch.randn(batch, D, requires_grad=True), prompt), torch.randint(0, C, (batch,))


@attack(24, data=asking_all, two_pass="right")
def prompt_for_all_samples(net: Any, x: Tensor, prompt: Tensor) -> Tensor:
    return net.t((net.a(x)[:, None] * prompt).tanh().mean(1))
