"""Losses under torch.func: choose from plain tensors, or with fixed shapes under torch.vmap. Refuse recordings.

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
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from batchtrim.selection.base import k_follows_losses
from batchtrim.unreduced import Losses

__all__ = [
    "batched",
    "check_live",
    "compiling",
    "fixed_shapes",
    "in_backward",
    "outside",
    "plain_losses",
    "transforming",
    "unwrapped",
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


def check_live() -> None:
    """Raise TypeError where the operators of this call are recorded, to be run again with other losses."""
    if is_tracing():
        raise TypeError(
            "expected a trimmer outside of torch.jit.trace, which would keep the rows of its example in every "
            "batch. Trace the model alone; torch.compile and torch.export take a trimmer too."
        )
    if not compiling() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise TypeError(
            "expected a trimmer outside of a CUDA graph, which would keep as many rows in every batch, and the rows "
            "of one random draw. Capture the model alone (torch.cuda.make_graphed_callables), or compile it with "
            "mode='reduce-overhead'."
        )


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


def plain_losses(losses: Losses, scores: Tensor, what: str) -> tuple[Losses, Tensor]:
    """Return losses and scores as plain tensors, which a rule can choose from; see :func:`unwrapped`."""
    parts = {name: getattr(losses, name) for name in ("values", "mask", "weights", "counts")}
    found = {name: None if part is None else unwrapped(part, what) for name, part in parts.items()}
    terms = tuple(plain_losses(term, term.values, what)[0] for term in losses.terms)
    return replace(losses, **found, terms=terms), unwrapped(scores, what)
