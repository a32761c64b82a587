"""Losses under torch.func: choose from plain tensors, or with fixed shapes under torch.vmap.

``torch.func.grad`` and the like wrap one tensor, whose values can be read. ``torch.vmap`` wraps a batch of tensors in
one, whose values cannot.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from batchtrim.selection.base import k_follows_losses
from batchtrim.unreduced import Losses

__all__ = [
    "batched",
    "compiling",
    "fixed_shapes",
    "in_backward",
    "outside",
    "transforming",
    "unwrapped",
    "unwrapped_losses",
]

_func = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
transforming = torch._C._are_functorch_transforms_active  # pyright: ignore[reportAttributeAccessIssue]
_modes = torch._C._len_torch_dispatch_stack
in_backward = torch._C._current_graph_task_id  # -1 outside of a backward pass


def compiling() -> bool:
    """True if this thread is compiled or exported.

    ``torch.compiler.is_compiling`` is True in every thread while one compiles. An export that runs the model's own
    Python sees its operators by modes, which are of a thread.
    """
    return is_dynamo_compiling() or (_modes() > 0 and is_compiling())


def batched(tensor: Tensor | None) -> bool:
    """True if torch.vmap wraps many tensors in this one."""
    while tensor is not None and _func.is_functorch_wrapped_tensor(tensor):
        if _func.is_batchedtensor(tensor):
            return True
        tensor = _func.get_unwrapped(tensor)
    return False


def fixed_shapes(rule: object, scope: str, losses: Losses, scores: Tensor) -> bool:
    """True if the choice needs fixed shapes (in a compiled function, under torch.vmap) and the rule has such a form.

    Under torch.vmap, a rule whose k depends on the losses has none: it has to check their values.
    """
    if scope != "local" or not hasattr(rule, "compiled_mask"):
        return False
    if compiling():
        return True
    return (batched(losses.values) or batched(scores)) and not k_follows_losses(rule)


def unwrapped(tensor: Tensor, what: str) -> Tensor:
    """Return the plain tensor inside one of torch.func's, detached.

    Args:
        what: names the caller in the error.

    Raises:
        TypeError: torch.vmap wraps many tensors in it.
    """
    if batched(tensor):
        raise TypeError(
            f"expected losses of one batch for {what}, got those of many, inside torch.vmap. There "
            "trim(losses) works for the rules hardest and between with scope='local'; otherwise return the "
            "un-reduced losses from the mapped function, and call the trimmer on each batch of them."
        )
    tensor = tensor.detach()
    while _func.is_functorch_wrapped_tensor(tensor):
        tensor = _func.get_unwrapped(tensor)
    return tensor


def outside() -> AbstractContextManager[Any]:
    """Suspend the transforms: inside the block, plain tensors give plain results, and random numbers can be drawn."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def unwrapped_losses(losses: Losses, scores: Tensor, what: str) -> tuple[Losses, Tensor]:
    """Return losses and scores as plain tensors, which a rule can choose from; see :func:`unwrapped`."""
    parts = {name: getattr(losses, name) for name in ("values", "mask", "weights", "counts")}
    found = {name: None if part is None else unwrapped(part, what) for name, part in parts.items()}
    return replace(losses, **found), unwrapped(scores, what)
