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
        mean, deviation = _statistics(x, ctx.eps)
        # torch's own backward, given the kept rows' statistics and a weight that turns its 1 / s into 1 / S
        stretch = deviation * whole_inverse
        dx, along, d_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0],
            x,
            (stretch if weight is None else stretch * weight).to(whole_mean.dtype),
            None,
            None,
            mean.to(whole_mean.dtype),
            (1 / deviation).to(whole_mean.dtype),
            True,
            ctx.eps,
            [ctx.needs_input_grad[0], weight is not None, weight is not None or ctx.needs_input_grad[2]],
        )
        d_weight = None
        if weight is not None:  # the sum of g * (x - M) / S, from that of g * (x - m) / s
            d_weight = (along * stretch + (mean - whole_mean) * whole_inverse * d_bias).to(weight.dtype)
        d_bias = d_bias.to(whole_mean.dtype) if ctx.needs_input_grad[2] else None
        return (dx if ctx.needs_input_grad[0] else None), d_weight, d_bias, None, None, None, None


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(channels,): mean and deviation of x, in float64 on a CPU.

    There, sums as matrix products are an order of magnitude faster than ``torch.var_mean`` over the outer dimensions.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # sums of squares would not survive in half precision
    channels = x.shape[1]
    n = x.numel() // channels
    if not x.is_cpu:
        variance, mean = torch.var_mean(wide, [dim for dim in range(x.ndim) if dim != 1], correction=0)
        return mean, variance.add(eps).sqrt()
    if x.ndim > 2 and x.is_contiguous():
        rows = wide.reshape(x.shape[0] * channels, 1, -1)
        squares = torch.bmm(rows, rows.transpose(1, 2))  # transposed, not reshaped: several times faster
        total, squares = (each.view(-1, channels).double().sum(0) for each in (rows.sum(2), squares))
    else:  # channels last, or no positions at all: a matrix whose columns are channels
        rows = wide.movedim(1, -1).reshape(n, channels)
        ones = rows.new_ones(1, n)
        total, squares = ((ones @ each)[0].double() for each in (rows, rows**2))
    mean = total / n
    return mean, (squares / n - mean**2).clamp(min=0).add(eps).sqrt()
