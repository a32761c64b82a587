"""The arguments, results and divisors of torch's criteria, and a check of criteria that are not torch's.

Most criteria average over all entries. The exceptions are handled here: cross-entropy divides by the class weights of
the entries that count, and CTC first divides each sample by the length of its target.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn._reduction import legacy_get_string

from batchtrim._checks import describe
from batchtrim._criterion_errors import (
    WAY_OUT,
    hooked,
    not_of_samples,
    of_compiled_forward,
    of_torchscript,
    why_reduced,
)
from batchtrim.errors import PassUnreducedLosses
from batchtrim.unreduced import Losses

__all__ = ["Criterion", "check_values", "same_shape"]

# Cross-entropy of the logits of a layer of its own, which newer torch has; its function takes that layer's weight, too.
_LINEAR = tuple(getattr(F, name) for name in ("linear_cross_entropy",) if hasattr(F, name))
_CLASSES = (
    nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss, *_LINEAR,
    *(getattr(nn, name) for name in ("LinearCrossEntropyLoss",) if hasattr(nn, name)),
)  # fmt: skip
_IGNORED = -100  # the label that cross-entropy leaves out where its `ignore_index` is None
_CTC = (nn.CTCLoss, F.ctc_loss)
# In newer torch these take `weight`, of the outputs' shape, and divide by its sum. F.huber_loss divides by the entries.
_WEIGHTED = (F.mse_loss, F.l1_loss)
_LEGACY = ("size_average", "reduce")  # torch's older arguments, which override `reduction`
# Criteria whose outputs and targets must have the same shape: others would be broadcast.
_ELEMENTWISE = (
    nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.KLDivLoss,
    nn.PoissonNLLLoss, nn.GaussianNLLLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.MultiLabelMarginLoss,
    nn.MultiLabelSoftMarginLoss, F.l1_loss, F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits, F.kl_div, F.poisson_nll_loss, F.gaussian_nll_loss, F.soft_margin_loss,
    F.hinge_embedding_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss,
)  # fmt: skip
# Their mean is over samples; of several inputs, some may be broadcast.
_OF_SAMPLES = (
    nn.MultiMarginLoss, nn.TripletMarginLoss, nn.TripletMarginWithDistanceLoss, nn.CosineEmbeddingLoss,
    nn.MarginRankingLoss, nn.AdaptiveLogSoftmaxWithLoss, F.multi_margin_loss, F.triplet_margin_loss,
    F.triplet_margin_with_distance_loss, F.cosine_embedding_loss, F.margin_ranking_loss,
)  # fmt: skip
_KNOWN = (*_CLASSES, *_CTC, *_ELEMENTWISE, *_OF_SAMPLES)


# A criterion that holds more numbers than this (a network, a memory bank) is not copied and called in every batch.
_LIGHT = 1 << 16


class Criterion:
    """A criterion called without its reduction, and the divisor that it would have used.

    A change of a criterion module (its reduction, its weights) takes effect at the next call.

    Attributes:
        given: the criterion as it was given.
        call: the same with ``reduction='none'``.
        classes: cross-entropy of class labels, with or without class weights.
    """

    def __init__(self, given: Callable[..., Any], ignore_index: int | None = None) -> None:
        given = getattr(given, "_orig_mod", given)  # compiled: setting an attribute would set it on the module inside
        self._asked, self._kind = ignore_index, _kind(given)
        if isinstance(given, functools.partial) and not (given.args or given.keywords):
            given = given.func
        function, named = _unwrapped(given)
        known = _torchs(function)
        self.given = given
        self.classes = _is_one(known, _CLASSES)
        self.ctc = _is_one(known, _CTC)
        self.elementwise = _is_one(known, _ELEMENTWISE)
        self.weighted = _is_one(known, _WEIGHTED)
        self.adaptive = known is nn.AdaptiveLogSoftmaxWithLoss
        self._arguments = 3 if _is_one(known, _LINEAR) else 2
        self._module = given if isinstance(given, nn.Module) else None
        if self._module is not None and not hasattr(given, "reduction") and "reduction" in _defaults(_function(given)):
            self._module = None  # its forward takes the reduction, as a function does
        self._named = named
        self._parameters = {} if self._module is not None else _defaults(_function(given))
        self._torchs = _is_one(known, _KNOWN)
        legacy = [self._parameters.get(name) for name in _LEGACY]
        self._legacy = None if legacy == [None, None] else legacy_get_string(*legacy, emit_warning=False)
        self._settings: dict[str, Any] = {}
        if self._has("reduction"):
            self._settings = {"reduction": "none"} | ({} if self._legacy is None else dict.fromkeys(_LEGACY))
        if ignore_index is not None and self.classes:
            self._settings["ignore_index"] = ignore_index
        self.call = self._with(self._settings)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("call", "_kind")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._kind = _kind(self.given)
        self.call = self._with(self._settings)

    def refresh(self) -> None:
        """Read the criterion again if it has become another class or got another forward, as by parametrizations."""
        if self._module is not None and self._kind != _kind(self.given):
            self.__init__(self.given, self._asked)

    @property
    def reduction(self) -> str | None:
        """The reduction asked for, "mean", "sum" or "batchmean"; None if the criterion has none, or "none"."""
        return _reduction(self._own("reduction") if self._legacy is None else self._legacy)

    @property
    def ignore_index(self) -> int | None:
        """The label that the criterion itself leaves out, or None."""
        own = self._own("ignore_index")
        return self._settings.get("ignore_index", _IGNORED if own is None and self.classes else own)

    @property
    def foreign(self) -> bool:
        """True if it is not one of torch's, or has hooks, or is one of a newer torch: its mean has to be checked."""
        return not self._torchs or hooked(self.given)

    @property
    def light(self) -> bool:
        """True if the criterion costs little to copy and to call again, as far as can be told."""
        if not isinstance(self.given, nn.Module):
            return True
        held = itertools.chain(self.given.parameters(), self.given.buffers())
        return sum(each.numel() for each in held) <= _LIGHT

    def __call__(self, *inputs: Any) -> Tensor:
        """Return the un-reduced losses.

        Raises:
            TypeError: the criterion takes other arguments, or returns no tensor.
            ValueError: the arguments would be broadcast against each other.
            PassUnreducedLosses: the criterion averages anyway.
        """
        self._check_inputs(inputs)
        try:
            values = self.call(*inputs)
        except Exception as error:
            if isinstance(error, TypeError):
                self._explain_arguments(inputs, error)
            if hooked(self.given):
                error.add_note(f"batchtrim calls {self.name} with reduction='none': its hooks get un-reduced losses.")
            elif "reduction" in self._settings and not self._torchs:
                error.add_note(
                    f"batchtrim calls {self.name} with reduction='none'. If it has another word for un-reduced losses, "
                    "make it so, and pass a function: per_sample(lambda outputs, targets: criterion(outputs, targets))."
                )
            raise
        if self.adaptive:
            values = -values.output
        if isinstance(values, Losses):
            raise TypeError(
                f"expected {self.name} to return a tensor, got `Losses`, which need no per_sample. Give the trimmer "
                "what it returns, trim(criterion(outputs, targets)), or TrimmedForward the criterion itself."
            )
        if not isinstance(values, Tensor):
            place = repr(next(iter(values), "loss")) if isinstance(values, dict) else 0
            raise TypeError(
                f"expected {self.name} to return a tensor of un-reduced losses, got {describe(values)}. "
                f"Take the losses out of it: per_sample(lambda outputs, targets: criterion(outputs, targets)[{place}])."
            )
        if values.ndim == 0:
            raise PassUnreducedLosses(
                f"expected {self.name} to return one loss per sample, got (). "
                + why_reduced(self.given, not self.foreign, self._has("reduction"))
            )
        if self.ctc and self.reduction == "mean":  # as documented: each loss over its target's length, then the mean
            lengths = inputs[3] if len(inputs) > 3 else self._named["target_lengths"]
            values = values / torch.as_tensor(lengths, device=values.device).to(values).clamp(min=1)
        return values

    @property
    def name(self) -> str:
        return describe(self.given)

    def targets(self, inputs: Sequence[Any]) -> Tensor | None:
        """Return the targets among the inputs; None if the criterion takes more or less than outputs and targets."""
        return inputs[-1] if len(inputs) == self._arguments and isinstance(inputs[-1], Tensor) else None

    def weights(self, targets: Tensor, mask: Tensor | None, values: Tensor) -> Tensor | None:
        """Return what each entry adds to the divisor, 0 if it is masked out; None if every entry adds 1."""
        weight = self._own("weight") if self.classes or self.weighted else None
        if weight is None or (self.classes and targets.dtype.is_floating_point):
            return None
        weights = weight.to(torch.promote_types(values.dtype, torch.float32))
        if self.classes:
            known = targets.long() if mask is None else torch.where(mask, targets, torch.zeros_like(targets)).long()
            weights = weights[known]
        return weights if mask is None else torch.where(mask, weights, torch.zeros_like(weights))

    def _has(self, name: str) -> bool:
        return hasattr(self._module, name) if self._module is not None else name in self._parameters

    def _own(self, name: str) -> Any:
        if self._module is not None:
            return getattr(self._module, name, None)
        return self._parameters.get(name)

    def _with(self, settings: dict[str, Any]) -> Callable[..., Any]:
        if not settings:
            return self.given
        if isinstance(self.given, torch.jit.ScriptModule):
            if settings == {"reduction": self._own("reduction")}:
                return self.given
            raise TypeError(
                f"expected `criterion` in Python, got one of TorchScript, in which {sorted(settings)} cannot be set. "
                "Pass the criterion before it was scripted, or script it with reduction='none'."
            )
        if self._module is None:
            return functools.partial(self.given, **settings)
        return _set_apart(self._module, settings)

    def _check_inputs(self, inputs: Sequence[Any]) -> None:
        if self.classes and len(inputs) != self._arguments:
            taken = "(outputs, targets)" if self._arguments == 2 else "(input, linear_weight, target)"
            raise TypeError(
                f"expected {taken} for {self.name}, got {len(inputs)} arguments. "
                "Bind the others by name: per_sample(functools.partial(F.cross_entropy, weight=weight))."
            )
        if not self.elementwise:
            return
        shapes = [tuple(each.shape) for each in inputs[:2] if isinstance(each, Tensor)]
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            raise ValueError(
                f"expected outputs and targets of one shape for {self.name}, got {shapes[0]} and {shapes[1]}. "
                "They would be broadcast against each other: squeeze or unsqueeze one, or pick the channel."
            )

    def _explain_arguments(self, inputs: Sequence[Any], error: TypeError) -> None:
        """Raise an error that says what the criterion takes, if the arguments do not fit it."""
        target = self._module.forward if self._module is not None else self.given
        try:
            signature = inspect.signature(target)
            signature.bind(*inputs)
        except ValueError:
            return
        except TypeError:
            names = ", ".join(signature.parameters)
            raise TypeError(
                f"expected the arguments of {self.name}, ({names}), got {len(inputs)}. Call per_sample(criterion) with "
                "as many; for TrimmedForward, which gives (outputs, targets), write a function of these two: "
                "loss = per_sample(criterion), and then lambda outputs, targets: loss(*outputs, targets)."
            ) from error


def check_values(criterion: Criterion, values: Tensor, inputs: Sequence[Any], unit: str) -> None:
    """Refuse losses that do not match the samples: broadcast ones, and those of flattened batches."""
    size = values.shape[0]
    if criterion.classes and (unit == "element" or size == inputs[0].shape[0]):
        return
    tensors = [each for each in inputs if isinstance(each, Tensor) and each.ndim > 0]
    if not criterion.classes:
        _check_pairs(criterion, values, tensors)
    first = 2 if criterion.ctc else 1  # its log-probabilities have the time first
    if unit == "sample" and tensors and all(size not in each.shape[:first] for each in tensors):
        raise not_of_samples(tensors[0].shape[0], values, any(size in each.shape[:2] for each in tensors))


def _check_pairs(criterion: Criterion, values: Tensor, tensors: Sequence[Tensor]) -> None:
    """Refuse losses that pair samples with other samples because two of the inputs were broadcast."""
    for first, second in itertools.combinations(range(len(tensors)), 2):
        one, other = (tuple(tensors[at].shape) for at in (first, second))
        across = len(one) != len(other) or one[0] != other[0]
        # a target of that shape shows that pairs are meant; for a weight, the outputs show it too
        meant = tensors[1:] if (first, second) == (0, 1) else tensors
        if not across or _broadcast(one, other) != tuple(values.shape) or any(same_shape(values, t) for t in meant):
            continue
        raise ValueError(
            f"expected outputs and targets of one shape, got {one} and {other}, which {criterion.name} broadcast to "
            f"{tuple(values.shape)}. Squeeze or unsqueeze one, or pick the channel."
        )


def _set_apart(module: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """Return a module that shares another's state, now and later, except for some settings of its own."""
    kind = type(module)
    settings = {**settings, "_compiled_call_impl": None}  # after module.compile(), the compiled call of the other one
    own = type(kind.__name__, (kind,), {name: _constant(value) for name, value in settings.items()})
    found = own.__new__(own)
    object.__setattr__(found, "__dict__", vars(module))
    return found


def _constant(value: Any) -> property:
    return property(lambda _: value)


def _broadcast(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape that two are broadcast to, or None. torch.broadcast_shapes raises, which cannot be traced."""
    pairs = list(zip_longest(reversed(one), reversed(other), fillvalue=1))
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        return None
    return tuple(max(pair) if 0 not in pair else 0 for pair in reversed(pairs))


def same_shape(one: Tensor, other: Tensor) -> bool:
    """True if two shapes differ at most by dimensions of size 1, so that entries correspond in order."""
    return [size for size in one.shape if size != 1] == [size for size in other.shape if size != 1]


def _unwrapped(criterion: Any) -> tuple[Any, dict[str, Any]]:
    """Return the function inside functools.partial and ``torch.compile(function)``, and the arguments bound by name."""
    named: dict[str, Any] = {}
    while True:
        if isinstance(criterion, functools.partial):
            named = {**criterion.keywords, **named}
            criterion = criterion.func
        elif getattr(criterion, "__globals__", {}).get("__name__", "").startswith("torch._dynamo"):
            criterion = criterion.__wrapped__
        else:
            return criterion, named


def _kind(criterion: Any) -> tuple[type, Any]:
    return type(criterion), vars(criterion).get("forward") if isinstance(criterion, nn.Module) else None


def _function(criterion: Callable[..., Any]) -> Callable[..., Any]:
    return criterion.forward if isinstance(criterion, nn.Module) else criterion


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's parameters by name with their defaults, those bound by functools.partial included."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return {}
    return {each.name: None if each.default is each.empty else each.default for each in parameters}


def _torchs(function: Any) -> Any:
    """Return the class whose forward a module runs, which may be torch's; a function unchanged."""
    scripted = getattr(function, "original_name", None) if isinstance(function, torch.jit.ScriptModule) else None
    if any(scripted == each.__name__ for each in (nn.CrossEntropyLoss, nn.NLLLoss)):
        raise of_torchscript(str(scripted))
    if not isinstance(function, nn.Module):
        return function
    if "forward" in vars(function):
        if scripted is None and hasattr(vars(function)["forward"], "_torchdynamo_orig_callable"):
            raise of_compiled_forward(describe(function))
        return function
    return next((each for each in type(function).__mro__ if "forward" in vars(each)), type(function))


def _is_one(known: Any, among: Sequence[Any]) -> bool:
    return any(known is each for each in among)


def _reduction(asked: Any) -> str | None:
    if asked in (None, "none"):
        return None
    if asked not in ("mean", "sum", "batchmean"):
        raise ValueError(
            f"expected `reduction` of the criterion to be 'mean', 'sum', 'batchmean' or 'none', got {describe(asked)}. "
            f"{WAY_OUT}"
        )
    return asked
