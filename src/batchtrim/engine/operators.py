"""What the shared engine has to know about an operator: whether to remember it, and what it writes to."""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LIKE", "Facts", "Kind", "dropout_inside", "facts", "tensors_in", "written_tensors"]


class Kind(enum.Enum):
    PLAIN = enum.auto()  # cheap: computed again for the kept rows
    COSTLY = enum.auto()  # its output is remembered
    ATTENTION = enum.auto()  # likewise, unless it draws dropout from a seed inside
    RANDOM = enum.auto()  # its draw is remembered, for the second pass to see the same
    NUMBER = enum.auto()  # a tensor read as a Python number: control flow must go the same way twice
    BATCH_NORM = enum.auto()  # its statistics are remembered
    RECURRENT = enum.auto()  # computed again, unless it draws dropout inside
    COLLECTIVE = enum.auto()  # talks to other processes: cannot run twice


@dataclass(frozen=True)
class Facts:
    """What is known of one operator."""

    kind: Kind
    writes: tuple[tuple[int, str], ...]  # position and name of the arguments it changes in place
    draws: bool  # tagged as drawing random numbers
    reads: bool  # looks at its arguments' values, not only at their memory or form


_KINDS = {
    Kind.COSTLY: {
        "aten::convolution",
        "aten::_convolution",
        "aten::convolution_overrideable",
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::linear",
        "aten::_scaled_mm",
        "aten::_addmm_activation",
        "mkldnn::_linear_pointwise",
    },
    Kind.ATTENTION: {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
    },
    Kind.BATCH_NORM: {"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"},
    Kind.RECURRENT: {"aten::_cudnn_rnn", "aten::miopen_rnn", "aten::mkldnn_rnn_layer"},
    Kind.NUMBER: {"aten::_local_scalar_dense"},
}
_BY_NAME = {name: kind for kind, names in _KINDS.items() for name in names}

# A tensor of an argument's form, and operators that take no more than the form.
LIKE = {f"aten::{kind}_like" for kind in ("empty", "zeros", "ones", "full")}
_OF_THE_FORM = LIKE | {"aten::rand_like", "aten::randn_like", "aten::new_empty_strided"}
_OF_THE_FORM |= {f"aten::new_{kind}" for kind in ("empty", "zeros", "ones", "full")}


@functools.cache
def facts(func: Any) -> Facts:
    """The facts of an operator overload, looked up once."""
    schema = func._schema
    writes = tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    draws = torch.Tag.nondeterministic_seeded in func.tags
    kind = _BY_NAME.get(schema.name)
    if kind is None:
        kind = Kind.COLLECTIVE if "c10d" in func.namespace else Kind.RANDOM if draws else Kind.PLAIN
    # who asks for `detach` is going to look; torch does not call `_unsafe_view` a view
    view = (func.is_view and schema.name != "aten::detach") or schema.name == "aten::_unsafe_view"
    return Facts(kind, writes, draws, not view and schema.name not in _OF_THE_FORM)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operator's arguments, and in its lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found


def written_tensors(known: Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments that the operator changes in place."""
    return tensors_in(args[position] if position < len(args) else kwargs.get(name) for position, name in known.writes)


def argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, default: Any = None) -> Any:
    """An argument by name, given by position or by keyword."""
    for position, declared in enumerate(func._schema.arguments):
        if declared.name == name:
            if name in kwargs:
                return kwargs[name]
            return args[position] if position < len(args) else declared.default_value
    return default


def dropout_inside(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a fused operator draws dropout from a seed of its own, which cannot be drawn again for some rows."""
    for name in ("dropout_p", "dropout"):
        if argument(func, args, kwargs, name, 0.0):
            return bool(argument(func, args, kwargs, "train", True))
    return False
