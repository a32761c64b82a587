"""Send a batch through a model: call the model, take rows of the batch, get one loss per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchtrim._checks import check_losses
from batchtrim._deprecated import old_name
from batchtrim.engine.rows import RowCutter, map_tensors, tensors_of
from batchtrim.losses import Losses, flatten
from batchtrim.reduction import reduce_kept
from batchtrim.selection import Selection
from batchtrim.trimmer import Trimmer

__all__ = ["Forward", "StepResult", "as_losses", "kept_loss", "map_tensors", "padded_rows", "tensor_shapes"]


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


@dataclass
class Forward:
    """Run a model and its per-sample loss: ``per_sample_loss(model(x), y)``, un-reduced.

    Attributes:
        model: called as ``model(x)``, ``model(*x)`` for a plain tuple or list, ``model(**x)`` for a mapping. A named
            tuple, a PackedSequence or a dataclass is one argument.
        per_sample_loss: ``(outputs, y) -> losses``, a tensor (B,) or (B, ...), or :class:`batchtrim.Losses`.
        rank_by: ``(outputs, y) -> losses`` to rank by, if that is not the loss trained on.
        batch_dim: the dimension of the tensors in ``x`` that holds the batch.
        unit: what is chosen, "sample" or "element".
    """

    model: nn.Module
    per_sample_loss: Callable[[Any, Any], Tensor | Losses]
    rank_by: Callable[[Any, Any], Tensor | Losses] | None = None
    batch_dim: int = 0
    unit: str = "sample"

    def __post_init__(self) -> None:
        self.cutter = RowCutter(self.batch_dim)

    @property
    def inner(self) -> nn.Module:
        """The model without DistributedDataParallel, for a forward that no backward follows."""
        model = self.model
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def __call__(self, x: Any, y: Any, model: nn.Module | None = None) -> tuple[Losses, Any]:
        """Return one loss per sample or element (with mask and weights, if any), and the model's outputs."""
        model = self.model if model is None else model
        if type(x) in (tuple, list):
            outputs = model(*x)
        elif isinstance(x, Tensor) or not isinstance(x, Mapping):
            outputs = model(x)
        else:
            outputs = model(**x)
        return as_losses(self.per_sample_loss(outputs, y), self.unit), outputs

    def scores(self, outputs: Any, y: Any) -> Tensor | None:
        """Return the values to rank by, detached; None if they are the losses."""
        if self.rank_by is None:
            return None
        with torch.no_grad():
            return as_losses(self.rank_by(outputs, y), self.unit).values.detach()

    def rows(self, x: Any, y: Any, rows: Tensor, batch: int) -> tuple[Any, Any]:
        """Return the given samples of inputs and targets; see :class:`batchtrim.engine.rows.RowCutter`."""
        return self.cutter(x, y, rows, batch)


def as_losses(losses: Tensor | Losses, unit: str) -> Losses:
    """Return the result of a per-sample loss function as one value per sample or element."""
    if not isinstance(losses, Losses):
        # the trimmer refuses an empty batch, except with scope="global"
        check_losses(losses, "per_sample_loss(outputs, y)", allow_empty=True)
        losses = Losses(losses)
    return flatten(losses, unit)


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
    weights = kept.weights
    values = kept.values
    if values.shape[0] != selection.k:
        values, weights = values[: selection.k], None if weights is None else weights[: selection.k]
    return reduce_kept(values, selection, trim.scale, weights)
