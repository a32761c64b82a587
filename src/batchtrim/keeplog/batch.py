"""A batch as a log records it: checked, and packed so that many batches can be entered at once.

Legend: n samples in the data set, B batch, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from batchtrim._checks import check_count, check_has_values, check_integers, check_like, check_losses, describe
from batchtrim.choice import Choice
from batchtrim.selection import Selection

__all__ = [
    "ChoiceLike",
    "Entries",
    "as_before",
    "check_batch",
    "check_classes",
    "joined",
    "logits_of",
    "pack",
    "parts_of",
]

_LARGEST_LABEL = torch.iinfo(torch.int32).max
_MOST_CLASSES = 10_000_000  # each line of the history has two lists of this many counts


class ChoiceLike(Protocol):
    """A :class:`batchtrim.Choice`, or another object with ``losses``, ``selection`` and, optionally, ``mask``."""

    @property
    def losses(self) -> Tensor: ...

    @property
    def selection(self) -> Selection: ...


def check_classes(classes: Any) -> int:
    """Check the number of classes to count by early, not at the end of an epoch."""
    if check_count("classes", classes) > _MOST_CLASSES:
        raise ValueError(
            f"expected `classes` of at most {_MOST_CLASSES:,}, got {classes}. It is the number of classes; leave it "
            "out if you need no keep rate per class."
        )
    return int(classes)


class Entries(NamedTuple):
    """The entries of a batch, one per row; or of several batches, one after another.

    Attributes:
        rows: int64, which sample: n if a mask leaves the entry out, -1 if the id was out of range.
        losses: float32.
        kept: bool.
        steps: int32, the number of the batch.
        predicted: int32, -1 if there were no outputs; confidence: float16.
        labels: int32, below 0 for none.
    """

    rows: Tensor
    losses: Tensor
    kept: Tensor
    steps: Tensor
    predicted: Tensor
    confidence: Tensor
    labels: Tensor


def as_before(
    ids: Tensor, losses: Tensor | None, selection: Selection | None, mask: Tensor | None
) -> tuple[Tensor, Choice]:
    """Convert the deprecated call ``record(ids, losses, selection, mask=mask)`` to ids and a choice."""
    if losses is None or selection is None:
        raise TypeError(f"expected `last` to be a batchtrim.Choice, such as `trim.last`, got {describe(ids)}.")
    message = (
        "record(ids, losses, selection) is removed in the next release: record(Choice(losses, selection), ids=ids)."
    )
    warnings.warn(message, DeprecationWarning, stacklevel=4)
    return ids, Choice(losses, selection, mask)


def parts_of(last: Any) -> tuple[Tensor, Selection, Tensor | None]:
    """Return losses, selection and mask of the last choice."""
    if last is None:
        raise ValueError(
            "expected `last` to be a batchtrim.Choice, got None. Record after the trimmer was called; a compiled step "
            "leaves no choice to record."
        )
    losses, selection = getattr(last, "losses", None), getattr(last, "selection", None)
    if not isinstance(losses, Tensor) or not isinstance(selection, Selection):
        raise TypeError(f"expected `last` to have losses and a selection, as `trim.last` has, got {describe(last)}.")
    check_losses(losses, allow_empty=True)
    check_has_values("last.losses", losses, "a KeepLog")
    if selection.size != len(losses):
        raise ValueError(
            f"expected `last.selection` to be of {len(losses)} losses, got one of {selection.size}. "
            "Losses and selection are of different batches."
        )
    return losses, selection, getattr(last, "mask", None)


def logits_of(outputs: Any, size: int) -> Tensor | None:
    """Return a model's outputs if they are (B, C) logits, directly or as ``logits``; otherwise None."""
    if not isinstance(outputs, Tensor):
        outputs = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    fits = isinstance(outputs, Tensor) and outputs.ndim == 2 and len(outputs) == size and outputs.shape[1] > 1
    return outputs if fits and outputs.dtype.is_floating_point else None


def check_batch(losses: Tensor, mask: Tensor | None, ids: Any, outputs: Any, labels: Any) -> Tensor:
    """Check the tensors recorded with the losses; return the ids."""
    if ids is None:
        raise ValueError(
            "expected `ids`, the samples' row numbers in the data set, got None. Let the data set return its index."
        )
    ids = _as_tensor(ids)
    check_integers("ids", ids, losses)
    if labels is not None:
        check_integers("labels", labels, losses)
    if mask is not None:
        check_like("mask", mask, losses, torch.bool)
    if outputs is not None:
        check_losses(outputs, "outputs", allow_empty=True)
        if outputs.ndim != 2 or outputs.shape[0] != len(losses) or outputs.shape[1] < 2:
            raise ValueError(
                f"expected `outputs` to have shape ({len(losses)}, C), got {tuple(outputs.shape)}. They are the logits "
                "of two or more classes; from one logit for two classes: F.pad(outputs.reshape(-1, 1), (1, 0))."
            )
    return ids


def _as_tensor(ids: Any) -> Any:
    """Return row numbers as a tensor if a collator left them as a list or an array."""
    if isinstance(ids, Tensor):
        return ids
    if isinstance(ids, (set, frozenset)):
        raise TypeError(f"expected `ids` in the order of the losses, got a set, {describe(ids)}. Pass a list.")
    try:
        return torch.tensor(ids.__array__() if hasattr(ids, "__array__") else list(ids), device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"expected `ids` to be integers, the samples' row numbers in the data set, got {describe(ids)}. Samples "
            "with names need a number too: rows = {name: row for row, name in enumerate(names)}."
        ) from None


def pack(
    losses: Tensor,
    selection: Selection,
    mask: Tensor | None,
    ids: Tensor,
    outputs: Tensor | None,
    labels: Tensor | None,
    *,
    n: int,
    classes: int | None,
    step: int,
) -> Entries:
    """Return a batch as entries. They are copies, since the caller may change the losses in place afterwards.

    Raises:
        ValueError: ids or labels on the CPU are out of range; on a device, reading them would stall it.
    """
    device = losses.device
    rows = ids.to(device, torch.int64, copy=True)
    if labels is not None:
        labels = labels.to(device, torch.int64)
    if rows.is_cpu:
        _check_range("ids", rows, mask, n, "They are row numbers of the data set the log was made for.")
        if labels is not None and classes:
            hint = f"The log was made with classes={classes}."
            _check_range("labels", labels.clamp(min=0), mask, classes, hint)  # below 0 means no label
    else:
        rows = torch.where((rows < 0) | (rows >= n), -1, rows)
    if mask is not None:
        rows = torch.where(mask, rows, n)
    nothing = torch.full_like(rows, -1, dtype=torch.int32)
    predicted, confidence = nothing, nothing.to(torch.float16)
    if outputs is not None:
        top, predicted = outputs.detach().float().softmax(-1).max(-1)
        confidence, predicted = top.to(torch.float16), predicted.to(torch.int32)
    return Entries(
        rows,
        losses.detach().to(torch.float32, copy=True),
        selection.mask(),
        torch.full_like(rows, step, dtype=torch.int32),
        predicted,
        confidence,
        nothing if labels is None else labels.clamp(-1, _LARGEST_LABEL).to(torch.int32),
    )


def joined(batches: list[Entries], device: torch.device) -> Entries:
    """Return the entries of several batches, one after another; none for no batches."""
    if batches:
        return Entries(*(torch.cat([part.to(device) for part in parts]) for parts in zip(*batches, strict=True)))
    numbers = (torch.int64, torch.float32, torch.bool, torch.int32, torch.int32, torch.float16, torch.int32)
    return Entries(*(torch.zeros(0, dtype=dtype, device=device) for dtype in numbers))


def _check_range(name: str, values: Tensor, mask: Tensor | None, end: int, hint: str) -> None:
    values = values if mask is None else values[mask]
    if not len(values):
        return
    low, high = (int(edge) for edge in values.aminmax())
    if low < 0 or high >= end:
        got = f"{high}" if name == "labels" else f"some from {low} to {high}"
        raise ValueError(f"expected `{name}` from 0 to {end - 1}, got {got}. {hint}")
