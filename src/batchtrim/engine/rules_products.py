"""Rules of matrix products, each an ``einsum`` in which rows lie along a letter, and of stacked matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from batchtrim.engine.graphs import name_of
from batchtrim.engine.layout import Axis, Layout, Mixes, RowLayout, Whole
from batchtrim.engine.rules import Call, Value, aligned, rule, same_axis

__all__ = ["contract"]

_CONTRACTIONS = {
    "mm": "ab,bc->ac", "bmm": "nab,nbc->nac", "mv": "ab,b->a", "dot": "a,a->", "addmm": "ab,bc->ac",
    "baddbmm": "nab,nbc->nac", "addmv": "ab,b->a", "addbmm": "nab,nbc->ac",
}  # fmt: skip


@rule(*_CONTRACTIONS)
def contraction(call: Call) -> Layout:
    name = name_of(call.func)
    inputs, out = _CONTRACTIONS[name].split("->")
    values = call.values
    bias = values.pop(0) if name.startswith(("add", "badd")) else None
    layout = contract(call.symbols, inputs.split(","), out, values)
    if bias is None or not isinstance(layout, RowLayout):
        return layout
    return RowLayout(aligned(call, call.out, [bias, Value(call.out.shape, layout)]), layout.vanish and bias.zero)


@rule("_cdist_forward")
def distances(call: Call) -> Layout:
    """Compare ``x1[p]`` with ``x2[r]`` over their features m: distances are not zero where a point is."""
    points = [_not_zero(call["x1"]), _not_zero(call["x2"])]
    return contract(call.symbols, _letters(points, "pm", "rm"), _letters([call.out], "pr")[0], points)


@rule("_cdist_backward")
def distances_backward(call: Call) -> Layout:
    """Sum ``grad[p, r] * f(x1[p], x2[r])`` over r, where f is a distance's derivative; only ``grad`` makes it zero."""
    grad, *others = call.values  # torch 2.14 calls the first grad_output
    values = [grad, *map(_not_zero, others)]
    return contract(call.symbols, _letters(values, "pr", "pm", "rm", "pr"), _letters([call.out], "pm")[0], values)


def _not_zero(value: Value) -> Value:
    layout = value.layout
    return replace(value, layout=replace(layout, vanish=False) if isinstance(layout, RowLayout) else Whole())


def _letters(values: Sequence[Value], *last: str) -> list[str]:
    """Return the letters of each value: its last two, and before them those of the dimensions that are broadcast."""
    return ["abcdefgh"[8 - (value.ndim - 2) :] + each for value, each in zip(values, last, strict=True)]


def contract(symbols: Sequence[Any], inputs: Sequence[str], out: str, values: Sequence[Value]) -> Layout:
    """Apply ``einsum`` to values: rows must lie along one letter; a summed letter needs rows that vanish."""
    axes: list[Axis | None] = []
    summed: list[bool] = []
    for i in range(len(symbols)):
        letter, place, holders = None, None, 0
        for value, letters in zip(values, inputs, strict=True):
            axis = value.layout.axes[i] if isinstance(value.layout, RowLayout) else None
            if axis is None:
                continue
            if letter is not None and letters[axis.dim] != letter:
                raise Mixes("it multiplies rows with rows")
            letter = letters[axis.dim]
            place = same_axis(place, replace(axis, dim=0))
            holders += 1
        summed.append(letter is not None and letter not in out)
        axes.append(None if letter is None or letter not in out else replace(place, dim=out.index(letter)))  # type: ignore[type-var]
    vanish = any(value.zero for value in values)
    if not any(summed):
        return RowLayout(tuple(axes), vanish)
    if not all(summed):
        raise Mixes("it sums over some rows")
    if not vanish:
        raise Mixes("it sums over the rows")
    return Whole()


# --- stacked matrices ------------------------------------------------------------------------------------------------

# the operands, and how many dimensions at their end belong to one matrix (2) or vector (1); the others stack them
_STACKED = {
    "linalg_lu_solve": {"LU": 2, "pivots": 1, "B": 2}, "_linalg_solve_ex": {"A": 2, "B": 2},
    "linalg_solve_triangular": {"self": 2, "B": 2}, "triangular_solve": {"self": 2, "A": 2},
    "cholesky_solve": {"self": 2, "input2": 2}, "linalg_householder_product": {"input": 2, "tau": 1},
    "lu_unpack": {"LU_data": 2, "LU_pivots": 1},
    **{name: {"self": 2} for name in ("linalg_cholesky_ex", "cholesky_inverse", "linalg_matrix_exp")},
    **{name: {"A": 2} for name in ("linalg_inv_ex", "_linalg_eigh", "_linalg_svd", "linalg_qr", "_linalg_det",
                                   "_linalg_slogdet", "linalg_lu_factor_ex", "linalg_lu")},
}  # fmt: skip
# solutions, which are zero if this side of their equations is
_SIDES = {
    "linalg_lu_solve": "B", "_linalg_solve_ex": "B", "linalg_solve_triangular": "B", "triangular_solve": "self",
    "cholesky_solve": "self",
}  # fmt: skip


@rule(*_STACKED)
def stacked(call: Call) -> list[Layout]:
    """Process each matrix of a stack by itself: rows must lie along the dimensions in front of the matrices."""
    name = name_of(call.func)
    stacks: list[Value] = []
    for argument, core in _STACKED[name].items():
        value = call[argument]
        vectors = argument == "B" and name == "_linalg_solve_ex" and value.shape == call["A"].shape[:-1]
        front = value.ndim - (1 if vectors else core)
        if isinstance(value.layout, RowLayout) and any(dim >= front for dim in value.layout.dims):
            raise Mixes("it takes the batch for the rows of a matrix")
        stacks.append(Value(value.shape[:front], value.layout))
    widest = max(stacks, key=lambda value: value.ndim)
    layout = RowLayout(aligned(call, widest, stacks))
    found: list[Layout] = [layout if out is not None and out.shape != (0,) else Whole() for out in call.outputs]
    if name in _SIDES and call[_SIDES[name]].zero:
        found[0] = replace(layout, vanish=True)
    return found
