"""Find what each recorded call of a loss function contributes to the loss computed from them.

Legend: L the loss, u_j un-reduced losses of a call, r the value that the caller got for them, D its divisor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchtrim.integrations._recorder import LossCall, LossPart, NotFound

__all__ = ["compare", "near", "parts_of", "tolerance_of", "weights_of"]


def parts_of(loss: Any, calls: list[LossCall], *, check: bool) -> list[LossPart]:
    """Return what each recorded call contributes to ``loss``.

    ``L = sum_i dL/dr_i * r_i``, with the values u of call i in place of its r. This holds if L is homogeneous in the
    recorded values: a sum of them, with factors. The gradient with respect to the model is right for any L.

    Args:
        check: check the recorded calls as well as L, which repeats each of them once.

    Raises:
        NotFound: L depends on something else as well, or nothing was recorded.
    """
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise NotFound(f"it is no single number, but has shape {tuple(loss.shape)}")
    if not isinstance(loss, Tensor) or not loss.requires_grad or not calls:
        raise NotFound("no call of a loss function of torch.nn.functional was seen in it")
    if _has_other_leaves(loss, [call.leaf for call in calls]):
        raise NotFound("it has a further term besides the loss functions it calls")
    with torch.enable_grad():
        factors = torch.autograd.grad(loss.sum(), [call.leaf for call in calls], allow_unused=True)
    _check(loss.detach(), calls, factors, whole=check)
    return [_part(call, factor) for call, factor in zip(calls, factors, strict=True) if factor is not None]


def _part(call: LossCall, factor: Tensor) -> LossPart:
    factor = factor.to(call.values.dtype)
    if call.divisor is None:  # the caller reduced the losses: dL/du_j shows how
        counted = factor != 0
        divisor = counted.sum().clamp(min=1)
        return LossPart(call, call.values * (factor * divisor), counted, None, divisor, factor)
    counts = call.weights if call.weights is not None else call.counted
    divisor = call.values.new_tensor(call.values.numel()) if counts is None else counts.sum().to(call.values.dtype)
    divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return LossPart(call, call.values * (factor * divisor / call.divisor), call.counted, call.weights, divisor)


def weights_of(part: LossPart, batch: int) -> Tensor | None:
    """Return what each entry adds to the divisor of a part, or None for ones.

    A caller that reduces the losses itself may take a weighted mean: ``(l * w).sum() / w.sum()``, or the mean of the
    samples' means, in which an entry of a longer sample weighs less. Its factors then sum to 1, or to the same for
    every sample that counts. Other factors belong to the losses.
    """
    factors = part.factors
    if factors is None:
        return part.weights
    used = factors[factors != 0]
    if not len(used) or used.amin() == used.amax():
        return None
    rows = factors.reshape(batch, -1)
    sums, within = rows[(rows != 0).any(1)].sum(1), tolerance_of(factors.dtype)
    total, equal = sums.sum(), sums.mean()
    if bool((total - 1.0).abs() > within) and bool((sums - equal).abs().max() > within * equal.abs()):
        return None
    return factors * (part.divisor / total)


def _has_other_leaves(loss: Tensor, leaves: list[Tensor]) -> bool:
    known, seen, waiting = {id(leaf) for leaf in leaves}, set(), [(loss.grad_fn, loss.output_nr)]
    while waiting:
        node, place = waiting.pop()
        if node is None or (node, place) in seen:
            continue
        seen.add((node, place))
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            return True
        following = node.next_functions
        # DistributedDataParallel passes all of a model's outputs through one node, unchanged
        waiting += following[place : place + 1] if node.name() == "_DDPSinkBackward" else following
    return False


def _check(loss: Tensor, calls: list[LossCall], factors: Any, *, whole: bool) -> None:
    """Check L against its parts, since another batch may compute it differently: |L - 0.1| + 0.1, a clamp.

    Args:
        whole: check each reduced value against the caller's own call, too.
    """
    used = [(call, factor) for call, factor in zip(calls, factors, strict=True) if factor is not None]
    for call, _ in used if whole else ():
        with torch.no_grad():
            own = call.own()
        # for the mean of nothing, torch gives NaN and we give 0
        if call.divisor is not None and (call.counted is None or call.counted.any()):
            compare(own, call.leaf, f"the mean of {call.name}'s un-reduced losses")
    rebuilt = torch.stack([(call.leaf.detach().double() * factor.double()).sum() for call, factor in used]).sum()
    compare(loss, rebuilt, "the sum of the losses found")


def compare(true: Tensor, found: Tensor, what: str) -> None:
    """Raise an error if ``found`` differs from the loss by more than rounding in its dtype."""
    right, ours = float(true.detach()), float(found.detach())
    if not near(right, ours, true.dtype):
        raise NotFound(f"{what} is {ours:.6g}, but the loss is {right:.6g}")


def near(true: float, found: float, dtype: torch.dtype) -> bool:
    """True if two values of a loss agree up to rounding, or if the true one is NaN, which plain training would give."""
    return true != true or true == found or abs(true - found) <= tolerance_of(dtype) * max(abs(true), 1e-2)


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative difference allowed between two ways of computing one loss."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2e-2)
