"""Rules of the attention kernels, and which operators draw random numbers.

A fused kernel draws its dropout from a seed, by the position of each row in the batch. So its backward, which draws it
again, keeps rows apart and yet has to run on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from batchtrim.engine.graphs import name_of
from batchtrim.engine.layout import Axis, Layout, Mixes, RowLayout, Whole
from batchtrim.engine.rules import Call, Value, aligned, holds, rule
from batchtrim.engine.rules_nn import only_batch, summed_gradients

__all__ = ["draws", "draws_by_place"]

_FORWARD = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
)  # fmt: skip
_BACKWARD = tuple(f"{name}_backward" for name in _FORWARD)


@rule(*_FORWARD)
def attention(call: Call) -> list[Layout]:
    axes = _axes(call, [call["query"], call["key"], call["value"]])
    layouts: list[Layout] = []
    for output in call.outputs:  # log-sum-exp and random states too
        tall = output is not None and output.ndim >= 2 and holds(output.shape, call.symbols)
        layouts.append(RowLayout(axes) if tall else Whole())
    return layouts


@rule(*_BACKWARD)
def attention_backward(call: Call) -> list[Layout]:
    gradient = call.values[0]
    axes = _axes(call, [gradient, *(call[name] for name in ("query", "key", "value", "out"))])
    sums = call["logsumexp"]  # it has no last dimension, so it cannot be aligned with the others
    if sums is not None and isinstance(sums.layout, RowLayout) and sums.layout.axes != axes:
        raise Mixes("it combines different rows")
    layouts: list[Layout] = [RowLayout(axes, gradient.zero)] * 3
    if len(call.outputs) > 3:  # of the mask
        mask = call["attn_bias"]
        if call.outputs[3] is None:
            layouts.append(Whole())
        elif mask is not None and isinstance(mask.layout, RowLayout):
            layouts.append(replace(mask.layout, vanish=gradient.zero))
        else:
            layouts.append(summed_gradients(call, gradient))
    return layouts


def _axes(call: Call, values: list[Value]) -> tuple[Axis | None, ...]:
    axes = only_batch(call, list(values), (0, 1))
    mask = call["attn_mask"] or call["attn_bias"]
    if mask is not None and isinstance(mask.layout, RowLayout):
        aligned(call, values[0], [values[0], mask])
    return axes


# --- dropout ---------------------------------------------------------------------------------------------------------


def draws(func: Any) -> bool:
    """True if an operator draws new random numbers; attention's backward repeats those of its forward, if any."""
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()) and name_of(func) not in _BACKWARD


def draws_by_place(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True if an operator draws numbers from a seed by the position of a row, so that it has to run on all rows."""
    if name_of(func) not in _BACKWARD:
        return False
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return given.get("dropout_p", 0.0) != 0.0  # also for a number that is not known yet
