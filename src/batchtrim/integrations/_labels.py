"""Find the labels of a Hugging Face batch, and its weight in an optimizer step.

Legend: B batch, T tokens, M micro-batches in a window (one optimizer step), R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchtrim.distributed import sum_over_ranks, world_size
from batchtrim.integrations._loss_finder import Found
from batchtrim.integrations._sample_rows import items_of, shifts_of
from batchtrim.unreduced import Losses, counted, divisors, flatten

__all__ = [
    "Counting",
    "check_own",
    "count",
    "countings_of",
    "countings_of_own",
    "labels_of",
    "loss_of",
    "named_labels",
    "plain_sums",
    "shares",
    "tensors_in",
    "without_labels",
]

_SPANS = ("start_positions", "end_positions")


def loss_of(outputs: Any) -> Any:
    """Return the loss from a model's outputs, as the Trainer does."""
    return outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]


def labels_of(inputs: Mapping[str, Any], names: Sequence[str] = ()) -> list[Tensor]:
    """Return the labels of a batch: entries whose name is among ``names`` or says so; without any, all tensors."""
    labels = named_labels(inputs, names)
    return list(labels.values()) or [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]


def named_labels(inputs: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the labels of a batch by name: entries whose name is among ``names`` or says so."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    return {name: value for name, value in tensors.items() if name in names or "label" in name or name in _SPANS}


def without_labels(inputs: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """Return what a model gets beside its labels, and the labels: those among ``names`` if none are called "labels".

    Several are a tuple in the order of ``names``, as the Trainer hands them to ``compute_metrics``; none are None.
    """
    taken = ["labels"] if "labels" in inputs else [name for name in names if name in inputs]
    labels = tuple(inputs[name] for name in taken)
    rest = {name: value for name, value in inputs.items() if name not in taken}
    return rest, labels if len(labels) > 1 else next(iter(labels), None)


@dataclass(frozen=True)
class Counting:
    """The way to count the losses of a batch to select from, by its labels.

    Attributes:
        ignored: the label that does not count; None if every sample counts as one.
        shift: how many labels at the start of a sample are never predicted.
        entries: False counts a sample as one entry.
    """

    ignored: int | None = None
    shift: int = 0
    entries: bool = True

    def __call__(self, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Tensor:
        """Return 0-d int64."""
        labels = labels_of(batch, names)
        if not labels:
            raise ValueError(f"expected batches with a tensor `labels`, got keys {sorted(batch)}. Rename yours.")
        first = labels[0]
        if self.ignored is None or first.is_floating_point():
            return torch.tensor(len(first), device=first.device)
        counted = (first != self.ignored).reshape(len(first), -1)[:, self.shift if first.ndim > 1 else 0 :]
        return counted.sum() if self.entries else counted.any(1).sum()


def countings_of(found: Found, labels: Sequence[Tensor]) -> list[Counting]:
    """Return how the batches of a model may be counted, from the losses found in one of them."""
    call = found.parts[0].call
    shifts = shifts_of(call, labels[0])
    if call.counted is None or found.terms[0].weights is not None or len(found.parts) > 1 or not shifts:
        return [Counting()]
    return [Counting(call.ignored, shift) for shift in shifts]


def countings_of_own(losses: Losses, batch: Mapping[str, Any], unit: str, names: Sequence[str]) -> list[Counting]:
    """Return how batches may be counted if the losses are not the model's: their number shows a shift.

    Samples whose loss is the mean of several entries count by these, as in the loss of one batch.
    """
    several = losses.counts is not None or losses.values.numel() > len(losses.values)
    entries = unit == "element" or (several and losses.weights is None)
    there = torch.ones_like(losses.values) if losses.counts is None else losses.counts
    number = float((there if losses.mask is None else there[losses.mask]).sum())
    found = [shift for shift in (0, 1) if int(Counting(-100, shift)(batch, names)) == number]
    return [Counting(-100, shift, entries) for shift in found] or [Counting(-100, entries=unit == "element")]


def count(
    batches: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    countings: list[Counting],
    prove: Callable[[Mapping[str, Any]], list[Counting]] | None,
) -> tuple[Tensor, list[Counting]]:
    """Return each batch's count, (M,), and the ways to count that are left.

    Args:
        names: of the labels.
        countings: the ways to count that fit all batches seen so far.
        prove: returns those that fit a batch, for a batch in which two of them differ; None if no forward may run.
    """
    for batch in batches if prove is not None else ():
        if len({int(each(batch, names)) for each in countings}) > 1:
            fit = prove(batch)  # pyright: ignore[reportOptionalCall]
            countings = [each for each in countings if each in fit] or fit
    return torch.stack([countings[0](batch, names) for batch in batches]), countings


def check_own(losses: Losses, labels: Sequence[Tensor], unit: str) -> None:
    """Refuse losses of the user's function that do not match the samples or labels to choose from.

    Raises:
        ValueError: there is not one per sample, or some belong to ignored labels.
    """
    values = losses.values
    batch = len(labels[0]) if labels else len(values)
    recipe = "batchtrim.token_losses(outputs.logits, labels) gives them (shift=True for a causal model)."
    if unit == "sample" and len(values) != batch:
        raise ValueError(
            f"expected `per_sample_loss` to return losses whose first dimension is the batch, {batch} samples, got "
            f"shape {tuple(values.shape)}. Of tokens return (samples, tokens): {recipe}"
        )
    several = values.numel() > batch and losses.mask is None and losses.weights is None and losses.counts is None
    if several and labels and not labels[0].is_floating_point() and bool((labels[0] == -100).any()):
        raise ValueError(
            "expected `per_sample_loss` to mask the losses of labels that are -100, got no mask. "
            f"Return batchtrim.Losses(values, mask): {recipe}"
        )


def plain_sums(losses: Losses) -> Tensor:
    """Return (t, 2) float64, t terms: the sum of all losses that count, and its divisor, their number or weights."""
    if losses.terms:
        return torch.cat([plain_sums(term) for term in losses.terms])
    flat = counted(flatten(losses, losses.unit or "element"))
    divisor = divisors(flat)
    counts = torch.ones_like(flat.values) if divisor is None else divisor
    values = flat.values if flat.counts is None else flat.values * flat.counts
    if flat.mask is not None:
        values, counts = values[flat.mask], counts[flat.mask]
    return torch.stack([values.detach().double().sum(), counts.double().sum()])[None]


def shares(counts: Tensor, over: str, scope: str, across: bool) -> list[Tensor]:
    """Return the factor of each micro-batch's loss: the Trainer sums the losses and averages over R ranks.

    ``R * n_m / N``, n_m of N in the windows of all ranks. With scope "global", whose loss already covers all ranks,
    ``sum_r(n_rm) / N``. If the choice is made from the whole window, its sum replaces n_m.

    Args:
        counts: (M,), n_m: what :class:`Counting` returns for this rank's micro-batches.
        over: "micro" or "window".
        across: False gives every rank the same weight, whatever it holds: N is then its own, and R is 1.

    Raises:
        RanksDisagree: M differs between ranks that choose together, or a rank does not arrive.
    """
    micro_batches = len(counts)
    if over == "window":
        counts = counts.sum()[None]
    if scope == "global":
        counts = sum_over_ranks(counts, "number of micro-batches")
    total, ranks = counts.sum()[None], 1
    if scope == "local" and across:
        total, ranks = sum_over_ranks(total, "number of totals"), world_size()
    return list((ranks * counts / total.clamp(min=1)).expand(micro_batches))  # with nothing to train on, 0 and not NaN


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested mappings, lists and tuples that have a dimension."""
    if isinstance(value, Tensor):
        return [value] if value.ndim else []
    return [tensor for item in items_of(value) for tensor in tensors_in(item)]
