"""Argument checks that several modules need, and the pieces of their messages.

Every message reads ``expected <argument> <what was required>, got <what arrived>. <likeliest cause or cure>``.
Checks read shapes, dtypes and Python values, never the contents of a tensor: that would force a device sync.
torch is imported only when a tensor is checked, so that the help of the command line is quick.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard

from batchtrim.errors import InstallExtra, PassUnreducedLosses, ScheduleOutOfRange, install_hint, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def first_line(error: BaseException, most: int = 160) -> str:
    """Return the first line of an error's message; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def in_one_line(error: BaseException, most: int = 200) -> str:
    """Return an error's type and the first line of its message."""
    line, name = first_line(error, most), type(error).__name__
    return name if line == name else f"{name}: {line}"


def describe(value: object) -> str:
    """Return a description of what arrived, in one line: shape and dtype of a tensor or array, otherwise the value."""
    if _is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if type(value).__name__ == "ndarray" and value.ndim:  # type: ignore[attr-defined]
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"  # type: ignore[attr-defined]
    if isinstance(value, (tuple, list)) and any(map(_is_tensor, value)):
        more = f", ... ({len(value)} in all)" if len(value) > 4 else ""
        return f"a {type(value).__name__} of {', '.join(describe(each) for each in value[:4])}{more}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    torch = sys.modules.get("torch")  # if torch is not imported, there is no tensor
    return torch is not None and isinstance(value, torch.Tensor)


def plain(value: Any) -> Any:
    """Return a NumPy number, or an array or tensor of one entry, as a Python number; anything else unchanged."""
    if hasattr(value, "item"):
        with contextlib.suppress(ValueError, RuntimeError, TypeError):  # it has several entries
            return value.item()
    return value


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """True if a value is a number, and neither NaN nor infinite."""
    return is_number(value) and math.isfinite(value)


def check_number(name: str, value: Any, hint: str = "") -> float:
    value = plain(value)
    if not is_number(value):
        raise TypeError(f"expected `{name}` to be a number, got {describe(value)}.{_space(hint)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"expected `{name}` below 1e308, got an integer beyond it.{_space(hint)}") from None


def check_within(name: str, value: float, dtype: torch.dtype) -> None:
    """Check that the losses' dtype can hold a number: float16 ends at 65504."""
    import torch

    largest = torch.finfo(dtype).max
    if math.isfinite(value) and abs(value) > largest:
        raise ValueError(
            f"expected `{name}` within {dtype}, up to {largest:g}, got {value:g}. Give losses in float32 for more."
        )


def check_keep(name: str, value: Any) -> float:
    """Check a keep fraction, in (0, 1]."""
    hint = "It is a fraction of the batch, not a percentage or a count."
    value = check_number(name, value, hint)
    if not 0.0 < value <= 1.0:  # NaN fails this too
        raise ValueError(f"expected `{name}` in (0, 1], got {_shown(value)}. {hint}")
    return value


def check_fraction(name: str, value: Any, hint: str = "") -> float:
    """Check a fraction in [0, 1)."""
    value = check_number(name, value, hint)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"expected `{name}` in [0, 1), got {_shown(value)}.{_space(hint)}")
    return value


def check_part(name: str, value: Any, hint: str = "") -> float:
    """Check a fraction in [0, 1]."""
    value = check_number(name, value, hint)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"expected `{name}` in [0, 1], got {_shown(value)}.{_space(hint)}")
    return value


def check_ordered(low_name: str, low: float, high_name: str, high: float) -> None:
    if low > high:
        raise ValueError(
            f"expected `{low_name}` up to `{high_name}`, got {_shown(low)} and {_shown(high)}. Are they swapped?"
        )


def check_not_below(name: str, low: float, limit: float, rounding: float, user: str) -> None:
    """Check the smallest of some values against a lower limit, up to ``rounding``; NaN passes."""
    if low < limit - rounding:
        offset = " Is `offset` larger than the loss's own floor?" if limit else ""
        raise ValueError(
            f"expected `{name}` of at least {limit:g} for {user}, got {_shown(low)}. Losses that can be negative "
            f"(likelihoods of densities, rewards) have no mass to take a share of: rank by a loss that cannot, with "
            f"rank_by=..., or use another rule such as batchtrim.hardest().{offset}"
        )


def takes(function: Callable[..., Any], count: int) -> bool:
    """False if a function certainly cannot be called with so many arguments by position."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def check_rule(name: str, value: Any) -> None:
    """Check a selection rule: an instance, not its class."""
    if isinstance(value, type):
        raise TypeError(
            f"expected `{name}` to be a selection rule, got the class {value.__name__}. Give an instance: "
            f"{value.__name__}(...)."
        )
    if not callable(value):
        raise TypeError(f"expected `{name}` to be a selection rule such as batchtrim.hardest(), got {describe(value)}.")
    if not takes(value, 3):
        raise TypeError(
            f"expected `{name}` to be a selection rule such as batchtrim.hardest(), got {describe(value)}, which "
            "cannot be called with (losses, keep, generator) as a rule is."
        )


def check_criterion(name: str, value: Any) -> None:
    """Check a callable loss: an instance, not its class, nor a functools.partial of the class."""
    if not callable(value):
        raise TypeError(f"expected `{name}` to be callable, got {describe(value)}.")
    made = value.func if isinstance(value, functools.partial) else value
    if isinstance(made, type):
        from torch import nn

        prefix = "nn." if getattr(nn, made.__name__, None) is made else ""
        settings = "" if made is value else "..."
        raise TypeError(
            f"expected `{name}` to be a loss to call on a batch, got the class {made.__name__}. "
            f"Give an instance: {prefix}{made.__name__}({settings})."
        )


def check_stateless(name: str, rule: object) -> None:
    """Check that a rule has no state: a rule inside another is not part of a trimmer's state."""
    if hasattr(rule, "state_dict"):
        raise ValueError(
            f"expected `{name}` to be a rule without state, got {describe(rule)}. Its state would be lost on resume."
        )


def check_progress(name: str, value: Any) -> float:
    return check_part(name, value, "Progress is the share of training done.")


def check_positive(name: str, value: Any, hint: str = "") -> float:
    value = check_number(name, value, hint)
    if not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"expected `{name}` to be positive and finite, got {_shown(value)}.{_space(hint)}")
    return value


def check_count(name: str, value: Any, minimum: int = 1, hint: str = "") -> int:
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected `{name}` to be an int, got {describe(value)}.{_space(hint)}")
    if value < minimum:
        raise ValueError(f"expected `{name}` to be at least {minimum}, got {value}.{_space(hint)}")
    if value >= 2**63:
        raise ValueError(f"expected `{name}` to fit in 64 bits, got {describe(value)}.{_space(hint)}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """Return a flag that is True or False; raise an error for anything else: "no" is true in Python."""
    if not isinstance(value, bool):
        raise TypeError(f"expected `{name}` to be True or False, got {describe(value)}.")
    return value


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    choices = list(choices)
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"expected `{name}` to be one of {listed}, got {describe(value)}.{nearest(value, choices)}")
    return value


def check_schedule_output(schedule: object, at: str, value: Any) -> float:
    """Return a schedule's value as a keep fraction; ``at`` names the point, as in ``progress 0.5``."""
    value = plain(value)
    if not is_number(value) or not 0.0 < value <= 1.0:
        raise ScheduleOutOfRange(
            f"expected the keep schedule to return a fraction in (0, 1], got {describe(value)} at {at} "
            f"from {describe(schedule)}. It is called with a number in [0, 1] and returns the fraction of the batch "
            "to keep."
        )
    return float(value)


def check_losses(losses: Any, name: str = "losses", *, allow_empty: bool = False) -> None:
    """Check un-reduced losses: a floating-point tensor whose first dimension is the batch."""
    import torch

    if not isinstance(losses, torch.Tensor):
        cure = tensor_cure(losses) if name == "losses" else ""
        raise TypeError(f"expected `{name}` to be a tensor, got {describe(losses)}.{cure}")
    if losses.ndim == 0:
        raise PassUnreducedLosses(
            f"expected `{name}` to have shape (B,), one loss per sample, got (). "
            "Did the loss function average already? Pass reduction='none', or wrap it in batchtrim.per_sample."
        )
    dtype = losses.dtype
    if not dtype.is_floating_point:
        raise TypeError(
            f"expected `{name}` to be floating point, got dtype {dtype}. "
            "Are these labels or counts? Losses come from a criterion with reduction='none'."
        )
    if dtype.itemsize == 1:
        raise TypeError(f"expected `{name}` in half precision or more, got dtype {dtype}. Convert: losses.float().")
    if type(losses).__name__ == "MaskedTensor":
        raise TypeError(
            f"expected `{name}` to be a plain tensor, got a MaskedTensor. Give its parts: "
            "trim(losses.get_data(), mask=losses.get_mask())."
        )
    if losses.layout is not torch.strided or losses.is_nested:
        raise TypeError(
            f"expected `{name}` to be dense, got {'a nested tensor' if losses.is_nested else losses.layout}. "
            "Make it dense (to_dense(), to_padded_tensor(0.0)) and mask the entries that are padding with mask=."
        )
    if not allow_empty and losses.numel() == 0:
        raise ValueError(
            f"expected `{name}` to hold at least one sample, got shape {tuple(losses.shape)}. "
            "Skip empty batches, or filter them out in the data loader."
        )


def without_values(tensor: Tensor) -> bool:
    """True if a tensor has a shape and a dtype only: on the meta device, or of torch's FakeTensorMode."""
    import torch

    if type(tensor) is torch.Tensor or tensor.is_meta:
        return tensor.is_meta
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def check_has_values(name: str, tensor: Tensor, user: str) -> None:
    """Raise an error for a tensor without values, where ``user`` has to read them."""
    if without_values(tensor):
        kind = "on the meta device" if tensor.is_meta else "of FakeTensorMode"
        raise TypeError(
            f"expected `{name}` with values for {user}, got a tensor {kind}, which has a shape only. Pass real "
            "tensors; to try shapes alone, use batchtrim.hardest(), and neither a mask nor ignored targets."
        )


def tensor_cure(value: Any) -> str:
    """Return how to get the tensor of losses out of what arrived, with a space before it."""
    if isinstance(value, Mapping):
        return " Add the terms, one loss per sample each: sum(losses.values())."
    if isinstance(value, (tuple, list)):
        return " Stack one loss per sample (torch.stack), or add up several terms."
    if type(value).__name__ == "ndarray":
        return " Call the trimmer on the tensor, before .numpy(): an array has no gradient."
    if not _is_tensor(getattr(value, "values", None)):
        return ""
    more = not getattr(value, "terms", ()) and any(
        getattr(value, part, None) is not None for part in ("mask", "weights")
    )
    keeps = " dataclasses.replace(losses, values=...) keeps its mask and weights." if more else ""
    return f" They are its values: losses.values.{keeps}"


def check_like(name: str, value: Any, losses: Tensor, dtype: torch.dtype | None = None) -> None:
    """Check a tensor that goes with the losses: the same shape, and the given dtype if there is one."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"expected `{name}` to be a tensor, got {describe(value)}.")
    if value.shape != losses.shape:
        raise ValueError(
            f"expected `{name}` to have the shape of `losses`, {tuple(losses.shape)}, got {tuple(value.shape)}. "
            f"{_to_shape(name, tuple(value.shape), tuple(losses.shape))}"
        )
    if dtype is not None and value.dtype != dtype:
        cure = f" Convert: {name}.bool()." if str(dtype) == "torch.bool" else ""
        raise TypeError(f"expected `{name}` to have dtype {dtype}, got {value.dtype}.{cure}")


def _to_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Return what to do with a tensor of another shape than the losses'; an expression only if it gives their shape."""
    missing = len(wanted) - len(shape)
    if [size for size in shape if size != 1] == [size for size in wanted if size != 1]:
        return f"Reshape it: {name}.reshape(losses.shape)."
    if missing > 0 and shape == wanted[:-missing]:  # one per sample, even if there are as many tokens as samples
        name += f"[...{', None' * missing}]"
    elif missing or any(size not in (1, other) for size, other in zip(shape, wanted, strict=True)):
        return "Each loss needs one of its own."
    return f"Expand it, so that each loss has one of its own: {name}.expand_as(losses)."


def check_integers(name: str, value: Any, losses: Tensor) -> None:
    """Check a tensor of one integer per loss; bools are a mask, not integers."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"expected `{name}` to be a tensor, got {describe(value)}.")
    whole = not (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype is torch.bool)
    if value.shape != losses.shape or not whole:
        raise ValueError(
            f"expected `{name}` to be integers of shape {tuple(losses.shape)}, one per sample, got {describe(value)}."
        )


def check_state(state: Any, names: Iterable[str], what: str) -> None:
    """Check a state to load: a dict with at least these entries."""
    missing = [name for name in names if not isinstance(state, dict) or name not in state]
    if missing:
        got = f"one without '{missing[0]}'" if isinstance(state, dict) else describe(state)
        raise ValueError(f"expected the state of {what}, got {got}. It was saved by something else, or is damaged.")


def import_extra(module: str, extra: str, wanted_by: str) -> ModuleType:
    """Import an optional library, or say which extra of batchtrim brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != root:
            raise  # the library is installed but broken: its own message says more than ours would
        there = getattr(sys.modules.get(root), "__file__", None)
        if there is not None and module != root:
            raise ImportError(
                f"{wanted_by} needs `{module}`, which {there} lacks. If that file hides the library, rename it."
            ) from error
        raise InstallExtra(f"{wanted_by} needs `{root}`, which is not installed. {install_hint(extra)}") from error


def _shown(value: float) -> str:
    """Return a number in a few digits if that loses nothing, otherwise in full: 1.0000001 is not 1."""
    return f"{value:g}" if float(f"{value:g}") == value or value != value else repr(value)


def _space(hint: str) -> str:
    return f" {hint}" if hint else ""
