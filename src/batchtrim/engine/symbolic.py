"""Symbolic sizes of a trace, and its tensors without data."""

from __future__ import annotations

# pyright: reportAttributeAccessIssue=false
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

__all__ = ["as_symbolic", "expression_of", "new_size", "restrided", "without_data"]


def expression_of(value: Any) -> Any:
    """Return a symbolic number as a sympy expression, or as an int if it is one; anything else unchanged."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    node = value.node
    found = node.shape_env.replace(node.expr) if node.shape_env is not None else node.expr
    return int(found) if isinstance(found, sympy.Integer) else found


def new_size(like: Tensor, hint: int) -> tuple[Tensor, Any]:
    """Return an int64 vector without data whose length is a new symbol, and that length."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    mode = like.fake_mode
    frozen, mode.shape_env.frozen = mode.shape_env.frozen, False
    try:
        rows = mode.from_tensor(
            torch.empty(max(hint, 2), dtype=torch.int64, device=like.device),
            symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC]),
            source=ConstantSource("kept_rows"),
        )
    finally:
        mode.shape_env.frozen = frozen
    return rows, rows.shape[0]


def as_symbolic(value: Any, like: Tensor) -> Any:
    """Return an expression as a symbolic size of the trace that ``like`` belongs to."""
    if not isinstance(value, sympy.Expr) or value.is_Integer:
        return int(value)
    return like.fake_mode.shape_env.create_symintnode(value, hint=None)


def without_data(like: Tensor) -> Any:
    """Return the mode in which operators make tensors without data, as those of a trace."""
    return like.fake_mode


def restrided(tensor: Tensor, strides: Sequence[Any] | None) -> Tensor:
    """Return a tensor without data of the same size with other strides."""
    if strides is None:
        return tensor
    with tensor.fake_mode:
        steps = [as_symbolic(expression_of(each), tensor) for each in strides]
        return torch.empty_strided(tensor.shape, steps, dtype=tensor.dtype, device=tensor.device)
