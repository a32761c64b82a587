"""Ask torch about an operator: its decomposition, and whether zeros give zeros."""

from __future__ import annotations

# pyright: reportAttributeAccessIssue=false
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["decomposed", "zeros_at_zero"]


def decomposed(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], known: Callable[[Tensor], Any], inner: Callable[..., Any]
) -> list[Any] | None:
    """Run an operator's decomposition on tensors without data; return None if it has no decomposition.

    Args:
        known: what is known of each tensor among the arguments.
        inner: ``(func, args, kwargs, outputs, known) -> [fact, ...]`` about each output of an operator inside.

    Returns:
        What is known of each output.
    """
    table = torch._decomp.decomposition_table
    if func in table:
        run = table[func]
    elif torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        run = func.decompose
    else:
        return None
    args = [list(arg) if isinstance(arg, list) else arg for arg in args]  # a graph's own arguments must not be changed
    fakes = [arg for arg in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(arg, Tensor)]
    if not fakes:
        return None
    mode = fakes[0].fake_mode  # type: ignore[attr-defined]
    facts = _Facts(known, inner)
    quiet = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with mode, quiet, facts:
        outputs = run(*args, **kwargs)
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    return [facts.of(output) if isinstance(output, Tensor) else None for output in outputs]


def zeros_at_zero(func: Any, args: dict[str, Any], zeros: Mapping[str, tuple[Sequence[int], Any]]) -> list[bool]:
    """Return which outputs of an operator are zero if all its operands are; none if that is unknown.

    The operator is run, since its numbers matter: ``relu(0)`` is zero, ``clamp_min(0, 0.1)`` is not.

    Args:
        args: by name.
        zeros: names of operands, their sizes and types.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    try:
        with _disable_current_modes(), torch.no_grad():
            given = args | {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in zeros.items()}
            arguments = func._schema.arguments
            positional = [given[each.name] for each in arguments if not each.kwarg_only]
            outputs = func(*positional, **{each.name: given[each.name] for each in arguments if each.kwarg_only})
            outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            return [not bool(output.any()) for output in outputs]
    except Exception:  # it does not take such operands, or one of its numbers is not known yet
        return []


class _Facts(TorchDispatchMode):
    """Record the facts known about every tensor that operators inside the block produce."""

    def __init__(self, known: Callable[[Tensor], Any], inner: Callable[..., Any]) -> None:
        super().__init__()
        self.known = known
        self.inner = inner
        self.facts: dict[int, tuple[Tensor, Any]] = {}

    def of(self, tensor: Tensor) -> Any:
        found = self.facts.get(id(tensor))
        return self.known(tensor) if found is None else found[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        tensors = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        if any(isinstance(each, Tensor) for each in tensors):
            for tensor, fact in zip(tensors, self.inner(func, args, kwargs, outputs, self.of), strict=True):
                if isinstance(tensor, Tensor):
                    self.facts[id(tensor)] = (tensor, fact)
        return outputs
