"""Describe a step on a batch: its result, the rows it runs on, the loss of the kept ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchtrim._deprecated import old_name
from batchtrim.engine.rows import map_tensors, tensors_of
from batchtrim.losses import Losses
from batchtrim.reduction import reduce_rows
from batchtrim.selection import Selection
from batchtrim.trimmer import Trimmer

__all__ = ["StepResult", "kept_loss", "map_tensors", "padded_rows", "tensor_shapes"]


class StepResult(NamedTuple):
    """The result of an engine's step.

    Attributes:
        loss: 0-d, with a graph.
        losses: (B,), all samples', detached.
        outputs: the model's outputs for the whole batch, detached.
        selection: the samples that the loss is of.
        mask: bool (B,), False for samples that do not count; None if all do.
        engine: the name of the engine that computed it.
        approximate: why its gradient is not exact, or None.
    """

    loss: Tensor
    losses: Tensor
    outputs: Any
    selection: Selection
    mask: Tensor | None = None
    engine: str = ""
    approximate: str | None = None


def __getattr__(name: str) -> Any:
    if name == "Step":
        return old_name("batchtrim.engine.batch", name, "StepResult")
    raise AttributeError(f"module 'batchtrim.engine.batch' has no attribute {name!r}")


def tensor_shapes(value: Any) -> tuple[Any, ...]:
    """Return shape and dtype of every tensor in a batch."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of(value))


def padded_rows(selection: Selection, companions: int = 0) -> Tensor:
    """Return the kept rows in rising order, followed by ``companions`` dropped rows spread over the batch.

    There are at least two rows, since BatchNorm and ``squeeze`` treat a batch of one in another way. :func:`kept_loss`
    leaves the companions out.
    """
    rows = selection.indices
    wanted = min(max(companions, 2 - selection.k), selection.size - selection.k)
    if wanted <= 0:
        return rows
    dropped = torch.ones(selection.size, dtype=torch.int8, device=rows.device).index_fill_(0, rows, 0)
    others = dropped.argsort(descending=True, stable=True)[: selection.size - selection.k]
    return torch.cat([rows, others[:: len(others) // wanted][:wanted]])


def kept_loss(kept: Losses, selection: Selection, trim: Trimmer) -> Tensor:
    """Return the loss of the kept rows, from a forward over :func:`padded_rows`."""
    return reduce_rows(kept, slice(selection.k), selection, trim.scale)
