"""Record the loss functions that other code calls, without changing that code.

A model's ``forward`` or a module's ``training_step`` returns one number. :class:`Recorder` is a
``torch.overrides.TorchFunctionMode``: only while it is entered, every call of a loss function of
``torch.nn.functional`` passes through it, also those that modules such as ``nn.CrossEntropyLoss()`` make. The caller
gets the usual value, detached from the graph. The un-reduced losses are stored, with their graph. Differentiating
the returned number with respect to these values then gives what each loss contributes to it:
:func:`batchtrim.integrations._contributions.parts_of`.

Legend: L the returned number, u_j un-reduced losses, r the reduced value the caller got, D its divisor.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode

__all__ = ["LossCall", "LossPart", "NotFound", "Recorder", "entries"]

_CLASSES = (F.cross_entropy, F.nll_loss)  # these divide by the targets that count, weighted
_ENTRIES = (  # these divide by all entries
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
    F.kl_div, F.soft_margin_loss, F.multilabel_soft_margin_loss, F.poisson_nll_loss, F.gaussian_nll_loss,
    F.hinge_embedding_loss, F.margin_ranking_loss, F.cosine_embedding_loss, F.multi_margin_loss,
    F.multilabel_margin_loss,
)  # fmt: skip
_SIGNATURES = {function: inspect.signature(function) for function in (*_CLASSES, *_ENTRIES, F.ctc_loss)}
_WEIGHTED = (F.mse_loss, F.l1_loss)  # with `weight`, which newer torch has, these divide by its sum
# Functions whose losses cannot be assigned by their target; named in the error if nothing else was found.
_UNREAD = {F.triplet_margin_loss, F.triplet_margin_with_distance_loss, getattr(F, "linear_cross_entropy", None)}


class NotFound(ValueError):
    """The un-reduced losses behind a number were not found; the text says why."""


@dataclass
class LossCall:
    """One call of a loss function.

    Attributes:
        name: of the function.
        values: un-reduced, at least float32, with a graph.
        leaf: what the caller got.
        target: of the call.
        counted: bool, shape of ``values``; None if every entry counts.
        weights: weights already in ``values`` that the mean divides by, of classes or of ``mse_loss(weight=)``; shape
            of ``values``, 0 where nothing counts; None if there are none.
        divisor: D, if ``leaf`` is ``sum(values) / D``; None if ``leaf`` is un-reduced.
        own: repeats the caller's own call; holds its function and arguments.
    """

    name: str
    values: Tensor
    leaf: Tensor
    target: Tensor
    ignored: int | None
    counted: Tensor | None
    weights: Tensor | None
    divisor: Tensor | None
    own: functools.partial[Tensor]


@dataclass
class LossPart:
    """One call's contribution to L: ``L = sum over parts of sum_j(values_j / divisor)``.

    Attributes:
        values: the call's, times their factor in L.
        weights: what each entry counts, or None for ones.
        factors: dL/du_j, if the caller reduced the losses itself.
    """

    call: LossCall
    values: Tensor
    counted: Tensor | None
    weights: Tensor | None
    divisor: Tensor
    factors: Tensor | None = None


class Recorder(TorchFunctionMode):
    """While entered, records calls of loss functions; see the module's docstring. Thread-local, undone on exit.

    Args:
        smoothing: label smoothing to add to every cross-entropy with class targets that has none.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.calls: list[LossCall] = []
        self.unread: list[str] = []  # called loss functions that cannot be recorded

    def __enter__(self) -> Recorder:
        self._grad = torch.is_grad_enabled()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.set_grad_enabled(self._grad)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _SIGNATURES:
            if func in _UNREAD:
                self.unread.append(func.__name__)
            return func(*args, **(kwargs or {}))
        if func is F.l1_loss and "weight" in _SIGNATURES[func].parameters:
            kwargs = {**(kwargs or {}), "weight": _local_of(F.l1_loss, "weight")}
        return _record(self, func, args, kwargs or {})  # pyright: ignore[reportCallIssue]

    def record(self, function: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        """Make the caller's call without its reduction, and return the value for the caller."""
        bound = _SIGNATURES[function].bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if given.get("size_average") is not None or given.get("reduce") is not None:
            given["reduction"] = _reduction.legacy_get_string(given.pop("size_average"), given.pop("reduce"), False)
        of_classes = function in _CLASSES and not given["target"].is_floating_point()
        if self.smoothing and function is F.cross_entropy and of_classes and not given["label_smoothing"]:
            given["label_smoothing"] = self.smoothing
        values = function(**{**given, "reduction": "none"})
        if function is F.ctc_loss and given["reduction"] == "mean":  # mean over the samples, each divided by its length
            values = values / torch.as_tensor(given["target_lengths"], device=values.device).clamp(min=1)
        dtype = values.dtype
        values = values.float() if dtype in (torch.float16, torch.bfloat16) else values
        counted, weights = entries(given, values.dtype) if of_classes else (None, None)
        if function in _WEIGHTED and given.get("weight") is not None:
            weights = given["weight"].detach().to(values.dtype).expand_as(values)
        divisor = _divisor(given["reduction"], values, counted, weights)
        plain = values.detach()
        leaf = (plain if divisor is None else plain.sum() / divisor).to(dtype, copy=True)
        torch.set_grad_enabled(True)  # the graph shows what follows, so one is needed in a pass without a graph too
        target = given["targets" if function is F.ctc_loss else "target"]
        ignored = given.get("ignore_index") if of_classes else None
        leaf.requires_grad_()
        own = functools.partial(function, **given)
        self.calls.append(LossCall(function.__name__, values, leaf, target, ignored, counted, weights, divisor, own))
        return leaf.clone()  # the caller may add to it in place


def _local_of(function: Any, name: str) -> Any:
    """Return a local variable of a function that is being called: l1_loss does not pass its weight to a mode."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals[name]


@torch.compiler.disable
def _record(recorder: Recorder, function: Any, args: Any, kwargs: Any) -> Tensor:
    return recorder.record(function, args, kwargs)


def entries(given: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return which entries of the class targets count, and their class weights.

    Args:
        given: ``target``, ``weight`` and ``ignore_index`` of the loss function.
        dtype: of the weights.
    """
    target, weight = given["target"], given["weight"]
    counted = target != given["ignore_index"]
    if weight is None:
        return counted, None
    weights = weight.to(dtype)[torch.where(counted, target, torch.zeros_like(target))]
    return counted, torch.where(counted, weights, torch.zeros_like(weights))


def _divisor(reduction: str, values: Tensor, counted: Tensor | None, weights: Tensor | None) -> Tensor | None:
    if reduction == "none":
        return None
    if reduction == "sum":
        return values.new_ones(())
    if reduction == "batchmean":
        return values.new_tensor(values.shape[0])
    counts = counted if weights is None else weights
    total = values.new_tensor(values.numel()) if counts is None else counts.sum().to(values.dtype)
    return torch.where(total == 0, torch.ones_like(total), total)
