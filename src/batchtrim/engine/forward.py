"""Run the user's model and per-sample loss on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim._checks import check_losses, describe
from batchtrim.engine.rows import RowCutter
from batchtrim.engine.wrappers import unwrapped
from batchtrim.losses import Losses, flatten

__all__ = ["Forward", "as_losses"]


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
        self.needs_compiler = False  # True once the model did not run with torch's compiler switched off
        self._unwrapped: tuple[nn.Module, nn.Module] | None = None  # a model, and what its wrappers hold

    @property
    def inner(self) -> nn.Module:
        """The model without its wrappers, for a forward that no backward follows."""
        if self._unwrapped is None or self._unwrapped[0] is not self.model:
            self._unwrapped = self.model, unwrapped(self.model)
        return self._unwrapped[1]

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

    def scores(self, losses: Losses, outputs: Any, y: Any) -> Losses | None:
        """Return what to rank ``losses`` by, one value for each, detached; None if that is themselves."""
        if self.rank_by is None:
            return None
        with torch.no_grad():
            found = self.rank_by(outputs, y)
            if isinstance(found, Tensor) and self.unit == "sample" and losses.mask is not None:
                _check_all_count(found, losses)
            return as_losses(found, self.unit, "rank_by(outputs, y)").detach()

    def rows(self, x: Any, y: Any, rows: Tensor, batch: int) -> tuple[Any, Any]:
        """Return the given samples of inputs and targets; see :class:`batchtrim.engine.rows.RowCutter`."""
        return self.cutter(x, y, rows, batch)


def _check_all_count(scores: Tensor, losses: Losses) -> None:
    """Check that a plain mean of a sample's scores is over the entries that its loss is the mean of."""
    if scores.ndim < 2 or losses.counts is None:
        return
    entries = scores[:1].numel()
    if entries > 1 and bool((losses.counts != entries).any()):
        raise ValueError(
            f"expected `rank_by` to return `Losses` of the entries that count, as the losses are, got "
            f"{describe(scores)} with ignored or weighted entries among them. Return batchtrim.Losses(values, mask), "
            "or pass batchtrim.per_sample(criterion)."
        )


def as_losses(losses: Tensor | Losses, unit: str, name: str = "per_sample_loss(outputs, y)") -> Losses:
    """Return the result of a per-sample loss function as one value per sample or element."""
    if not isinstance(losses, Losses):
        # the trimmer refuses an empty batch, except with scope="global"
        check_losses(losses, name, allow_empty=True)
        losses = Losses(losses)
    losses.check()
    return flatten(losses, unit)
