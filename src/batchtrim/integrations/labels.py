"""What a Hugging Face batch trains on, told by the form of its labels: one loss per sample or token, and their number.

Legend: B batch, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchtrim.losses import Losses, token_losses

__all__ = ["count_labels", "per_sample_loss"]

_IGNORED = -100


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


def count_labels(batch: Any, unit: str, *, shift: bool = False) -> Tensor:
    """0-d int64: how many samples or tokens of a batch there are to choose from."""
    labels = batch["labels"] if "labels" in batch else None  # noqa: SIM401  (a BatchEncoding's get is no dict's)
    if not isinstance(labels, Tensor):
        raise ValueError(f"expected batches with a tensor `labels`, got keys {sorted(batch)}. Name the labels so.")
    if labels.dtype.is_floating_point:
        return torch.tensor(len(labels))
    counted = (labels[..., 1:] if shift else labels) != _IGNORED
    return (counted.flatten(1).any(1) if labels.ndim > 1 and unit == "sample" else counted).sum()
