"""The function that is traced: model and loss together; and which dimensions of its batch hold rows."""

from __future__ import annotations

from collections.abc import Callable
from types import GeneratorType
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from batchtrim.engine.batch import map_tensors
from batchtrim.engine.capture import CannotCapture
from batchtrim.engine.compilation import uncompiled
from batchtrim.engine.forward import Forward, as_losses
from batchtrim.engine.rows import batch_size, tensors_of
from batchtrim.unreduced import as_one

__all__ = ["OF_TERMS", "row_sizes", "traced_function"]

OF_TERMS = "its loss is a sum of terms whose entries count differently"


def traced_function(forward: Forward, equates: bool, scope: str) -> Callable[..., Any]:
    """Return a function of (x, y) that runs the model and returns one loss per sample, and the outputs.

    Args:
        equates: treat sizes that are equal as one number; see :func:`_equate_sizes`.
        scope: the trimmer's. On one rank, means over all entries have one divisor.
    """
    model = uncompiled(forward.inner)
    per_sample_loss, unit, dim = forward.per_sample_loss, forward.unit, forward.batch_dim

    def step(x: Any, y: Any) -> Any:
        if equates:
            _equate_sizes(x, dim, y)
        if isinstance(x, dict):
            outputs = model(**x)
        elif type(x) in (tuple, list):
            outputs = model(*x)
        else:
            outputs = model(x)
        if isinstance(outputs, GeneratorType):
            raise CannotCapture("it returns a generator, which can be read only once. Return a list")
        losses = as_losses(per_sample_loss(outputs, y), unit)
        losses = as_one(losses) if scope == "local" else losses
        if losses.terms:
            raise CannotCapture(OF_TERMS)
        counting = losses.mask, losses.weights, losses.counts, losses.unit, losses.reduction
        parts = losses.values, *counting, (), losses.entries
        return parts, _detached(outputs)

    return step


def _detached(outputs: Any) -> Any:
    """Return the outputs without their graph, so that no gradient flows through them."""
    return pytree.tree_map(lambda leaf: map_tensors(Tensor.detach, leaf), outputs)


def _equate_sizes(x: Any, dim: int, y: Any) -> None:
    """Compare the sizes that may be the batch size, so that a trace treats them as one number, with a guard."""
    rows = None
    for part, at in ((x, dim), (y, 0)):
        for leaf in pytree.tree_leaves(part):
            if isinstance(leaf, Tensor) and leaf.ndim > at:
                if rows is None:
                    rows = leaf.shape[at]
                elif rows == leaf.shape[at]:
                    continue  # the comparison itself makes the guard


def _counts(size: int, batch: int) -> bool:
    """True if there is one row per sample, several per sample, or one for several samples, such as a pair."""
    return size == batch or (min(size, batch) > 1 and (size % batch == 0 or batch % size == 0))


def row_sizes(x: Any, y: Any, forward: Forward) -> list[tuple[Tensor, int]]:
    """Return the tensors of a batch that hold rows, each with the dimension along which it holds them.

    Tokens are counted by inputs or targets: a translation's source has another number of them than its target.
    """
    dim = forward.batch_dim
    batch = batch_size(x, dim) or 0
    tokens = {batch_size(x, 1), batch_size(y, 1)} if forward.unit == "element" else ()
    found: list[tuple[Tensor, int]] = []
    for part, at in ((x, dim), (y, 0)):
        for tensor in tensors_of(part):
            if tensor.ndim > at and _counts(tensor.shape[at], batch):
                found.append((tensor, at))
                if tensor.ndim > 1 and tensor.shape[1] in tokens:
                    found.append((tensor, 1))
    return found
