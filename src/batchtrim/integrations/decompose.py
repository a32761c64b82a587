"""From the one number that a model or a training step computes to one loss a sample, proven.

:class:`LossFinder` runs the model's own code under :class:`batchtrim.integrations.intercept.Recorder`, so the loss is
what that code computes and nothing is guessed from names, configurations or the form of the labels. The first time it
sees a kind of batch, and now and then after that, it checks that the losses add up to the model's own loss, and that
each lies in the row of its sample. What does not is an error, and never another loss.

Legend: B batch, t entries a sample, L the model's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchtrim.integrations.intercept import Call, NotFound, Part, Recorder
from batchtrim.integrations.parts import compare, parts_of
from batchtrim.integrations.rows import label_sizes, output_tensors, prove_rows, rows_of
from batchtrim.unreduced import Losses, flatten

__all__ = ["Found", "LossFinder"]

_CHECK_EVERY = 100


@dataclass
class Found:
    """The losses of a batch.

    Attributes:
        losses: a vector of what there is to choose from; keeping all of it gives L.
        scores: what to rank by where it is not ``values``.
        loss: L, detached. outputs: what the model returned. call: the first of the recorded calls, of ``terms``.
    """

    losses: Losses
    scores: Tensor | None
    loss: Tensor
    outputs: Any
    call: Call
    terms: int


class LossFinder:
    """Find the losses behind the number that ``run`` returns.

    Args:
        unit: "sample": one loss a sample, weighted by its entries that count, so that keeping all gives L where samples
            have different numbers of tokens too. "element": one an entry.
        smoothing: label smoothing to add to the model's cross-entropy.
    """

    def __init__(self, unit: str = "sample", smoothing: float = 0.0) -> None:
        self.unit, self.smoothing = unit, smoothing
        self._proven: set[Any] = set()
        self._calls = 0

    def __call__(
        self, run: Callable[[], Any], loss_of: Callable[[Any], Any], batch: int, labels: Sequence[Tensor]
    ) -> Found:
        """Return the losses of a batch of ``batch`` samples.

        Args:
            run: the model's code. loss_of: L in what it returns. labels: (B, ...), what it is trained on.

        Raises:
            NotFound: see :class:`batchtrim.integrations.intercept.NotFound`.
        """
        with_graph = torch.is_grad_enabled()
        with Recorder(self.smoothing) as recorder:
            outputs = run()
        if self.smoothing and any(call.name != "cross_entropy" or call.ignored is None for call in recorder.calls):
            raise NotFound("label smoothing is for cross-entropy with classes, and its loss is another")
        loss = loss_of(outputs)
        kinds = tuple((call.name, call.values.ndim, call.leaf.ndim) for call in recorder.calls)
        form = (kinds, batch > 1, getattr(loss, "dtype", None))
        self._calls += 1
        check = form not in self._proven or self._calls % _CHECK_EVERY == 0
        parts = parts_of(loss, recorder.calls, check=check)
        sizes = label_sizes(labels, batch)
        rows = [rows_of(part.values, batch, sizes) for part in parts]
        if check and with_graph:
            if batch > 1:
                prove_rows(parts, rows, output_tensors(outputs, loss), labels)
            self._proven.add(form)
        losses, scores = _merged(parts, rows, self.unit)
        if check:
            compare(loss, losses.mean(), "the loss with everything kept")
        return Found(losses, scores, loss.detach(), outputs, parts[0].call, len(parts))


def _merged(parts: list[Part], rows: list[Tensor], unit: str) -> tuple[Losses, Tensor | None]:
    """Losses and scores of :class:`Found`, from all parts."""
    first = parts[0]
    alike = len(parts) == 1 or all(
        part.weights is None
        and part.call.ignored == first.call.ignored
        and each.shape == rows[0].shape
        and (part.counted is None if first.counted is None else part.call.target is first.call.target)
        for part, each in zip(parts, rows, strict=True)
    )
    if alike:
        values = torch.stack(rows).sum(0) if len(rows) > 1 else rows[0]
        return _of_one(values, first, unit), None
    if unit == "element" and any(each.shape[1] > 1 for each in rows):
        raise NotFound("it has several terms, of different entries, and `unit` is 'element'")
    entries = [_entries(part, each) for part, each in zip(parts, rows, strict=True)]
    counted = torch.stack([each > 0 for each in entries]).any(0)
    shares = torch.stack([each.sum(1) / part.divisor for part, each in zip(parts, rows, strict=True)]).sum(0)
    # what each sample adds to L; ranked by what its loss would be alone
    alone = torch.stack([each.detach().sum(1) / _not_zero(n) for each, n in zip(rows, entries, strict=True)]).sum(0)
    return Losses(shares * counted.sum(), counted), alone


def _entries(part: Part, rows: Tensor) -> Tensor:
    """(B,): what a sample's mean divides by."""
    counts = part.counted if part.weights is None else part.weights
    counts = torch.ones_like(rows) if counts is None else counts
    return counts.reshape(rows.shape).sum(1).to(rows.dtype)


def _not_zero(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.ones_like(values))


def _of_one(values: Tensor, part: Part, unit: str) -> Losses:
    counted = None if part.counted is None else part.counted.reshape(values.shape)
    weights = None if part.weights is None else part.weights.reshape(values.shape)
    if values.shape[1] == 1:
        return Losses(*(None if each is None else each[:, 0] for each in (values, counted, weights)))  # type: ignore[arg-type]
    return flatten(Losses(values, counted, weights), unit)
