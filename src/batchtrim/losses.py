"""One loss per sample, from any criterion.

Legend: B batch, T tokens, C classes, ... further positions (pixels, tokens).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchtrim._checks import check_choice, check_losses, check_number, check_positive, check_within, describe
from batchtrim.errors import PassUnreducedLosses

__all__ = ["UNITS", "Losses", "flatten", "focal", "per_sample", "superloss", "token_losses"]

UNITS = ("sample", "element")


class Losses(NamedTuple):
    """Un-reduced losses and what travels with them. A :class:`batchtrim.Trimmer` takes it in place of a tensor.

    Attributes:
        values: (B,) or (B, ...), with a graph.
        mask: bool, shape of ``values``, True where an entry counts; None where all do.
        weights: shape of ``values``: weights already multiplied into ``values`` (class weights), whose sum the
            criterion's own mean divides by; None where there are none.
    """

    values: Tensor
    mask: Tensor | None = None
    weights: Tensor | None = None

    def detach(self) -> Losses:
        """The same without a graph."""
        return Losses(*(None if part is None else part.detach() for part in self))  # type: ignore[arg-type]


class per_sample:
    """Any criterion, without its reduction: ``per_sample(criterion)(outputs, targets) -> Losses``.

    A criterion module is copied with ``reduction='none'``; a function that takes ``reduction`` is called with
    ``'none'``; any other callable is expected to return un-reduced losses itself. Class weights are told apart, so that
    keeping everything equals the criterion's own weighted mean. Ignored targets are masked.

    Args:
        criterion: ``nn.CrossEntropyLoss()``, ``F.mse_loss``, ... called as ``criterion(outputs, targets)``.
        unit: what a trimmer is to choose among: "sample" averages each sample's counted entries, (B, ...) to (B,);
            "element" leaves every pixel or token on its own.
        ignore_index: target value that does not count; by default the criterion's own, where it has one.

    Raises:
        PassUnreducedLosses: on call, where the criterion averages all the same.

    Example:
        >>> criterion = per_sample(nn.CrossEntropyLoss())
        >>> criterion(torch.zeros(3, 2), torch.tensor([0, 1, 1])).values
        tensor([0.6931, 0.6931, 0.6931])
    """

    def __init__(
        self, criterion: Callable[..., Tensor], *, unit: str = "sample", ignore_index: int | None = None
    ) -> None:
        if not callable(criterion):
            raise TypeError(f"expected `criterion` to be callable, got {describe(criterion)}.")
        self.unit = check_choice("unit", unit, UNITS)
        self.ignore_index = getattr(criterion, "ignore_index", None) if ignore_index is None else ignore_index
        self.criterion = _unreduced(criterion)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Losses:
        values = self.criterion(outputs, targets)
        if isinstance(values, Tensor) and values.ndim == 0:
            raise PassUnreducedLosses(
                f"expected {describe(self.criterion)} to return one loss per sample, got (). "
                "It averages by itself and takes no `reduction`: give a criterion that can return un-reduced losses."
            )
        check_losses(values, "criterion(outputs, targets)", allow_empty=True)
        mask = None
        class_targets = targets.shape == values.shape and not targets.dtype.is_floating_point
        if self.ignore_index is not None and class_targets:
            mask = targets != self.ignore_index
        losses = Losses(values, mask, self._class_weights(values, targets, mask) if class_targets else None)
        return flatten(losses, "sample") if self.unit == "sample" else losses

    def _class_weights(self, values: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor | None:
        weight = getattr(self.criterion, "weight", None)
        if weight is None or not isinstance(self.criterion, (nn.CrossEntropyLoss, nn.NLLLoss)):
            return None
        known = targets if mask is None else torch.where(mask, targets, torch.zeros_like(targets))
        weights = weight.to(values.dtype)[known]
        return weights if mask is None else torch.where(mask, weights, torch.zeros_like(weights))

    def __repr__(self) -> str:
        return f"per_sample({self.criterion!r}, unit={self.unit!r}, ignore_index={self.ignore_index!r})"


def token_losses(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, shift: bool = False) -> Losses:
    """Cross-entropy of every token, padding masked.

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


def flatten(losses: Losses, unit: str) -> Losses:
    """(B, ...) losses as the vector a rule chooses from.

    sample:  ``l_i = sum_j(m_ij * l_ij) / sum_j(m_ij)`` over the positions j that count (mean, not sum: a longer sample
             is no harder for its length), (B,); a sample of which nothing counts is masked out. With class weights
             the mean over positions is weighted by them.
    element: every position on its own, (B * ...,).
    """
    values, mask, weights = losses
    if values.ndim == 1:
        return losses
    if unit == "element":
        return Losses(*(None if part is None else part.reshape(-1) for part in losses))  # type: ignore[arg-type]
    values = values.flatten(1)
    if weights is not None:
        weights = weights.flatten(1)
        counted = mask.flatten(1).any(1) if mask is not None else None
        return Losses(values.sum(1) / weights.sum(1).clamp(min=torch.finfo(weights.dtype).tiny), counted)
    if mask is None:
        return Losses(values.mean(1))
    mask = mask.flatten(1)
    count = mask.sum(1)
    summed = torch.where(mask, values, torch.zeros_like(values)).sum(1)
    return Losses(summed / count.clamp(min=1), count > 0)


def focal(losses: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss of cross-entropy losses: ``(1 - p_i)^gamma * l_i`` with ``p_i = exp(-l_i)``.

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
    """SuperLoss: ``(l - tau) * s + lam * log(s)^2`` with ``s = exp(-W(max(-2/e, (l - tau)/lam) / 2))``.

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
    """Principal branch of Lambert's W, ``W e^W = z`` for z >= -1/e, by Halley steps in float64, on the device.

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


def _unreduced(criterion: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(criterion, nn.Module):
        if not hasattr(criterion, "reduction"):
            return criterion
        criterion = copy.copy(criterion)
        criterion.reduction = "none"  # type: ignore[assignment]
        return criterion
    try:
        takes_reduction = "reduction" in inspect.signature(criterion).parameters
    except (TypeError, ValueError):  # builtins without a signature
        takes_reduction = False
    return functools.partial(criterion, reduction="none") if takes_reduction else criterion
