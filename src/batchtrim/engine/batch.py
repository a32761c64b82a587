"""A batch going through a model: call it, take some of its rows, get its losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchtrim._checks import check_losses
from batchtrim.losses import Losses, flatten
from batchtrim.selection import Selection

__all__ = ["Forward", "Step", "as_losses", "map_tensors", "tensor_shapes"]


class Step(NamedTuple):
    """What an engine returns.

    Attributes:
        loss: 0-d, with a graph.
        losses: (B,), all samples', detached.
        outputs: the model's outputs for the whole batch, detached.
        selection: which samples the loss is of.
        mask: bool (B,), False for samples that do not count; None where all do.
    """

    loss: Tensor
    losses: Tensor
    outputs: Any
    selection: Selection
    mask: Tensor | None = None


@dataclass
class Forward:
    """What one forward is: ``per_sample_loss(model(x), y)``, un-reduced.

    Attributes:
        model: called as ``model(x)``, ``model(*x)`` for a tuple or list, ``model(**x)`` for a mapping.
        per_sample_loss: ``(outputs, y) -> losses``, a tensor (B,) or (B, ...), or :class:`batchtrim.Losses`.
        rank_by: ``(outputs, y) -> losses`` to rank by, where that is not the loss trained on.
        batch_dim: the dimension of the tensors in ``x`` that holds the batch.
        unit: what is chosen, "sample" or "element".
    """

    model: nn.Module
    per_sample_loss: Callable[[Any, Any], Tensor | Losses]
    rank_by: Callable[[Any, Any], Tensor | Losses] | None = None
    batch_dim: int = 0
    unit: str = "sample"

    @property
    def inner(self) -> nn.Module:
        """The model without the wrapper that synchronises gradients: for a forward no backward follows."""
        model = self.model
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def __call__(self, x: Any, y: Any, model: nn.Module | None = None) -> tuple[Losses, Any]:
        """Losses of one value a sample or element (with mask and weights, if any), and the model's outputs."""
        model = self.model if model is None else model
        if isinstance(x, Mapping):
            outputs = model(**x)
        elif isinstance(x, (tuple, list)):
            outputs = model(*x)
        else:
            outputs = model(x)
        return as_losses(self.per_sample_loss(outputs, y), self.unit), outputs

    def scores(self, outputs: Any, y: Any) -> Tensor | None:
        """What to rank by, detached, or None where it is the loss itself."""
        if self.rank_by is None:
            return None
        with torch.no_grad():
            return as_losses(self.rank_by(outputs, y), self.unit).values.detach()

    def rows(self, x: Any, y: Any, rows: Tensor, batch: int) -> tuple[Any, Any]:
        """The given samples of inputs and targets. Tensors that do not hold the batch stay whole."""

        def pick(dim: int) -> Callable[[Tensor], Tensor]:
            def taken(tensor: Tensor) -> Tensor:
                held = tensor.ndim > dim and tensor.shape[dim] == batch
                return tensor.index_select(dim, rows.to(tensor.device)) if held else tensor

            return taken

        return map_tensors(pick(self.batch_dim), x), map_tensors(pick(0), y)


def as_losses(losses: Tensor | Losses, unit: str) -> Losses:
    """Whatever a per-sample loss function returned, as one value a sample or element."""
    if not isinstance(losses, Losses):
        # whether an empty batch is one too few is for the trimmer to say: with scope="global" it is not
        check_losses(losses, "per_sample_loss(outputs, y)", allow_empty=True)
        losses = Losses(losses)
    return flatten(losses, unit)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with every tensor in its dicts, lists and tuples replaced by ``function(tensor)``."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def tensor_shapes(value: Any) -> tuple[Any, ...]:
    """Shapes and dtypes of every tensor in a batch: what decides how a model runs, as far as a batch can."""
    found: list[Any] = []
    map_tensors(lambda tensor: found.append((tuple(tensor.shape), tensor.dtype)) or tensor, value)
    return tuple(found)
