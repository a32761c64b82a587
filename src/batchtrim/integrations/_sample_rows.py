"""Assign losses to samples: by the number of labels, proven by the gradient of the model's outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from batchtrim.integrations._recorder import LossCall, LossPart, NotFound

__all__ = ["items_of", "label_sizes", "output_tensors", "prove_rows", "rows_of", "shifts_of"]


def label_sizes(labels: Iterable[Tensor], batch: int) -> set[int]:
    """Return how many entries a sample may have: as many as labels, one fewer if they are shifted, or one."""
    whole = {tensor.numel() // batch for tensor in labels if tensor.ndim and tensor.shape[0] == batch}
    return whole | {size - 1 for size in whole if size > 1} | {1}


def items_of(value: Any) -> Iterable[Any]:
    """Return what a mapping, list or tuple holds; nothing for another value."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (tuple, list)) else ()


def output_tensors(outputs: Any, loss: Any) -> list[Tensor]:
    """Return the tensors with a graph that a model returned, except its loss."""
    values = items_of(outputs)
    tensors = [each for value in values for each in (value if isinstance(value, (tuple, list)) else (value,))]
    return [each for each in tensors if isinstance(each, Tensor) and each.grad_fn is not None and each is not loss]


def rows_of(values: Tensor, batch: int, sizes: set[int]) -> Tensor:
    """Return (B, t). A flat vector must have an entry for every label: if some are left out, none can be assigned."""
    each, rest = divmod(values.numel(), batch)
    whole = values.ndim > 2 and values.shape[0] == batch
    if batch == 1 or (not rest and (each in sizes or whole or _flat_classes(values, batch, sizes))):
        return values.reshape(batch, -1)
    raise NotFound(
        f"its {values.numel()} losses cannot be told apart by sample: the batch has {batch} samples, "
        f"with {' or '.join(map(str, sorted(sizes)))} labels each"
    )


def _flat_classes(values: Tensor, batch: int, sizes: set[int]) -> bool:
    """Return (B * t, C), several losses for each of a sample's labels."""
    return values.ndim == 2 and not values.shape[0] % batch and values.shape[0] // batch in sizes


def prove_rows(parts: list[LossPart], rows: list[Tensor], outputs: list[Tensor], labels: Sequence[Tensor]) -> None:
    """Prove that each row belongs to its sample, by the gradient of the outputs or, if there is none, by the labels."""
    batch = len(rows[0])
    outputs = [each for each in outputs if each.ndim and each.shape[0] == batch]
    for part, each in zip(parts, rows, strict=True):
        if not (_reaches_its_rows(each, outputs) or any(shifts_of(part.call, label) for label in labels)):
            raise NotFound("neither an output that it returns nor its labels show which loss belongs to which sample")


def _reaches_its_rows(rows: Tensor, outputs: list[Tensor]) -> bool:
    """Return True if weights on the rows weight the gradients of the output rows equally; False without a gradient."""
    if not outputs or not rows.requires_grad:
        return False
    weights = torch.arange(1, len(rows) + 1, device=rows.device, dtype=rows.dtype)
    plain = torch.autograd.grad(rows.sum(), outputs, retain_graph=True, allow_unused=True)
    weighed = torch.autograd.grad(rows.sum(1) @ weights, outputs, retain_graph=True, allow_unused=True)
    reached = False
    for one, other in zip(plain, weighed, strict=True):
        if one is None or other is None or not one.any():
            continue
        reached = True
        expected = one.double() * weights.double().reshape(-1, *[1] * (one.ndim - 1))
        if (other.double() - expected).abs().max() > 2e-2 * expected.abs().max():
            raise NotFound("its losses are not in the order of the samples")
    return reached


def shifts_of(call: LossCall, label: Tensor) -> list[int]:
    """Return 0 if a call's targets are these labels, sample by sample, and 1 if they are the next ones.

    Both if the labels of each sample are all the same: all ignored, for example.
    """
    batch = len(label)
    if not batch or call.target.numel() % batch:
        return []
    target = call.target.detach().reshape(batch, -1)
    label = label.reshape(batch, -1).to(target.device)
    length = min(target.shape[1], label.shape[1] - 1)
    shifted = length > 0 and target.shape[1] - length <= 1 and torch.equal(target[:, :length], label[:, 1 : length + 1])
    return [0] * torch.equal(target, label) + [1] * shifted
