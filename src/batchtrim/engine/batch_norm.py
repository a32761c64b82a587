"""BatchNorm in the graph for the kept rows: the whole batch's statistics forward, the kept rows' in backward.

BatchNorm takes from a gradient its mean and its part along the normalised activations, over all rows of the batch. A
backward over k rows can only use those: with x of the kept rows, centred and scaled by its own mean m and deviation s,
``u = (x - m) / s``, and the deviation S of the whole batch,

    ``dx = weight / S * (g - mean(g) - u * mean(g * u))``

which leaves nothing along a constant or along x, as the exact gradient does over all rows. (The formula with the whole
batch's mean in u leaves a rest, since that is not the kept rows' mean: its direction was a little farther from exact.)
Gradients of weight and bias are exact, given g.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

__all__ = ["KeptBatchNorm", "has_batch_norm"]

# Dropped samples that go along, for each this many in the batch, where less than half of it is kept: they make the rows
# that backward sees more like the batch.
COMPANIONS = 32


def has_batch_norm(modules: list[nn.Module]) -> bool:
    """Whether one of them is a BatchNorm that takes its statistics from the batch."""
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) and each.training for each in modules)


class KeptBatchNorm(TorchFunctionMode):
    """Within it, a BatchNorm in training mode has the backward above.

    No vendor kernel runs: theirs keep reserve buffers for B rows, of which nobody can take k.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:  # seen first, and calls torch.batch_norm out of our sight
            return _batch_norm(*args, **kwargs)
        if func is torch.batch_norm:
            x, weight, bias, mean, variance, *rest = args
            return _batch_norm(x, mean, variance, weight, bias, *rest[:3])
        return func(*args, **kwargs)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        return _KeptRows.apply(input, weight, bias, running_mean, running_var, momentum, eps)  # type: ignore[return-value]
    return torch.native_batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps)[0]


class _KeptRows(torch.autograd.Function):
    """The operator is the dispatch mode's to answer: it gives the whole batch's mean and 1 / deviation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, momentum: Any, eps: Any
    ) -> Tensor:
        out, whole_mean, whole_inverse = torch.native_batch_norm(x, weight, bias, mean, variance, True, momentum, eps)
        ctx.save_for_backward(x, weight, whole_mean, whole_inverse)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, whole_mean, whole_inverse = ctx.saved_tensors
        dims = [dim for dim in range(x.ndim) if dim != 1]
        variance, mean = torch.var_mean(x.to(whole_mean.dtype), dims, correction=0)
        inverse = torch.rsqrt(variance + ctx.eps)
        ratio = whole_inverse / inverse
        wanted = [ctx.needs_input_grad[0], True, True]
        dx, along, constant = torch.ops.aten.native_batch_norm_backward(
            gradients[0],
            x,
            ratio if weight is None else weight * ratio,
            None,
            None,
            mean,
            inverse,
            True,
            ctx.eps,
            wanted,
        )
        d_weight = None
        if weight is not None:  # from (x - mean) * inverse to (x - whole_mean) * whole_inverse
            d_weight = ratio * along + (mean - whole_mean) * whole_inverse * constant
        return dx, d_weight, constant if ctx.needs_input_grad[2] else None, None, None, None, None
