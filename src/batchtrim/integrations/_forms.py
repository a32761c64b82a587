"""Standard forms of a model's loss. They can be traced, and they are proven equal to the recorded losses.

A forward whose loss functions are being recorded cannot be traced. Most losses are one call of a loss function on one
of the model's outputs and its labels, arranged in one of a few ways. ``_form_search.py`` looks for the one that gives
the recorded losses, entry by entry, and the same gradient for the model's parameters. The function, its class weights,
label smoothing and ignored label are taken from the recorded call.

Legend: B batch, t entries per sample, T tokens, C classes, L the model's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchtrim.integrations._recorder import entries
from batchtrim.integrations._terms import Term, merged
from batchtrim.unreduced import Losses

__all__ = ["OF_CLASSES", "OF_NUMBERS", "Form", "FormCall"]

Arranged = tuple[Tensor, Tensor, int]  # a loss function's input and target, and the label that does not count


def _check_shapes(output: Tensor, label: Tensor) -> None:
    """Refuse labels of other samples or tokens; this also tells a trace that the two sizes are the same."""
    if label.ndim == output.ndim - 1 and label.shape != output.shape[:-1]:
        raise ValueError(f"expected labels of shape {tuple(output.shape[:-1])}, got {tuple(label.shape)}.")


def _each(output: Tensor, label: Tensor, ignored: int) -> Arranged:
    """Pair one label with each output: classes of samples, tokens or choices."""
    _check_shapes(output, label)
    return output.reshape(-1, output.shape[-1]), label.reshape(-1), ignored


def _next_padded(output: Tensor, label: Tensor, ignored: int) -> Arranged:
    """Pair each output with the next token, the last one with none, as transformers shifts labels."""
    _check_shapes(output, label)
    shifted = F.pad(label, (0, 1), value=ignored)[..., 1:]
    return output.reshape(-1, output.shape[-1]), shifted.reshape(-1), ignored


def _next_cut(output: Tensor, label: Tensor, ignored: int) -> Arranged:
    """Pair each output but the last with the next token."""
    _check_shapes(output, label)
    return output[:, :-1].reshape(-1, output.shape[-1]), label[:, 1:].reshape(-1), ignored


def _pixels(output: Tensor, label: Tensor, ignored: int) -> Arranged:
    """Pair (B, C, ...) with (B, ...), classes in the second dimension."""
    return output, label, ignored


def _pixels_resized(output: Tensor, label: Tensor, ignored: int) -> Arranged:
    """Pair pixels after resizing the output to the labels' size."""
    return F.interpolate(output, size=label.shape[-2:], mode="bilinear", align_corners=False), label, ignored


def _position(output: Tensor, label: Tensor, _: int) -> Arranged:
    """Pair scores of T positions with the start or end of an answer; a position outside does not count."""
    return output, label.reshape(-1).clamp(0, output.shape[1]), output.shape[1]


def _numbers(output: Tensor, label: Tensor, ignored: int) -> Arranged:
    """Pair one number with each output."""
    batch = label.shape[0]
    return output.reshape(batch, -1), label.reshape(batch, -1).to(output.dtype), ignored


OF_CLASSES = (_each, _next_padded, _next_cut, _pixels, _pixels_resized, _position)
OF_NUMBERS = (_numbers,)


@dataclass(frozen=True, eq=False)
class FormCall:
    """A term of a loss: a loss function of one output and one label.

    Attributes:
        output: name or place among the outputs.
        label: name.
        arrange: one of the functions above.
        options: of ``function``.
        factor: its factor in L.
        masked: whether ignored labels are left out.
    """

    output: Any
    label: str
    arrange: Callable[[Tensor, Tensor, int], Arranged]
    function: Callable[..., Tensor]
    options: dict[str, Any]
    factor: float
    masked: bool

    def term(self, outputs: Any, labels: Mapping[str, Tensor], values: bool = True) -> Term:
        """Return the term; its values are zeros if only the counted entries are asked for."""
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
        calls: its terms.
        alike: whether they add up entry by entry.
        unit: what is chosen.
        smoothing: label smoothing in it that the model's own loss has not.
    """

    calls: tuple[FormCall, ...]
    alike: bool
    unit: str
    smoothing: float

    def __call__(self, outputs: Any, labels: Mapping[str, Tensor]) -> Losses:
        return self.with_scores(outputs, labels)[0]

    def scores(self, outputs: Any, labels: Mapping[str, Tensor]) -> Tensor:
        """Return what to rank by, (B,), if the terms are not ``alike``."""
        losses, scores = self.with_scores(outputs, labels)
        return losses.values if scores is None else scores

    def own_loss(self, values: Tensor, mask: Tensor | None, outputs: Any, labels: Mapping[str, Tensor]) -> Tensor:
        """Return the model's own loss, if this is its form.

        Args:
            values: (B,) or (B * t,), the losses of this form.
            mask: which of them count.
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
        """Return the losses, and what to rank by if that is not their values."""
        return merged([call.term(outputs, labels) for call in self.calls], self.alike, self.unit)
