"""Losses under torch.func: a choice is made from plain numbers, or with fixed shapes where there are many of it.

``torch.func.grad`` and its like wrap a tensor and compute with its numbers; ``torch.vmap`` wraps many tensors in one,
of which no number can be read.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from batchtrim.unreduced import Losses

__all__ = ["batched", "fixed_shapes", "in_backward", "outside", "plain", "settled", "transforming"]

_func = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
transforming = torch._C._are_functorch_transforms_active  # pyright: ignore[reportAttributeAccessIssue]
in_backward = torch._C._current_graph_task_id  # -1 outside of a backward pass


def batched(tensor: Tensor | None) -> bool:
    """True if a tensor stands for many, inside of torch.vmap."""
    while tensor is not None and _func.is_functorch_wrapped_tensor(tensor):
        if _func.is_batchedtensor(tensor):
            return True
        tensor = _func.get_unwrapped(tensor)
    return False


def fixed_shapes(rule: object, scope: str, losses: Losses, scores: Tensor) -> bool:
    """True if a form of fixed shapes is needed and the rule has one: in a compiled function, and inside of torch.vmap.

    A rule whose k follows from the losses checks them, which torch.vmap cannot.
    """
    if scope != "local" or not hasattr(rule, "compiled_mask"):
        return False
    if torch.compiler.is_compiling():
        return True
    return (batched(losses.values) or batched(scores)) and not getattr(rule, "k_follows_losses", False)


def plain(tensor: Tensor, what: str) -> Tensor:
    """Return the tensor inside of torch.func's wrappers, detached.

    Raises:
        TypeError: there are many, inside of torch.vmap.
    """
    if batched(tensor):
        raise TypeError(
            f"expected losses of one batch for {what}, got those of many, inside of torch.vmap. There "
            "trim(losses) works for the rules hardest and between with scope='local'; otherwise return the "
            "un-reduced losses from the mapped function, and call the trimmer on each batch of them."
        )
    tensor = tensor.detach()
    while _func.is_functorch_wrapped_tensor(tensor):
        tensor = _func.get_unwrapped(tensor)
    return tensor


def outside() -> AbstractContextManager[Any]:
    """Leave the transforms: inside, whatever is computed of plain tensors is plain, and may be kept and drawn."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def settled(losses: Losses, scores: Tensor, what: str) -> tuple[Losses, Tensor]:
    """Return losses and scores without torch.func's wrappers, to choose from."""
    parts = {name: getattr(losses, name) for name in ("values", "mask", "weights", "counts")}
    found = {name: None if part is None else plain(part, what) for name, part in parts.items()}
    return replace(losses, **found), plain(scores, what)
