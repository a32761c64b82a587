"""Standard forms of a model's loss: what a graph can be traced of, proven to be the losses that were recorded.

A forward whose loss functions are being recorded cannot be traced. Most losses are one call of a loss function on one
of the model's outputs and its labels, laid out in one of a few ways. :func:`find_form` looks for the way that gives the
recorded losses, entry by entry, and the same gradient of the model's parameters. The function, its class weights, label
smoothing and ignored label are those of the recorded call.

Legend: B batch, t entries a sample, T tokens, C classes, L the model's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchtrim.integrations._merging import Term, merged
from batchtrim.integrations.decompose import Found
from batchtrim.integrations.intercept import Part, entries
from batchtrim.integrations.parts import tolerance_of
from batchtrim.unreduced import Losses

__all__ = ["Form", "find_form", "fits"]

Arranged = tuple[Tensor, Tensor, int]  # a loss function's input and target, and the label that does not count


def _each(output: Tensor, label: Tensor, ignored: int) -> Arranged:
    """A label an output: classes of samples, tokens or choices."""
    return output.reshape(-1, output.shape[-1]), label.reshape(-1), ignored


def _next_padded(output: Tensor, label: Tensor, ignored: int) -> Arranged:
    """The next token, the last one's being none: as transformers shifts."""
    shifted = F.pad(label, (0, 1), value=ignored)[..., 1:]
    return output.reshape(-1, output.shape[-1]), shifted.reshape(-1), ignored


def _next_cut(output: Tensor, label: Tensor, ignored: int) -> Arranged:
    """The next token, without the last output."""
    return output[:, :-1].reshape(-1, output.shape[-1]), label[:, 1:].reshape(-1), ignored


def _pixels(output: Tensor, label: Tensor, ignored: int) -> Arranged:
    """(B, C, ...) and (B, ...), classes in the second dimension."""
    return output, label, ignored


def _pixels_resized(output: Tensor, label: Tensor, ignored: int) -> Arranged:
    """The same, the output brought to the labels' size."""
    return F.interpolate(output, size=label.shape[-2:], mode="bilinear", align_corners=False), label, ignored


def _position(output: Tensor, label: Tensor, _: int) -> Arranged:
    """Where an answer starts or ends: one of T places; what lies outside does not count."""
    return output, label.reshape(-1).clamp(0, output.shape[1]), output.shape[1]


def _numbers(output: Tensor, label: Tensor, ignored: int) -> Arranged:
    """As many numbers as outputs."""
    batch = label.shape[0]
    return output.reshape(batch, -1), label.reshape(batch, -1).to(output.dtype), ignored


_OF_CLASSES = (_each, _next_padded, _next_cut, _pixels, _pixels_resized, _position)
_OF_NUMBERS = (_numbers,)


@dataclass(frozen=True, eq=False)
class _Call:
    """A term of a loss: a loss function of one output and one label.

    Attributes:
        output: name or place among the outputs. label: name. arrange: one of the functions above.
        options: of ``function``. factor: by which it goes into L. masked: whether ignored labels are left out.
    """

    output: Any
    label: str
    arrange: Callable[[Tensor, Tensor, int], Arranged]
    function: Callable[..., Tensor]
    options: dict[str, Any]
    factor: float
    masked: bool

    def term(self, outputs: Any, labels: Mapping[str, Tensor], values: bool = True) -> Term:
        """Return the term; with zeros for its values where only what counts is asked for."""
        label, options = labels[self.label], self.options
        given, target, ignored = self.arrange(outputs[self.output], label, options.get("ignore_index", -100))
        if "ignore_index" in options:
            options = {**options, "ignore_index": ignored}
        batch = label.shape[0]
        if not values:
            shape = target.shape if "ignore_index" in options else given.shape
            losses = torch.zeros(shape, device=given.device)
        else:
            losses = self.function(given, target, reduction="none", **options)
            losses = losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses
            losses = losses * self.factor if self.factor != 1.0 else losses
        counted, weights = None, None
        if self.masked:
            counted, weights = entries({"weight": None, **options, "target": target}, losses.dtype)
        return Term(losses.reshape(batch, -1), counted, weights)


@dataclass(frozen=True, eq=False)
class Form:
    """A model's loss as a function of its outputs and its labels: ``(outputs, labels) -> Losses``.

    Attributes:
        calls: its terms. alike: whether they add up entry by entry. unit: what is chosen. smoothing: label smoothing
            in it that the model's own loss has not.
    """

    calls: tuple[_Call, ...]
    alike: bool
    unit: str
    smoothing: float

    def __call__(self, outputs: Any, labels: Mapping[str, Tensor]) -> Losses:
        return self.with_scores(outputs, labels)[0]

    def scores(self, outputs: Any, labels: Mapping[str, Tensor]) -> Tensor:
        """Return what to rank by, (B,), where the terms are not ``alike``."""
        losses, scores = self.with_scores(outputs, labels)
        return losses.values if scores is None else scores

    def own_loss(self, values: Tensor, mask: Tensor | None, outputs: Any, labels: Mapping[str, Tensor]) -> Tensor:
        """Return what the model's own loss is if this is its form.

        Args:
            values: (B,) or (B * t,), the losses of this form. mask: which of them count.
        """
        with torch.no_grad():
            if self.smoothing:
                calls = tuple(replace(call, options={**call.options, "label_smoothing": 0.0}) for call in self.calls)
                return replace(self, calls=calls, smoothing=0.0)(outputs, labels).mean()
            if not self.alike:
                return Losses(values.detach(), mask).mean()
            counts = merged([self.calls[0].term(outputs, labels, values=False)], True, self.unit)[0]
            return replace(counts, values=values.detach()).mean()

    def with_scores(self, outputs: Any, labels: Mapping[str, Tensor]) -> tuple[Losses, Tensor | None]:
        """Return the losses, and what to rank by where that is not their values."""
        return merged([call.term(outputs, labels) for call in self.calls], self.alike, self.unit)


def find_form(
    found: Found, labels: Mapping[str, Tensor], unit: str, smoothing: float, parameters: list[nn.Parameter]
) -> Form | None:
    """Return the form that gives the losses that were found, or None where none does.

    Args:
        found: with its graph. labels: by name. unit: what is chosen. smoothing: label smoothing that was added.
        parameters: of the model, of which the gradient is compared.
    """
    outputs = found.outputs
    calls = [next(_matching(part, outputs, labels), None) for part in found.parts]
    if not calls or any(call is None for call in calls):
        return None
    form = Form(tuple(call for call in calls if call is not None), found.alike, unit, smoothing)
    return form if fits(form, found, labels, parameters) else None


def fits(form: Form, found: Found, labels: Mapping[str, Tensor], parameters: list[nn.Parameter]) -> bool:
    """True where a form gives the losses that were found: values, what counts, and the gradient."""
    try:
        losses, scores = form.with_scores(found.outputs, labels)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError):  # shapes of another layout
        return False
    mine = (losses.values, losses.mask, losses.weights, losses.counts, scores)
    terms = [_all_count(term, part) for term, part in zip(found.terms, found.parts, strict=True)]
    other, other_scores = merged(terms, found.alike, form.unit)
    theirs = (other.values, other.mask, other.weights, other.counts, other_scores)
    if not all(_same(one, two) for one, two in zip(mine, theirs, strict=True)):
        return False
    return _same_gradient(losses, other, parameters)


def _all_count(term: Term, part: Part) -> Term:
    """A term whose entries all count without the mask that says so, where the model took their mean itself."""
    every = part.call.divisor is None and term.counted is not None and bool(term.counted.all())
    return term._replace(counted=None) if every else term


def _matching(part: Part, outputs: Any, labels: Mapping[str, Tensor]) -> Iterator[_Call]:
    """The ways in which a recorded call can be made of an output and a label."""
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
            for arrange in _OF_CLASSES if of_classes else _OF_NUMBERS:
                made = _Call(output, label, arrange, call.own.func, given, factor, masked)
                try:
                    with torch.no_grad():
                        term = made.term({output: tensor.detach()}, {label: target})
                except (RuntimeError, ValueError, IndexError, TypeError):  # not of these shapes
                    continue
                if term.values.numel() == part.values.numel() and _same(
                    term.values.reshape(-1), part.values.reshape(-1)
                ):
                    yield made


def _factor(part: Part) -> float | None:
    """The number by which a call's losses go into L; None where it is not one number."""
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
    """Of the losses, each weighed by another number."""
    number = len(one.values)
    weights = torch.linspace(1.0, 2.0, number, device=one.values.device, dtype=one.values.dtype)
    sums = []
    for losses in (one, other):
        values = losses.values if losses.mask is None else torch.where(losses.mask, losses.values, 0.0)
        sums.append(values @ weights)
    try:
        pairs = [torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True) for each in sums]
    except RuntimeError:  # a model that cannot be differentiated twice: nothing is proven
        return False
    size, apart = 0.0, 0.0
    for mine, theirs in zip(*pairs, strict=True):
        if (mine is None) != (theirs is None):
            return False
        if mine is not None and theirs is not None:
            size += float(theirs.double().square().sum())
            apart += float((mine.double() - theirs.double()).square().sum())
    relative = 10 * tolerance_of(one.values.dtype)
    return apart**0.5 <= relative * size**0.5
