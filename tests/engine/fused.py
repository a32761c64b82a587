"""A CPU version of the GPUs' fused attention with dropout: the mask follows from a seed and a row's position."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

NAME = "_scaled_dot_product_efficient_attention"  # its rule is found by this name if its library counts as torch
_library = torch.library.Library("batchtrim_tests", "DEF")
_SEEDED = (torch.Tag.nondeterministic_seeded,)
_library.define(
    f"{NAME}(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float dropout_p=0.0, "
    "bool is_causal=False, *, float? scale=None) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_SEEDED,
)
_library.define(
    f"{NAME}_backward(Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor? attn_bias, Tensor out, "
    "Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, float dropout_p, bool[4] grad_input_mask, "
    "bool is_causal=False, *, float? scale=None) -> (Tensor, Tensor, Tensor, Tensor?)",
    tags=_SEEDED,
)
ran_on: list[int] = []  # how many rows each backward had


def _kept(seed: Tensor, shape: Any, p: float) -> Tensor:
    generator = torch.Generator().manual_seed(int(seed))
    return (torch.rand(shape, generator=generator) >= p) / (1 - p)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(-1)


def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Any, sums: bool, p: float = 0.0, *_: Any) -> Any:
    weights = _weights(query, key)
    seed = torch.randint(2**31, ())
    out = ((weights * _kept(seed, weights.shape, p)) @ value).contiguous()
    return out, weights.new_zeros(weights.shape[:-1]), seed, torch.zeros((), dtype=torch.long)


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Any, out: Tensor, sums: Tensor, seed: Tensor,
    offset: Tensor, p: float, mask: Any, *_: Any,
) -> Any:  # fmt: skip
    ran_on.append(len(gradient))
    weights = _weights(query, key)
    kept = _kept(seed, weights.shape, p)
    scores = weights * (gradient @ value.transpose(-2, -1) * kept - (gradient * out).sum(-1, keepdim=True))
    scores = scores / math.sqrt(query.shape[-1])
    found = scores @ key, scores.transpose(-2, -1) @ query, (weights * kept).transpose(-2, -1) @ gradient
    return *(each.contiguous() for each in found), None


_library.impl(NAME, _forward, "CPU")
_library.impl(f"{NAME}_backward", _backward, "CPU")


@torch.library.register_fake(f"batchtrim_tests::{NAME}")
def _(query: Tensor, key: Tensor, value: Tensor, bias: Any, sums: bool, *_: Any, **__: Any) -> Any:
    number = query.new_empty((), dtype=torch.long)
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1]), number, number.clone()


@torch.library.register_fake(f"batchtrim_tests::{NAME}_backward")
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return *(each.new_empty(each.shape) for each in (query, key, value)), None


def _save(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.p = inputs[5]


def _differentiate(ctx: Any, gradient: Tensor, *_: Any) -> Any:
    query, key, value, out, sums, seed, offset = ctx.saved_tensors
    backward = getattr(torch.ops.batchtrim_tests, f"{NAME}_backward")
    found = backward(gradient, query, key, value, None, out, sums, seed, offset, ctx.p, [True, True, True, False])
    return *found[:3], None, None, None, None


torch.library.register_autograd(f"batchtrim_tests::{NAME}", _differentiate, setup_context=_save)


class Attending(nn.Module):
    """Two layers of attention with dropout inside the kernel, over (batch, 6, 8)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        attend = getattr(torch.ops.batchtrim_tests, NAME)
        for layer in self.layers:
            q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in layer(x).chunk(3, -1))
            x = x + attend(q, k, v, None, True, self.p)[0].transpose(1, 2).flatten(2)
        return self.head(x.mean(1))
