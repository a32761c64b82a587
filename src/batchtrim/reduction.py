"""From losses and a selection to one number.

Two scales: ``kept`` divides by the number kept, as in the paper: the step gets larger as fewer, harder samples are
averaged. ``batch`` divides by the number there was to choose from: a sample weighs what it weighs in plain training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchtrim.selection import Selection

__all__ = ["SCALES", "kept_divisor", "reduce", "reduce_kept", "reduce_mask"]

SCALES = ("kept", "batch")


def reduce(losses: Tensor, selection: Selection, scale: str = "kept", weights: Tensor | None = None) -> Tensor:
    """The loss to call backward on: the mean of the kept ``losses``.

    kept:  ``L = sum_kept(w_i * l_i) / sum_kept(w_i)``, and with no weights ``(1 / k) * sum_kept(l_i)``
    batch: ``L = sum_kept(w_i * l_i) / n``, n the number of samples there was to choose from

    Args:
        losses: (B,), with a graph.
        selection: what to keep of it.
        scale: "kept" or "batch".
        weights: (B,), per-sample weights a criterion has already multiplied into ``losses`` (class weights); the
            mean over the kept is then divided by their sum over the kept, as the criterion's own mean would be.

    Returns:
        0-d, dtype of ``losses``. With everything kept and no weights: ``losses.mean()``, bit for bit.
    """
    if weights is None and selection.weights is None and _dot_is_exact(losses) and 0 < selection.k < selection.size:
        if scale == "batch":
            divisor = selection.batch_normalizer or selection.candidates
        else:
            divisor = selection.normalizer or selection.k
        shares = torch.zeros(selection.size, dtype=losses.dtype).index_fill_(0, selection.indices, 1.0 / divisor)
        loss = losses.dot(shares)
        # 0 * inf is NaN: where a dropped loss is not finite, or a kept one is NaN, take the way below
        value = loss.item()
        if value == value:
            return loss
    if not selection.everything:
        losses = losses.index_select(0, selection.indices)
        weights = None if weights is None else weights.index_select(0, selection.indices)
    return reduce_kept(losses, selection, scale, weights)


def _dot_is_exact(losses: Tensor) -> bool:
    """Where a dot product serves: its backward is one product, against three operators for a gathered mean.

    Not in half precision, where the shares would be rounded, and not on a device, where reading the result is a sync.
    """
    return losses.is_cpu and losses.dtype in (torch.float32, torch.float64)


def reduce_kept(kept: Tensor, selection: Selection, scale: str = "kept", weights: Tensor | None = None) -> Tensor:
    """:func:`reduce` where the losses of the kept rows, (k,), in the order of ``selection.indices``, are at hand."""
    if selection.k == 0:
        return kept.sum()  # 0, attached to the graph: a step that changes nothing, under DDP too
    if selection.weights is not None:
        kept = kept * selection.weights
        weights = selection.weights if weights is None else weights * selection.weights
    half = kept.dtype in (torch.float16, torch.bfloat16)
    total = torch.float32 if half else kept.dtype  # a sum may be beyond float16 where the mean is not
    if scale == "batch":
        return (kept.sum(dtype=total) / (selection.batch_normalizer or selection.candidates)).to(kept.dtype)
    if selection.normalizer is not None:
        return (kept.sum(dtype=total) / selection.normalizer).to(kept.dtype)
    if weights is not None:
        return (kept.sum(dtype=total) / weights.sum(dtype=total)).to(kept.dtype)
    return kept.mean()


def kept_divisor(selection: Selection, weights: Tensor | None = None) -> float:
    """What :func:`reduce` with scale "kept" divides the weighted kept sum by. Syncs the device where there are weights.

    Args:
        weights: (B,), as in :func:`reduce`.
    """
    if selection.normalizer is not None:
        return selection.normalizer
    if weights is None:
        return selection.k if selection.weights is None else float(selection.weights.sum())
    kept = weights[selection.indices]
    return float((kept if selection.weights is None else kept * selection.weights).sum())


def reduce_mask(losses: Tensor, mask: Tensor, count: Tensor, weights: Tensor | None = None) -> Tensor:
    """:func:`reduce` with fixed shapes, for torch.compile: ``sum(where(mask, losses, 0)) / count``.

    Args:
        losses: (B,). mask: bool (B,), True where kept. count: 0-d, what the sum is divided by.
        weights: (B,), as in :func:`reduce`; then their kept sum is the divisor.
    """
    zero = torch.zeros((), dtype=losses.dtype, device=losses.device)
    total = torch.where(mask, losses, zero).sum()
    if weights is not None:
        count = torch.where(mask, weights, zero).sum()
    return total / count.to(losses.dtype)
