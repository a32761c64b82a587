"""One loss per sample, from any criterion.

Legend: B batch, T tokens, C classes, ... further positions (pixels, tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn  # noqa: F401  (nn for the examples)

from batchtrim._attributes import Checked, fixed
from batchtrim._by_name import by_name
from batchtrim._checks import (
    check_choice,
    check_count,
    check_criterion,
    check_flag,
    check_losses,
    check_number,
    check_positive,
    check_within,
    describe,
    without_values,
)
from batchtrim._criterion_errors import changes_when_called, joins_samples, not_its_own
from batchtrim._own_value import OwnValue
from batchtrim._transforms import batched, transforming, unwrapped
from batchtrim.criteria import Criterion, check_values, same_shape
from batchtrim.unreduced import UNITS, Losses, accumulator, flatten, losses_of

# How often to check the value of a criterion that is expensive to call again.
_CHECK_EVERY = 100

__all__ = ["UNITS", "Losses", "flatten", "focal", "per_sample", "superloss", "token_losses"]


class per_sample:
    """Wrap any criterion to return un-reduced losses: ``per_sample(criterion)(outputs, targets) -> Losses``.

    A criterion module is called with ``reduction='none'``, in its current state; a function that takes
    ``reduction`` (or a ``functools.partial`` of one, or a module whose ``forward`` does) is called with ``'none'``; any
    other callable must return un-reduced losses itself. A compiled criterion runs uncompiled.
    The criterion's reduction is remembered: trimmed with keep 1, the losses give the criterion's own value.

    * "mean": class weights and the number of counted entries are returned too, so the divisor is the criterion's own.
    * "sum": the loss is the sum over the kept entries, whatever the trimmer's scale.
    * "batchmean": a sample's loss is the sum of its entries, and the mean is over samples. Not with unit "element".
    * "none", or no reduction: as "mean".

    Args:
        criterion: ``nn.CrossEntropyLoss()``, ``F.mse_loss``, ... called as ``criterion(outputs, targets)``, or with as
            many tensors as it takes: ``per_sample(nn.TripletMarginLoss())(anchor, positive, negative)``.
        unit: what a trimmer chooses among: "sample" averages each sample's counted entries, (B, ...) to (B,);
            "element" keeps every pixel or token separate. The trimmer must have the same unit.
        ignore_index: target value that does not count; by default the criterion's own, if it has one. For any
            criterion with a target for each loss: floating-point targets too.

    Raises:
        PassUnreducedLosses: on call, if the criterion averages anyway.
        ValueError, TypeError: on call, if outputs and targets would be broadcast, ``ignore_index`` cannot be
            applied, or a criterion that is not torch's uses another divisor. The message says what to do.

    Notes:
        If nothing counts, the loss is 0, where torch's own mean is NaN. A criterion that is not torch's and has a
        reduction is called once more in every batch, as given and without a graph, to compare its value: it
        may divide by weights that matter only in some batches. On a CPU a difference is an error at once; on a device
        at the next call, so that nothing waits. If it holds more than 65,536 numbers (a network), only the first batch,
        the first with ignored targets and every hundredth are compared; in a compiled function, or if it cannot be
        copied, none is.

    Example:
        >>> criterion = per_sample(nn.CrossEntropyLoss())
        >>> criterion(torch.zeros(3, 2), torch.tensor([0, 1, 1])).values
        tensor([0.6931, 0.6931, 0.6931])
    """

    unit = Checked[str](check_choice, UNITS)
    _to_change = "Make a new per_sample, or change the criterion itself, which is read in every call."

    @by_name
    def __init__(self, criterion: Callable[..., Any], *, unit: str = "sample", ignore_index: int | None = None) -> None:
        check_criterion("criterion", criterion)
        self.unit = unit
        several = "Leave out several values with a mask: trim(losses, mask=mask)."
        if ignore_index is not None and check_number("ignore_index", ignore_index, several) != ignore_index:
            raise ValueError("expected `ignore_index` to be a number other than nan, got nan. Give a mask instead.")
        self._asked = ignore_index
        self._criterion = Criterion(criterion, ignore_index)
        # of a criterion that is not torch's: whether a batch was compared, plainly and with entries left out
        self._seen, self._calls = [False, False], 0
        self._late: tuple[Tensor, Tensor, Tensor] | None = None  # a comparison on a device, to be read later
        self._check_unit()

    @fixed
    def criterion(self) -> Callable[..., Any]:
        """The criterion without its reduction."""
        return self._criterion.call

    @fixed
    def ignore_index(self) -> int | None:
        """The target value that does not count, or None."""
        return self._criterion.ignore_index if self._asked is None else self._asked

    @fixed
    def reduction(self) -> str:
        """The criterion's own: "mean", "sum" or "batchmean"."""
        return self._criterion.reduction or "mean"

    def __call__(self, *inputs: Any, **named: Any) -> Losses:
        """Return the un-reduced losses of ``(outputs, targets)``, or of what the criterion takes, in its order."""
        if named:
            raise TypeError(
                f"expected what {self._criterion.name} takes in its order, without names, got {sorted(named)}. What is "
                "the same in every batch can be bound by name: per_sample(functools.partial(criterion, weight=w))."
            )
        criterion = self._criterion
        if not torch.compiler.is_compiling():
            criterion.refresh()
        reduction = self._check_unit()
        own = OwnValue(criterion.given, inputs) if self._to_compare() else None
        values = criterion(*inputs)
        if not criterion.classes:  # cross-entropy is always a dense tensor of floating point
            check_losses(values, "criterion(outputs, targets)", allow_empty=True)
        check_values(criterion, values, inputs, self.unit)
        targets = criterion.targets(inputs)
        mask = self._mask(values, targets)
        weights = None if targets is None else criterion.weights(targets, mask, values)
        summed = "sum" if reduction == "sum" else "mean"
        if self.unit == "sample" and values.ndim > 1:
            losses = Losses(values, mask, weights, reduction="mean" if reduction == "mean" else "sum")
            losses = replace(flatten(losses, "sample"), unit="sample", reduction=summed)
        else:
            losses = losses_of(values, mask, weights, self.unit, summed)
        if own is not None:
            self._compare(losses, mask, own, values)
        return losses

    def _check_unit(self) -> str:
        """Return the reduction, which may have changed since the last call."""
        reduction = self.reduction
        if reduction == "batchmean" and self.unit == "element":
            raise ValueError(
                "expected `reduction` 'mean' or 'sum' with unit='element', got 'batchmean', which divides by the "
                "number of samples. Choose samples (unit='sample'), or make the criterion with reduction='mean'."
            )
        return reduction

    def _mask(self, values: Tensor, targets: Tensor | None) -> Tensor | None:
        ignored = self.ignore_index
        if ignored is None:
            return None
        if targets is not None and targets.shape == values.shape:
            return targets != ignored
        if targets is not None and same_shape(targets, values):
            return (targets != ignored).reshape(values.shape)
        if self._asked is not None:
            got = "no targets" if targets is None else f"targets of shape {tuple(targets.shape)}"
            raise ValueError(
                f"expected a target for each loss, of shape {tuple(values.shape)}, to apply ignore_index="
                f"{ignored} to, got {got}. Mask the losses yourself: trim(losses, mask=mask)."
            )
        return None

    def _to_compare(self) -> bool:
        """Return True if this call should compare the criterion's own value."""
        if torch.compiler.is_compiling() or not self._criterion.foreign or self._criterion.reduction is None:
            return False
        self._calls += 1
        return not all(self._seen) or self._calls % _CHECK_EVERY == 0 or self._criterion.light

    def _compare(self, losses: Losses, mask: Tensor | None, own_value: OwnValue, values: Tensor) -> None:
        """Compare the criterion's own value with the mean of its un-reduced losses."""
        late, self._late = self._late, None
        if late is not None and bool(late[0]):
            raise not_its_own(self._criterion.given, *late[1:])
        if transforming() and batched(losses.values):
            if not self._seen[0]:  # nothing can be read here
                unwrapped(losses.values, f"the first check of {self._criterion.name}, whose divisor is unknown")
            return
        if losses.values.numel() == 0 or without_values(losses.values) or (own := own_value()) is None:
            return
        if not self._seen[0] and not own_value.repeats(self._criterion, values):
            raise changes_when_called(self._criterion.name)
        if not self._seen[0] and self.unit == "sample" and (size := len(losses.values)) > 1:
            fewer = own_value.of_fewer(Criterion, size)
            if fewer is not None and len(fewer) == size:
                raise joins_samples(self._criterion.name, size, fewer)
        with torch.no_grad():
            total = accumulator(losses.values)
            ours, size = losses.mean().to(total), replace(losses, values=losses.values.abs()).mean().to(total)
            half = losses.values.dtype in (torch.float16, torch.bfloat16)
            within = 3e-2 * size if half else 1e-3 * own.to(total).abs() + 1e-5 * size
            apart = own.isfinite() & ((own.to(total) - ours).abs() > within)
            if mask is not None and self._criterion.ignore_index != self.ignore_index:
                apart &= mask.all()  # it does not know which targets are ignored
        if not own.is_cpu and not transforming():
            self._late = (apart, own, ours)
        elif bool(apart):
            raise not_its_own(self._criterion.given, own, ours)
        if not all(self._seen) and bool(own.isfinite()):
            left_out = mask is not None and not bool(mask.all())
            self._seen = [True, True] if mask is None else [True, self._seen[1] or left_out]

    def __repr__(self) -> str:
        return f"per_sample({self.criterion!r}, unit={self.unit!r}, ignore_index={self.ignore_index!r})"


@by_name
def token_losses(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, shift: bool = False) -> Losses:
    """Return the cross-entropy of every token, padding masked.

    Args:
        logits: (B, T, C).
        labels: int64 (B, T).
        ignore_index: label that does not count (padding, prompt).
        shift: for causal language models, whose logits at t predict the label at t + 1: the result is (B, T - 1).

    Returns:
        Losses with ``values`` (B, T), in at least float32, and ``mask`` (B, T).
    """
    _check_tokens(logits, labels)
    ignore_index = check_count("ignore_index", ignore_index, minimum=-(2**63))
    if check_flag("shift", shift):
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits = logits.transpose(1, 2).to(torch.promote_types(logits.dtype, torch.float32))
    values = F.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    return Losses(values, labels != ignore_index)


def _check_tokens(logits: Any, labels: Any) -> None:
    """Check the arguments of the tokens' cross-entropy: torch's own errors name other dimensions."""
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.dtype.is_floating_point:
        raise TypeError(
            f"expected `logits` to be floating point of shape (B, T, C), got {describe(logits)}. "
            "A model of the transformers library returns them as output.logits."
        )
    if not isinstance(labels, Tensor) or labels.shape != logits.shape[:2] or labels.dtype.is_floating_point:
        raise TypeError(
            f"expected `labels` to be token ids of shape {tuple(logits.shape[:2])}, got {describe(labels)}. "
            "Give both unshifted, with shift=True, if the logits at t predict the label at t + 1."
        )


def focal(losses: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the focal loss of cross-entropy losses: ``(1 - p_i)^gamma * l_i`` with ``p_i = exp(-l_i)``.

    Source: arXiv 1708.02002. It weights instead of selecting; gradient flows through the factor, as in the source.

    Args:
        losses: (B,) or (B, ...), cross-entropy without label smoothing.
        gamma: >= 0; 0 changes nothing.

    Example:
        >>> focal(torch.tensor([0.6931472]))
        tensor([0.1733])
    """
    check_losses(losses, allow_empty=True)
    if not check_number("gamma", gamma) >= 0:  # NaN fails this too
        raise ValueError(f"expected `gamma` to be at least 0, got {gamma:g}. 0 is plain cross-entropy.")
    check_within("gamma", gamma, losses.dtype)
    if not gamma:
        return losses
    missed = -torch.expm1(-losses)
    if gamma < 1.0:  # the power's derivative is infinite at 0, where that of the focal loss is 0
        certain = missed == 0.0
        weighed = torch.where(certain, 1.0, missed) ** gamma * losses
        return torch.where(certain, losses * 0.0, weighed)
    return missed**gamma * losses


def superloss(losses: Tensor, tau: float | Tensor, lam: float = 1.0) -> Tensor:
    """Return the SuperLoss ``(l - tau) * s + lam * log(s)^2`` with ``s = exp(-W(max(-2/e, (l - tau)/lam) / 2))``.

    Source: Castells et al., NeurIPS 2020. It gives hard samples less weight, the opposite of trimming. W is the
    principal branch of Lambert's function; s is a constant in backward, which is exact since s minimises the
    expression.

    Args:
        losses: (B,).
        tau: the loss that separates easy from hard: log(C), or a running mean.
        lam: > 0; the larger, the closer all weights are to 1.

    Example:
        >>> superloss(torch.tensor([1.0]), tau=1.0)
        tensor([0.])
    """
    check_losses(losses, allow_empty=True)
    if isinstance(tau, Tensor):
        _check_spreads("tau", tau, losses)
    else:
        tau = check_number("tau", tau)
        if tau != tau:
            raise ValueError("expected `tau` to be a number to compare losses with, got nan.")
        check_within("tau", tau, losses.dtype)
    check_positive("lam", lam)
    check_within("lam", lam, losses.dtype)
    with torch.no_grad():
        ratio = ((losses.double() - tau) / lam).clamp(min=-2.0 / torch.e) / 2.0
        sigma = torch.exp(-lambert_w(ratio)).to(losses.dtype)
    return (losses - tau) * sigma + lam * torch.log(sigma) ** 2


def _check_spreads(name: str, value: Tensor, losses: Tensor) -> None:
    """Check that a tensor broadcasts to the losses' shape, so that the losses are not broadcast to a larger one."""
    try:
        value.expand_as(losses)
    except RuntimeError:
        raise ValueError(
            f"expected `{name}` to be a number or of the shape of `losses`, {tuple(losses.shape)}, "
            f"got {describe(value)}."
        ) from None


def lambert_w(z: Tensor) -> Tensor:
    """Return Lambert's W, principal branch: ``W e^W = z`` for z >= -1/e, by Halley steps in float64.

    Starts from the branch-point series near -1/e and from log(1 + z) elsewhere. At -1/e itself it is -1.
    """
    z = z.double().clamp(min=-1.0 / torch.e)
    root = torch.sqrt((2.0 * (torch.e * z + 1.0)).clamp(min=0.0))
    w = torch.where(z < -0.25, -1.0 + root - root**2 / 3.0 + 11.0 / 72.0 * root**3, torch.log1p(z.clamp(min=-0.3)))
    for _ in range(6):
        e = torch.exp(w)
        f = w * e - z
        slope = e * (w + 1.0) - (w + 2.0) * f / (2.0 * w + 2.0)
        move = torch.where((w + 1.0).abs() < 1e-6, torch.zeros_like(w), f / slope)
        w = w - move
    return w
