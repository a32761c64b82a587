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
        rows = (x, gradients[0])
        if x.dtype != whole_mean.dtype:  # half precision: sums of squares would not survive in it
            rows = tuple(each.to(whole_mean.dtype) for each in rows)
        x_rows, g_rows = (_rows(each, x) for each in rows)
        n = x.numel() // x.shape[1]
        mean, along, constant = _sums(x_rows) / n, _sums(g_rows, x_rows), _sums(g_rows)
        variance = (_sums(x_rows, x_rows) / n - mean**2).clamp(min=0)
        whole_mean, scale = whole_mean.double(), whole_inverse.double()
        d_weight = None if weight is None else ((along - whole_mean * constant) * scale).to(weight.dtype)
        if weight is not None:
            scale = scale * weight
        # dx = scale * g + by_x * x + rest, channel by channel: the formula above, its brackets multiplied out
        by_x = -scale * (along - mean * constant) / (variance + ctx.eps) / n
        rest = -scale * constant / n - by_x * mean
        dx = None
        if ctx.needs_input_grad[0]:
            shape = [1, -1] + [1] * (x.ndim - 2)
            per_channel = [each.to(rows[0].dtype).view(shape) for each in (scale, by_x, rest)]
            dx = (rows[0] * per_channel[1]).add_(per_channel[2]).addcmul_(rows[1], per_channel[0]).to(x.dtype)
        d_bias = constant.to(whole_inverse.dtype) if ctx.needs_input_grad[2] else None
        return dx, d_weight, d_bias, None, None, None, None


def _rows(tensor: Tensor, like: Tensor) -> Tensor:
    """As a matrix whose columns are channels, or (k, channels, positions), as ``like`` lies in memory: no copy then."""
    if like.ndim == 2 or like.is_contiguous():
        return tensor.contiguous().flatten(2) if like.ndim > 2 else tensor
    return tensor.movedim(1, -1).reshape(-1, like.shape[1])  # channels last


def _sums(a: Tensor, b: Tensor | None = None) -> Tensor:
    """float64 (channels,): the sum of a, or of a * b, over everything else.

    As matrix products, which are an order of magnitude faster on a CPU than a reduction over the outer dimensions.
    """
    if a.ndim == 2:
        a = a if b is None else a * b
        return (a.new_ones(1, a.shape[0]) @ a)[0].double()
    if b is None:
        return a.sum(2).double().sum(0)
    k, channels, positions = a.shape
    left, right = (each.reshape(k * channels, 1, positions) for each in (a, b))
    products = torch.bmm(left, right.transpose(1, 2))  # transposed, not reshaped: several times faster
    return products.view(k, channels).double().sum(0)
