"""Turn the single loss that a model or a training step returns into one loss per sample, with proof.

:class:`LossFinder` runs the model's own code under :class:`batchtrim.integrations._recorder.Recorder`, so the loss is
what that code computes, and nothing is guessed from names, configurations or the form of the labels. It checks that the
losses add up to the model's own loss. The first time it sees a kind of batch, and occasionally after that, it also
checks that each loss is in the row of its sample. If a check fails, it raises an error; it never returns another
loss.

Legend: B batch, t entries per sample, L the model's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchtrim.integrations._contributions import compare, parts_of, weights_of
from batchtrim.integrations._recorder import LossPart, NotFound, Recorder
from batchtrim.integrations._sample_rows import label_sizes, output_tensors, prove_rows, rows_of
from batchtrim.integrations._terms import Term, merged, summed
from batchtrim.unreduced import Losses

__all__ = ["Found", "LossFinder"]

_CHECK_EVERY = 100


@dataclass
class Found:
    """The losses of a batch.

    Attributes:
        losses: a vector to choose from; keeping all of it gives L.
        scores: what to rank by, if that is not ``values``.
        loss: L, detached from the model.
        outputs: what the model returned.
        parts: what the recorded calls contribute.
        terms: the same, arranged by sample.
        alike: whether they add up entry by entry.
    """

    losses: Losses
    scores: Tensor | None
    loss: Tensor
    outputs: Any
    parts: list[LossPart]
    terms: list[Term]
    alike: bool


class LossFinder:
    """Find the losses behind the number that ``run`` returns.

    Args:
        unit: "sample": one loss per sample, weighted by its entries that count, so that keeping all gives L even if
            samples have different numbers of tokens. "element": one loss per entry.
        smoothing: label smoothing to add to the model's cross-entropy.
        apart: divide terms that count differently each by its own divisor over what is kept; otherwise by that of the
            whole batch.
    """

    def __init__(self, unit: str = "sample", smoothing: float = 0.0, apart: bool = False) -> None:
        self.unit, self.smoothing, self.apart = unit, smoothing, apart
        self._proven: set[Any] = set()
        self._calls = 0

    def __call__(
        self, run: Callable[[], Any], loss_of: Callable[[Any], Any], batch: int, labels: Sequence[Tensor]
    ) -> Found:
        """Return the losses of a batch of ``batch`` samples.

        Args:
            run: the model's code.
            loss_of: returns L from its result.
            labels: (B, ...), the targets.

        Raises:
            NotFound: see :class:`batchtrim.integrations._recorder.NotFound`.
        """
        with_graph = torch.is_grad_enabled()
        with Recorder(self.smoothing) as recorder:
            outputs = run()
        if self.smoothing and any(call.name != "cross_entropy" or call.ignored is None for call in recorder.calls):
            raise NotFound("label smoothing applies to cross-entropy with classes, and its loss is a different one")
        loss = loss_of(outputs)
        kinds = tuple((call.name, call.values.ndim, call.leaf.ndim) for call in recorder.calls)
        form = (kinds, batch > 1, getattr(loss, "dtype", None))
        self._calls += 1
        check = form not in self._proven or self._calls % _CHECK_EVERY == 0
        if recorder.unread and not recorder.calls:
            raise NotFound(f"it calls {' and '.join(sorted(set(recorder.unread)))}, whose losses cannot be read")
        parts = parts_of(loss, recorder.calls, check=check)
        sizes = label_sizes(labels, batch)
        rows = [rows_of(part.values, batch, sizes) for part in parts]
        if check and with_graph:
            if batch > 1:
                prove_rows(parts, rows, output_tensors(outputs, loss), labels)
            if bool(loss.isfinite()):  # NaN and inf prove nothing
                self._proven.add(form)
        terms = [Term(each, part.counted, weights_of(part, batch)) for part, each in zip(parts, rows, strict=True)]
        alike = _same_entries(parts, rows)
        losses, scores = (summed(terms, alike, self.unit), None) if self.apart else merged(terms, alike, self.unit)
        if check:
            compare(loss, losses.mean(), "the loss with everything kept")
        return Found(losses, scores, loss.detach(), outputs, parts, terms, alike)


def _same_entries(parts: list[LossPart], rows: list[Tensor]) -> bool:
    """Return True if the parts add up entry by entry: the same entries, counted alike."""
    first = parts[0]
    return len(parts) == 1 or all(
        part.weights is None
        and part.call.ignored == first.call.ignored
        and each.shape == rows[0].shape
        and (part.counted is None if first.counted is None else part.call.target is first.call.target)
        for part, each in zip(parts, rows, strict=True)
    )
