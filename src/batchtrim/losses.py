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

from batchtrim._checks import check_choice, check_losses, check_number, check_positive, check_within, describe
from batchtrim.criteria import Criterion, Generators, check_values, not_its_own, same_shape
from batchtrim.unreduced import UNITS, Losses, flatten

__all__ = ["UNITS", "Losses", "flatten", "focal", "per_sample", "superloss", "token_losses"]


class per_sample:
    """Any criterion, without its reduction: ``per_sample(criterion)(outputs, targets) -> Losses``.

    A criterion module is copied with ``reduction='none'``; a function that takes ``reduction`` (or a
    ``functools.partial`` of one, or a module whose ``forward`` does) is called with ``'none'``; any other callable is
    expected to return un-reduced losses itself. A compiled criterion runs as the Python that it was. The reduction that
    was asked for is kept: trimmed with keep 1, the losses give the criterion's own value.

    * "mean": class weights and the number of entries that count go along, so the divisor is the criterion's own.
    * "sum": the loss is the sum over what is kept, whatever the trimmer's scale.
    * "batchmean": a sample's loss is the sum of its entries, and the mean is over samples. Not with unit "element".
    * "none", or no reduction: as "mean".

    Args:
        criterion: ``nn.CrossEntropyLoss()``, ``F.mse_loss``, ... called as ``criterion(outputs, targets)``, or with as
            many tensors as it takes: ``per_sample(nn.TripletMarginLoss())(anchor, positive, negative)``.
        unit: what a trimmer is to choose among: "sample" averages each sample's counted entries, (B, ...) to (B,);
            "element" leaves every pixel or token on its own. The trimmer must have the same.
        ignore_index: target value that does not count; by default the criterion's own, where it has one. For any
            criterion with a target for each loss: floating-point targets too.

    Raises:
        PassUnreducedLosses: on call, where the criterion averages all the same.
        ValueError, TypeError: on call, where outputs and targets would be broadcast, ``ignore_index`` cannot be
            applied, or a criterion that is not torch's divides in a way of its own. The message holds the way out.

    Notes:
        Where nothing counts the loss is 0; torch's own mean is NaN there. A criterion that is not torch's and has a
        reduction is called once more, as it was given, on the first batch (and on the first with ignored targets), and
        its value compared: one sync of the device each.

    Example:
        >>> criterion = per_sample(nn.CrossEntropyLoss())
        >>> criterion(torch.zeros(3, 2), torch.tensor([0, 1, 1])).values
        tensor([0.6931, 0.6931, 0.6931])
    """

    def __init__(self, criterion: Callable[..., Any], *, unit: str = "sample", ignore_index: int | None = None) -> None:
        if not callable(criterion):
            raise TypeError(f"expected `criterion` to be callable, got {describe(criterion)}.")
        self.unit = check_choice("unit", unit, UNITS)
        if ignore_index is not None and check_number("ignore_index", ignore_index) != ignore_index:
            raise ValueError("expected `ignore_index` to be a number that equals itself, got nan. Give a mask instead.")
        self._asked = ignore_index is not None
        self._criterion = Criterion(criterion, ignore_index)
        self.criterion = self._criterion.call
        self.ignore_index = self._criterion.ignore_index if ignore_index is None else ignore_index
        self.reduction = self._criterion.reduction or "mean"
        if self.reduction == "batchmean" and unit == "element":
            raise ValueError(
                "expected `reduction` 'mean' or 'sum' with unit='element', got 'batchmean', which divides by the "
                "number of samples. Choose samples (unit='sample'), or make the criterion with reduction='mean'."
            )
        # whether the mean of a criterion that is not torch's was compared: plainly, and with entries left out
        self._proven = [not self._criterion.foreign or self._criterion.reduction is None] * 2

    def __call__(self, *inputs: Any) -> Losses:
        """Return the un-reduced losses of a batch, ``(outputs, targets)`` or whatever the criterion takes."""
        proving = not all(self._proven) and not torch.compiler.is_compiling()
        generators = Generators(inputs) if proving else None
        values = self._criterion(*inputs)
        check_losses(values, "criterion(outputs, targets)", allow_empty=True)
        check_values(self._criterion, values, inputs, self.unit)
        targets = inputs[1] if len(inputs) == 2 and isinstance(inputs[1], Tensor) else None
        mask = self._mask(values, targets)
        weights = None if targets is None else self._criterion.weights(targets, mask, values)
        losses = Losses(values, mask, weights, reduction="mean" if self.reduction == "mean" else "sum")
        if self.unit == "sample":
            losses = flatten(losses, "sample")
        reduction = "sum" if self.reduction == "sum" else "mean"
        losses = replace(losses, unit=self.unit, reduction=reduction)
        if generators is not None:
            self._prove(losses, mask, inputs, generators)
        return losses

    def _mask(self, values: Tensor, targets: Tensor | None) -> Tensor | None:
        if self.ignore_index is None:
            return None
        if targets is not None and same_shape(targets, values):
            return (targets != self.ignore_index).reshape(values.shape)
        if self._asked:
            got = "no targets" if targets is None else f"targets of shape {tuple(targets.shape)}"
            raise ValueError(
                f"expected a target for each loss, of shape {tuple(values.shape)}, to apply ignore_index="
                f"{self.ignore_index} to, got {got}. Mask the losses yourself: trim(losses, mask=mask)."
            )
        return None

    def _prove(self, losses: Losses, mask: Tensor | None, inputs: tuple[Any, ...], generators: Generators) -> None:
        """Compare the criterion's own value, once plainly and once where entries are left out."""
        masked = mask is not None and not bool(mask.all())
        if self._proven[masked] or losses.values.numel() == 0:
            return
        own, ours = self._criterion.own_value(inputs, generators), losses.detach().mean()
        if own is None or not own.isfinite():
            return
        half = losses.values.dtype in (torch.float16, torch.bfloat16)
        if not torch.allclose(own.double(), ours.double(), rtol=3e-2 if half else 1e-3, atol=1e-6):
            raise not_its_own(self._criterion.name, own, ours)
        self._proven[masked] = True
        if mask is None:
            self._proven[True] = True

    def __repr__(self) -> str:
        return f"per_sample({self.criterion!r}, unit={self.unit!r}, ignore_index={self.ignore_index!r})"


def token_losses(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, shift: bool = False) -> Losses:
    """Return the cross-entropy of every token, padding masked.

    Args:
        logits: (B, T, C). labels: int64 (B, T).
        ignore_index: label that does not count (padding, prompt).
        shift: for causal language models, whose logits at t predict the label at t + 1: the result is (B, T - 1).

    Returns:
        Losses with ``values`` (B, T) in fp32 and ``mask`` (B, T).
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    values = F.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none", ignore_index=ignore_index)
    return Losses(values, labels != ignore_index)


def focal(losses: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the focal loss of cross-entropy losses: ``(1 - p_i)^gamma * l_i`` with ``p_i = exp(-l_i)``.

    Source: arXiv 1708.02002. Weights instead of selection; gradient flows through the factor, as in the source.

    Args:
        losses: (B,) or (B, ...), cross-entropy without label smoothing. gamma: >= 0; 0 changes nothing.

    Example:
        >>> focal(torch.tensor([0.6931472]))
        tensor([0.1733])
    """
    check_losses(losses, allow_empty=True)
    if check_number("gamma", gamma) < 0:
        raise ValueError(f"expected `gamma` to be at least 0, got {gamma:g}. 0 is plain cross-entropy.")
    check_within("gamma", gamma, losses.dtype)
    return (-torch.expm1(-losses)) ** gamma * losses if gamma else losses


def superloss(losses: Tensor, tau: float | Tensor, lam: float = 1.0) -> Tensor:
    """Return the SuperLoss ``(l - tau) * s + lam * log(s)^2`` with ``s = exp(-W(max(-2/e, (l - tau)/lam) / 2))``.

    Source: Castells et al., NeurIPS 2020. Weighs hard samples down, the opposite of trimming. W is the principal
    branch of Lambert's function; s is a constant in backward, which is exact since s minimises the expression.

    Args:
        losses: (B,). tau: expected loss that tells easy from hard: log(C), or a running mean.
        lam: > 0; the larger, the closer all weights are to 1.

    Example:
        >>> superloss(torch.tensor([1.0]), tau=1.0)
        tensor([0.])
    """
    check_losses(losses, allow_empty=True)
    if not isinstance(tau, Tensor):
        tau = check_number("tau", tau)
        check_within("tau", tau, losses.dtype)
    check_positive("lam", lam)
    check_within("lam", lam, losses.dtype)
    with torch.no_grad():
        ratio = ((losses.double() - tau) / lam).clamp(min=-2.0 / torch.e) / 2.0
        sigma = torch.exp(-lambert_w(ratio)).to(losses.dtype)
    return (losses - tau) * sigma + lam * torch.log(sigma) ** 2


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
