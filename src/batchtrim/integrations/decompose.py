"""From the one number that a model or a training step computes to one loss a sample, proven.

:class:`LossFinder` runs the model's own code under :class:`batchtrim.integrations.intercept.Recorder`, so the loss is
what that code computes and nothing is guessed from names, configurations or the form of the labels. The first time it
sees a kind of batch, and now and then after that, it checks that the losses add up to the model's own loss, and that
each lies in the row of its sample. What does not is an error, and never another loss.

Legend: B batch, t entries a sample, L the model's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchtrim.integrations.intercept import Call, NotFound, Part, Recorder, parts_of
from batchtrim.losses import Losses

__all__ = ["Found", "LossFinder", "shift_of"]

_CHECK_EVERY = 100


@dataclass
class Found:
    """The losses of a batch.

    Attributes:
        losses: a vector of what there is to choose from; ``sum(values) / sum(weights)`` over what its mask counts is L.
        scores: what to rank by where it is not ``values``: a sample's mean, where samples count different numbers.
        loss: L, detached. outputs: what the model returned. call: the first of the recorded calls, of ``terms``.
        entries: (B,), how many entries of each sample count; None where that is one and the same number.
    """

    losses: Losses
    scores: Tensor | None
    loss: Tensor
    outputs: Any
    call: Call
    terms: int
    entries: Tensor | None

    def scaled(self, mean_entries: Tensor | float) -> Losses:
        """The losses with a sample's weight 1 on average, so that a divisor that counts samples is right as well."""
        if self.entries is None:
            return self.losses
        values, mask, weights = self.losses
        assert weights is not None
        return Losses(values / mean_entries, mask, weights / mean_entries)


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
        form = (kinds, batch > 1, loss is not None and getattr(loss, "dtype", None))
        self._calls += 1
        check = form not in self._proven or self._calls % _CHECK_EVERY == 0
        parts = parts_of(loss, recorder.calls, check=check)
        sizes = label_sizes(labels, batch)
        rows = [_rows(part.values, batch, sizes) for part in parts]
        if check and with_graph:
            if batch > 1:
                _prove_rows(parts, rows, output_tensors(outputs, loss), labels)
            self._proven.add(form)
        losses, scores, entries = _merged(parts, rows, self.unit)
        return Found(losses, scores, loss.detach(), outputs, parts[0].call, len(parts), entries)


def label_sizes(labels: Iterable[Tensor], batch: int) -> set[int]:
    """Return how many entries a sample may have: as many as labels, or one fewer where they are shifted; or one."""
    whole = {tensor.numel() // batch for tensor in labels if tensor.ndim and tensor.shape[0] == batch}
    return whole | {size - 1 for size in whole if size > 1} | {1}


def output_tensors(outputs: Any, loss: Any) -> list[Tensor]:
    """The tensors with a graph that a model returned, but for its loss."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (tuple, list)) else ()
    tensors = [each for value in values for each in (value if isinstance(value, (tuple, list)) else (value,))]
    return [each for each in tensors if isinstance(each, Tensor) and each.grad_fn is not None and each is not loss]


def _rows(values: Tensor, batch: int, sizes: set[int]) -> Tensor:
    """(B, t). A flat vector is B times as many entries as the labels have: with some left out, none could be placed."""
    each, rest = divmod(values.numel(), batch)
    whole = values.ndim > 2 and values.shape[0] == batch
    if batch == 1 or (not rest and (each in sizes or whole or _flat_classes(values, batch, sizes))):
        return values.reshape(batch, -1)
    raise NotFound(
        f"its {values.numel()} losses cannot be told apart by sample: the batch has {batch} samples, "
        f"with {' or '.join(map(str, sorted(sizes)))} labels each"
    )


def _flat_classes(values: Tensor, batch: int, sizes: set[int]) -> bool:
    """(B * t, C): several losses of each of a sample's labels."""
    return values.ndim == 2 and not values.shape[0] % batch and values.shape[0] // batch in sizes


def _prove_rows(parts: list[Part], rows: list[Tensor], outputs: list[Tensor], labels: Sequence[Tensor]) -> None:
    """Each row is of its sample, told by the gradient of the outputs; where none reaches them, by the labels."""
    batch = len(rows[0])
    outputs = [each for each in outputs if each.ndim and each.shape[0] == batch]
    for part, each in zip(parts, rows, strict=True):
        if not (_reaches_its_rows(each, outputs) or any(shift_of(part.call, label) is not None for label in labels)):
            raise NotFound("neither an output that it returns nor its labels show which loss is of which sample")


def _reaches_its_rows(rows: Tensor, outputs: list[Tensor]) -> bool:
    """Weighing the rows weighs the gradient of each output's row alike. False where there is no gradient."""
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
            raise NotFound("its losses do not lie in the order of the samples")
    return reached


def shift_of(call: Call, label: Tensor) -> int | None:
    """Return 0 where a call's targets are these labels, sample by sample, 1 where they are the next ones, else None."""
    batch = len(label)
    if not batch or call.target.numel() % batch:
        return None
    target = call.target.detach().reshape(batch, -1)
    label = label.reshape(batch, -1).to(target.device)
    if torch.equal(target, label):
        return 0
    length = min(target.shape[1], label.shape[1] - 1)
    shifted = length > 0 and target.shape[1] - length <= 1 and torch.equal(target[:, :length], label[:, 1 : length + 1])
    return 1 if shifted else None


def _merged(parts: list[Part], rows: list[Tensor], unit: str) -> tuple[Losses, Tensor | None, Tensor | None]:
    """Losses, scores and entries of :class:`Found`, from all parts."""
    first = parts[0]
    alike = len(parts) == 1 or all(
        part.weights is None
        and each.shape == rows[0].shape
        and (part.counted is None if first.counted is None else part.call.target is first.call.target)
        for part, each in zip(parts, rows, strict=True)
    )
    if alike:
        values = torch.stack(rows).sum(0) if len(rows) > 1 else rows[0]
        return _of_one(values, first, unit)
    if unit == "element" and any(each.shape[1] > 1 for each in rows):
        raise NotFound("it has several terms, of different entries, and `unit` is 'element'")
    entries = [_entries(part, each) for part, each in zip(parts, rows, strict=True)]
    counted = torch.stack([each > 0 for each in entries]).any(0)
    shares = torch.stack([each.sum(1) / part.divisor for part, each in zip(parts, rows, strict=True)]).sum(0)
    # what each sample adds to L; ranked by what its loss would be alone
    alone = torch.stack([each.detach().sum(1) / _not_zero(n) for each, n in zip(rows, entries, strict=True)]).sum(0)
    return Losses(shares * counted.sum(), counted), alone, None


def _entries(part: Part, rows: Tensor) -> Tensor:
    """(B,): what a sample's mean divides by."""
    counts = part.counted if part.weights is None else part.weights
    counts = torch.ones_like(rows) if counts is None else counts
    return counts.reshape(rows.shape).sum(1).to(rows.dtype)


def _not_zero(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.ones_like(values))


def _of_one(values: Tensor, part: Part, unit: str) -> tuple[Losses, Tensor | None, Tensor | None]:
    counted = None if part.counted is None else part.counted.reshape(values.shape)
    weights = None if part.weights is None else part.weights.reshape(values.shape)
    if unit == "element" or values.shape[1] == 1:
        flat = (None if each is None else each.reshape(-1) for each in (values, counted, weights))
        return Losses(*flat), None, None  # type: ignore[arg-type]
    if counted is None:
        return Losses(values.mean(1)), None, None
    entries = _entries(part, values)
    summed = torch.where(counted, values, torch.zeros_like(values)).sum(1)
    mean = summed.detach() / _not_zero(entries)
    return Losses(summed, entries > 0, entries), mean, entries
