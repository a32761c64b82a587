"""Rules of matrix products: each is an ``einsum``, in which rows lie along a letter."""

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
    if bias is None or isinstance(bias.layout, Whole):
        if bias is not None and isinstance(layout, RowLayout) and not bias.zero:
            return replace(layout, vanish=False)
        return layout
    if not isinstance(layout, RowLayout):
        raise Mixes("it puts different rows together")
    product_ = Value(call.out.shape, layout)
    return RowLayout(aligned(call, call.out, [bias, product_]), layout.vanish and bias.zero)


@rule("_cdist_backward")
def distances(call: Call) -> Layout:
    """Sum ``grad[p, r] * f(x1[p], x2[r])`` over r, where f is a distance's derivative; only ``grad`` makes it zero."""
    grad, x1, x2, found = (call[name] for name in ("grad", "x1", "x2", "cdist"))
    if not x1.shape[:-2] == x2.shape[:-2] == grad.shape[:-2]:
        raise Mixes("its operands are broadcast")
    batch = "abcdefgh"[: x1.ndim - 2]
    inputs = [batch + letters for letters in ("pr", "pm", "rm", "pr")]
    others = [replace(each, layout=_not_zero(each.layout)) for each in (x1, x2, found)]
    return contract(call.symbols, inputs, batch + "pm", [grad, *others])


def _not_zero(layout: Layout) -> Layout:
    return replace(layout, vanish=False) if isinstance(layout, RowLayout) else Whole()


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
