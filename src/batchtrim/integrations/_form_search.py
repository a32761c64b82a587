"""Find the standard form that gives the recorded losses, entry by entry, with the same gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim._checks import in_one_line
from batchtrim.integrations._contributions import tolerance_of
from batchtrim.integrations._forms import OF_CLASSES, OF_NUMBERS, Form, FormCall
from batchtrim.integrations._loss_finder import Found
from batchtrim.integrations._recorder import LossPart, NotFound
from batchtrim.integrations._terms import Term, merged
from batchtrim.unreduced import Losses

__all__ = ["find_form", "fits"]


def find_form(
    found: Found, labels: Mapping[str, Tensor], unit: str, smoothing: float, parameters: list[nn.Parameter]
) -> Form | None:
    """Return the form that gives the recorded losses, or None if there is none.

    Args:
        found: the losses, with their graph.
        labels: by name.
        unit: what is chosen.
        smoothing: added label smoothing.
        parameters: of the model, to compare the gradient.

    Raises:
        NotFound: the gradients cannot be compared.
    """
    outputs = found.outputs
    calls = [next(_matching(part, outputs, labels), None) for part in found.parts]
    if not calls or any(call is None for call in calls):
        return None
    form = Form(tuple(call for call in calls if call is not None), found.alike, unit, smoothing)
    return form if fits(form, found, labels, parameters) else None


def fits(form: Form, found: Found, labels: Mapping[str, Tensor], parameters: list[nn.Parameter]) -> bool:
    """Return True if a form gives the recorded losses: values, counted entries and gradient."""
    try:
        losses, scores = form.with_scores(found.outputs, labels)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError):  # the shapes have another layout
        return False
    mine = (losses.values, losses.mask, losses.weights, losses.counts, scores)
    terms = [_all_count(term, part) for term, part in zip(found.terms, found.parts, strict=True)]
    other, other_scores = merged(terms, found.alike, form.unit)
    theirs = (other.values, other.mask, other.weights, other.counts, other_scores)
    if not all(_same(one, two) for one, two in zip(mine, theirs, strict=True)):
        return False
    return _same_gradient(losses, other, parameters)


def _all_count(term: Term, part: LossPart) -> Term:
    """Return a term without its mask if all entries count and the model took their mean itself."""
    every = part.call.divisor is None and term.counted is not None and bool(term.counted.all())
    return term._replace(counted=None) if every else term


def _matching(part: LossPart, outputs: Any, labels: Mapping[str, Tensor]) -> Iterator[FormCall]:
    """Yield the ways to make a recorded call from an output and a label."""
    call = part.call
    given = dict(call.own.keywords)
    for name in ("input", "target", "reduction", "size_average", "reduce"):
        given.pop(name, None)
    of_classes = call.counted is not None
    factor = _factor(part)
    masked = of_classes and call.divisor is not None
    if factor is None or (of_classes and not masked and not bool(call.counted.all())):  # type: ignore[union-attr]
        return
    for output, tensor in _named(outputs):
        for label, target in labels.items():
            if target.ndim == 0 or tensor.ndim == 0:
                continue
            for arrange in OF_CLASSES if of_classes else OF_NUMBERS:
                made = FormCall(output, label, arrange, call.own.func, given, factor, masked)
                try:
                    with torch.no_grad():
                        term = made.term({output: tensor.detach()}, {label: target})
                except (RuntimeError, ValueError, IndexError, TypeError):  # these shapes do not match
                    continue
                if term.values.numel() == part.values.numel() and _same(
                    term.values.reshape(-1), part.values.reshape(-1)
                ):
                    yield made


def _factor(part: LossPart) -> float | None:
    """Return the factor by which a call's losses enter L; None if it is not one number."""
    own, used = part.call.values.detach().double().sum(), part.values.detach().double().sum()
    if not bool(own.isfinite() & used.isfinite()) or float(own) == 0.0:
        return None
    factor = float(used / own)
    return 1.0 if abs(factor - 1.0) < 1e-5 else factor


def _named(outputs: Any) -> Iterator[tuple[Any, Tensor]]:
    pairs = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    for name, value in pairs:
        if isinstance(value, Tensor) and value.requires_grad and value.is_floating_point() and name != "loss":
            yield name, value


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is None and other is None
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    one, other = one.detach(), other.detach()
    apart = tolerance_of(one.dtype)
    return torch.allclose(one, other.to(one.dtype), rtol=apart, atol=1e-2 * apart, equal_nan=True)


def _same_gradient(one: Losses, other: Losses, parameters: list[nn.Parameter]) -> bool:
    """Return True if the losses, each weighted by another number, have the same gradient."""
    number = len(one.values)
    weights = torch.linspace(1.0, 2.0, number, device=one.values.device, dtype=one.values.dtype)
    sums = []
    for losses in (one, other):
        values = losses.values if losses.mask is None else torch.where(losses.mask, losses.values, 0.0)
        sums.append(values @ weights)
    try:
        pairs = [torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True) for each in sums]
    except RuntimeError as error:  # nothing is proven; such as activation checkpoints that are reentrant
        raise NotFound(f"its gradient cannot be computed without backward() ({in_one_line(error)})") from error
    size, apart = 0.0, 0.0
    for mine, theirs in zip(*pairs, strict=True):
        if (mine is None) != (theirs is None):
            return False
        if mine is not None and theirs is not None:
            size += float(theirs.double().square().sum())
            apart += float((mine.double() - theirs.double()).square().sum())
    relative = 10 * tolerance_of(one.values.dtype)
    return apart**0.5 <= relative * size**0.5
