"""What a Hugging Face batch trains on, told by the form of its labels, and what it weighs in an optimizer step.

Legend: B batch, T tokens, C classes, M micro-batches in a window (one optimizer step), R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchtrim.distributed import sum_over_ranks, world_size
from batchtrim.losses import Losses, flatten, token_losses

__all__ = ["count_labels", "labels_of", "loss_of", "per_sample_loss", "plain_mean", "shares"]

_IGNORED = -100
_SPANS = ("start_positions", "end_positions")


def per_sample_loss(outputs: Any, labels: Tensor, *, shift: bool = False) -> Losses:
    """Un-reduced losses of a model's output; labels of -100 do not count.

    Args:
        outputs: with ``logits`` (B, C) or (B, T, C).
        labels: int64 (B,): cross-entropy of each sample; (B, T): of each token. Floating point (B,) or (B, 1):
            squared error; (B, C): binary cross-entropy, mean over C.
        shift: logits at t predict the label at t + 1 (causal language models).
    """
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    if labels.dtype.is_floating_point:
        wrong = F.mse_loss if labels.numel() == len(labels) else F.binary_cross_entropy_with_logits
        return Losses(wrong(logits.float(), labels.float().view_as(logits), reduction="none").flatten(1).mean(1))
    if labels.ndim > 1:
        return token_losses(logits, labels, shift=shift)
    return Losses(F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=_IGNORED), labels != _IGNORED)


def plain_mean(losses: Losses) -> Tensor:
    """0-d: the mean over all samples or tokens that count, and 0 where none does."""
    values, mask, _ = flatten(losses, "element")
    return values.mean() if mask is None else values[mask].sum() / mask.sum().clamp(min=1)


def count_labels(batch: Any, unit: str, *, shift: bool = False) -> Tensor:
    """0-d int64: how many samples or tokens of a batch there are to choose from."""
    labels = batch["labels"] if "labels" in batch else None  # noqa: SIM401  (a BatchEncoding's get is no dict's)
    if not isinstance(labels, Tensor):
        raise ValueError(f"expected batches with a tensor `labels`, got keys {sorted(batch)}. Name the labels so.")
    if labels.dtype.is_floating_point:
        return torch.tensor(len(labels))
    counted = (labels[..., 1:] if shift else labels) != _IGNORED
    return (counted.flatten(1).any(1) if labels.ndim > 1 and unit == "sample" else counted).sum()


def shares(counts: Tensor, over: str, scope: str, across: bool) -> list[Tensor]:
    """What the loss of each micro-batch is multiplied by: the Trainer adds them up and averages over R ranks.

    ``R * n_m / N``, n_m of N in the windows of all ranks; with scope "global", whose loss is that of all ranks already,
    ``sum_r(n_rm) / N``; and where the whole window is chosen from, its sum in place of n_m.

    Args:
        counts: (M,), n_m: what :func:`count_labels` says of this rank's micro-batches. over: "micro" or "window".
        across: False where a rank is to weigh the same whatever it holds: N is its own then, and R is 1.

    Raises:
        RanksDisagree: ranks chosen from together have another M, or a rank does not come.
    """
    micro_batches = len(counts)
    if over == "window":
        counts = counts.sum()[None]
    if scope == "global":
        counts = sum_over_ranks(counts, "number of micro-batches")
    total, ranks = counts.sum()[None], 1
    if scope == "local" and across:
        total, ranks = sum_over_ranks(total, "number of totals"), world_size()
    return list((ranks * counts / total.clamp(min=1)).expand(micro_batches))  # nothing to train on: 0, not NaN


def loss_of(outputs: Any) -> Any:
    """The loss a model returned, as the Trainer takes it."""
    return outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]


def labels_of(inputs: Mapping[str, Any], names: Sequence[str] = ()) -> list[Tensor]:
    """Return the labels of a batch: what is among ``names`` or is called so, and without any all of its tensors."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    labels = [value for name, value in tensors.items() if name in names or "label" in name or name in _SPANS]
    return labels or list(tensors.values())
