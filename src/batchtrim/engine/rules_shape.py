"""Rules of the operators that move, split and join dimensions, or run along some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy

from batchtrim.engine.graphs import name_of
from batchtrim.engine.layout import Axis, Layout, Mixes, RowLayout, Size, Whole, exact_ratio, factor_of, product
from batchtrim.engine.rules import (
    Call,
    Value,
    aligned,
    holds,
    not_along,
    one_with_rows,
    only_dim,
    rule,
    zero_outputs,
)

__all__ = ["view_axis"]


# --- shapes ----------------------------------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(call: Call) -> Layout:
    value = call.values[0]
    if not isinstance(value.layout, RowLayout):
        raise Mixes("it makes rows from a tensor without rows")
    axes = [
        None if axis is None else view_axis(axis, symbol, value.shape, call.out.shape)
        for axis, symbol in zip(value.layout.axes, call.symbols, strict=True)
    ]
    return replace(value.layout, axes=tuple(axes))


def view_axis(axis: Axis, symbol: sympy.Symbol, before: Sequence[Size], after: Sequence[Size]) -> Axis:
    """Return where an axis lies once a tensor of one shape is viewed as another."""
    if axis.outer is None:
        return _view_alike(axis, symbol, before, after)
    major = product(before[: axis.dim]) * axis.outer
    minor = axis.inner * product(before[axis.dim + 1 :])
    left: Size = 1
    for dim, size in enumerate(after):
        if holds(size, (symbol,)):
            outer = exact_ratio(major, left)
            inner = exact_ratio(minor, product(after[dim + 1 :]))
            if outer is None or inner is None or exact_ratio(size, outer * (symbol - axis.lost) * inner) != 1:
                break
            return Axis(dim, outer, inner, axis.lost)
        left = left * size
    raise Mixes("it splits the dimension of the rows")


def _view_alike(axis: Axis, symbol: sympy.Symbol, before: Sequence[Size], after: Sequence[Size]) -> Axis:
    """Return where rows that are all alike lie: values repeat along the new dimension as often as along the old one."""
    dim = only_dim(after, symbol, (symbol,)).dim
    period, step = axis.inner * product(before[axis.dim + 1 :]), product(after[dim + 1 :])
    inner = 1 if exact_ratio(step, period) is not None else exact_ratio(period, step)
    within = exact_ratio(product(after[:dim]), product(before[: axis.dim])) is not None
    copies = None if inner is None else exact_ratio(after[dim], symbol * inner)
    if copies is None or not within:
        raise Mixes("it splits the dimension of the rows")
    return Axis(dim, 1 if copies == 1 else None, inner)


@rule("permute")
def permute(call: Call) -> Layout:
    value, layout = one_with_rows(call)
    order = [int(dim) % value.ndim for dim in call["dims"]]
    return layout.moved({old: new for new, old in enumerate(order)})


@rule("transpose", "t")
def transpose(call: Call) -> Layout:
    value, layout = one_with_rows(call)
    if value.ndim < 2:
        return layout
    a, b = (0, 1) if call["dim0"] is None else (call["dim0"] % value.ndim, call["dim1"] % value.ndim)
    order = list(range(value.ndim))
    order[a], order[b] = b, a
    return layout.moved(order)


@rule("unsqueeze")
def unsqueeze(call: Call) -> Layout:
    value, layout = one_with_rows(call)
    at = call["dim"] % (value.ndim + 1)
    return layout.moved([dim + (dim >= at) for dim in range(value.ndim)])


def _dims(given: int | Sequence[int] | None, ndim: int) -> set[int]:
    """Return the dimensions that an argument names: a number or several; None names all."""
    if given is None:
        return set(range(ndim))
    return {dim % ndim for dim in ([given] if isinstance(given, int) else given)}


@rule("squeeze")
def squeeze(call: Call) -> Layout:
    value, layout = one_with_rows(call)
    gone = _dims(call["dim"], value.ndim)
    not_along(layout, list(gone), value.ndim, "it drops the dimension of the rows if there is one row")
    gone = {dim for dim in gone if value.shape[dim] == 1}
    return layout.moved([dim - sum(g < dim for g in gone) for dim in range(value.ndim)])


@rule("expand")
def expand(call: Call) -> Layout:
    """Let a dimension of size 1 become the row dimension: every row then holds the same values."""
    value = call.values[0]
    axes = aligned(call, call.out)
    layout = value.layout
    return RowLayout(axes, value.zero, isinstance(layout, RowLayout) and layout.iota)


@rule("repeat")
def repeat(call: Call) -> Layout:
    """Repeat one copy after another: the rows' dimension gets a factor in front."""
    value = call.values[0]
    repeats = call["repeats"]
    shift = len(repeats) - value.ndim
    axes: list[Axis | None] = []
    for i, symbol in enumerate(call.symbols):
        axis = value.layout.axes[i] if isinstance(value.layout, RowLayout) else None
        if axis is None:
            dims = [d for d, size in enumerate(repeats) if holds(size, (symbol,))]
            if not dims:
                axes.append(None)
                continue
            size = 1 if dims[0] < shift else value.shape[dims[0] - shift]
            if len(dims) > 1 or factor_of(repeats[dims[0]], symbol) != 1:
                raise Mixes("it makes a tensor with rows along two dimensions")
            axes.append(Axis(dims[0], 1, size))
        elif holds(repeats[axis.dim + shift], call.symbols):
            raise Mixes("it makes a tensor with rows along two dimensions")
        else:
            outer = None if axis.outer is None else axis.outer * repeats[axis.dim + shift]
            axes.append(replace(axis, dim=axis.dim + shift, outer=outer))
    return RowLayout(tuple(axes), value.zero)


@rule("slice", "slice_backward")
def slice_(call: Call) -> Layout:
    """Slice along a dimension without rows, or without removing any; tokens may be cut off at the end.

    If a dimension holds all rows several times, whole copies may be taken, and put back among zeros.
    """
    value = call.values[0]
    layout = value.layout
    if not isinstance(layout, RowLayout):
        raise Mixes("it makes rows from a tensor without rows")
    dim = (call["dim"] or 0) % value.ndim
    copies = _copies(call, value, dim)
    if copies is not None and value.shape[dim] != call.out.shape[dim]:
        return copies
    axes = list(layout.axes)
    for i, axis in enumerate(axes):
        if axis is None or axis.dim != dim or value.shape[dim] == call.out.shape[dim]:
            if dim not in layout.dims and holds([call["start"], call["end"]], call.symbols):
                raise Mixes("it computes with the number of rows")
            continue
        lost = call.symbols[i] - call.out.shape[dim]
        if i == 0 or not axis.plain or call["start"] not in (0, None) or call["step"] not in (1, None):
            raise Mixes("it takes some rows and leaves others")
        if not getattr(lost, "is_Integer", True):
            raise Mixes("it takes some rows and leaves others")
        axes[i] = replace(axis, lost=int(lost))
    return replace(layout, axes=tuple(axes))


def _copies(call: Call, value: Value, dim: int) -> Layout | None:
    """Return the layout if a slice, or its backward, takes whole copies of all rows; otherwise None.

    A dimension of size ``outer * s * inner`` holds row b in ``outer`` blocks. Blocks p to q are a slice from
    ``p * s * inner`` on, which then has ``q - p`` of them.
    """
    axis = _one_axis(call, value, dim)
    if axis is None or call["step"] not in (1, None):
        return None
    block = call.symbols[0] * axis.inner
    outer = exact_ratio(call.out.shape[dim], block)
    if not isinstance(outer, int) or outer == 0 or not isinstance(exact_ratio(call["start"] or 0, block), int):
        return None
    return RowLayout((replace(axis, outer=outer),), value.zero)


def _one_axis(call: Call, value: Value, dim: int) -> Axis | None:
    """Return the axis of samples, if they lie along ``dim`` in blocks that can be counted."""
    layout = value.layout
    if len(call.symbols) > 1 or not isinstance(layout, RowLayout) or layout.iota:
        return None
    (axis,) = layout.axes
    return axis if axis is not None and axis.dim == dim and isinstance(axis.outer, int) else None


@rule("select")
def select(call: Call) -> Layout:
    value, layout = one_with_rows(call)
    at = call["dim"] % value.ndim
    not_along(layout, [at], value.ndim, "it takes one row")
    return layout.moved([dim - (dim > at) for dim in range(value.ndim)])


@rule("select_backward")
def select_backward(call: Call) -> Layout:
    value, layout = one_with_rows(call)
    at = call["dim"] % (value.ndim + 1)
    return layout.moved([dim + (dim >= at) for dim in range(value.ndim)])


@rule("split", "split_with_sizes", "unbind", "unsafe_split")
def split(call: Call) -> Layout | list[Layout]:
    value, layout = one_with_rows(call)
    at = (call["dim"] or 0) % value.ndim
    axis = _one_axis(call, value, at)
    if axis is not None and name_of(call.func) != "unbind":
        block = call.symbols[0] * axis.inner
        counts = [exact_ratio(out.shape[at], block) for out in call.outputs if out is not None]
        if all(isinstance(count, int) and count > 0 for count in counts):
            return [replace(layout, axes=(replace(axis, outer=count),)) for count in counts]
    not_along(layout, [at], value.ndim, "it takes the rows apart")
    if name_of(call.func) == "unbind":
        return layout.moved([dim - (dim > at) for dim in range(value.ndim)])
    if holds([out.shape[at] for out in call.outputs if out is not None], call.symbols):
        raise Mixes("it computes with the number of rows")
    return layout


@rule("cat", "stack")
def cat(call: Call) -> Layout:
    values = [value for value in call.values if value.shape != (0,)]
    stacked = name_of(call.func) == "stack"
    at = (call["dim"] or 0) % call.out.ndim
    if stacked:
        values = [
            replace(v, shape=(*v.shape[:at], 1, *v.shape[at:]), layout=_opened(v.layout, at, v.ndim)) for v in values
        ]
    blocks = [None if stacked else _one_axis(call, value, at) for value in values]
    if all(axis is not None and axis.inner == blocks[0].inner for axis in blocks):  # type: ignore[union-attr]
        outer = sum(axis.outer for axis in blocks)  # type: ignore[union-attr]
        return RowLayout((replace(blocks[0], outer=outer),), all(value.zero for value in values))  # type: ignore[type-var]
    axes = aligned(call, call.out, values)
    layout = RowLayout(axes, all(value.zero for value in values))
    not_along(layout, [at], call.out.ndim, "it appends rows to rows")
    return layout


def _opened(layout: Layout, at: int, ndim: int) -> Layout:
    return layout.moved([dim + (dim >= at) for dim in range(ndim)]) if isinstance(layout, RowLayout) else layout


@rule("full", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "rand", "randn",
      "empty_strided", "randint", "new_empty_strided", "empty_permuted")  # fmt: skip
def create(call: Call) -> Layout:
    axes = tuple(
        only_dim(call.out.shape, s, call.symbols) if holds(call.out.shape, (s,)) else None for s in call.symbols
    )
    name = name_of(call.func)
    return RowLayout(axes, "zeros" in name or (name in ("full", "new_full") and call["fill_value"] == 0))


@rule("arange")
def arange(call: Call) -> Layout:
    """Return the rows' positions for 0 to B - 1."""
    if call["start"] not in (None, 0) or call["step"] not in (None, 1) or call.out.shape[0] != call.symbols[0]:
        raise Mixes("it counts rows")
    return RowLayout((Axis(0), *(None,) * (len(call.symbols) - 1)), iota=True)


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(call: Call) -> Layout:
    value, layout = one_with_rows(call)
    widths = call["pad"] if call["pad"] is not None else call["padding"]
    touched = [value.ndim - 1 - i // 2 for i, width in enumerate(widths) if width != 0]
    not_along(layout, touched, value.ndim, "it adds rows")
    return replace(layout, vanish=layout.vanish and not call["value"])


@rule("view_as_real", "view_as_complex")
def view_as_numbers(call: Call) -> Layout:
    return one_with_rows(call)[1]  # the two numbers of an entry lie after all dimensions


@rule("diagonal", "unfold", "as_strided", "as_strided_scatter")
def strided(call: Call) -> Layout:
    value, layout = one_with_rows(call)
    if name_of(call.func) == "unfold":
        not_along(layout, [call["dimension"]], value.ndim)
        return layout
    if name_of(call.func) == "diagonal":
        gone = _of_diagonal(call, value.ndim)
        not_along(layout, gone, value.ndim)
        return layout.moved([dim - sum(g < dim for g in gone) for dim in range(value.ndim)])
    raise Mixes("it reads memory past the shape of its tensor")


@rule("diagonal_scatter", "diagonal_backward")
def to_diagonal(call: Call) -> Layout:
    """Write a diagonal, the last dimension of its operand, into a tensor, or among zeros."""
    base, given = call["self"], call["src"] or call["grad_output"]
    gone = _of_diagonal(call, call.out.ndim)
    others = [dim for dim in range(call.out.ndim) if dim not in gone]
    layout = given.layout
    if isinstance(layout, RowLayout):
        not_along(layout, [-1], given.ndim, "it makes a tensor with rows along two dimensions")
        layout = layout.moved([*others, None])
    spread = Value(call.out.shape, layout)
    found = RowLayout(aligned(call, call.out, [spread] if base is None else [base, spread]))
    not_along(found, gone, call.out.ndim)
    return replace(found, vanish=given.zero and (base is None or base.zero))


def _of_diagonal(call: Call, ndim: int) -> list[int]:
    """Return the two dimensions that a diagonal goes through."""
    return [(call["dim1"] or 0) % ndim, (1 if call["dim2"] is None else call["dim2"]) % ndim]


@rule("slice_scatter", "select_scatter")
def scatter_part(call: Call) -> Layout:
    at = (call["dim"] or 0) % call.out.ndim
    inner = call["src"]
    if name_of(call.func) == "select_scatter":
        inner = replace(
            inner, shape=(*inner.shape[:at], 1, *inner.shape[at:]), layout=_opened(inner.layout, at, inner.ndim)
        )
    axes = aligned(call, call.out, [call["self"], inner])
    layout = RowLayout(axes, call["self"].zero and inner.zero)
    if at not in layout.dims and holds(call["end"], call.symbols):
        raise Mixes("it computes with the number of rows")
    if inner.shape[at] != call.out.shape[at] or name_of(call.func) == "select_scatter":
        not_along(layout, [at], call.out.ndim, "it writes into some rows")
    return layout


# --- along other dimensions ------------------------------------------------------------------------------------------

_ALONG = (
    "_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "flip", "sort", "topk", "roll",
    "mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "logsumexp", "any", "all", "var", "std",
    "var_mean", "std_mean", "linalg_vector_norm", "norm", "_fft_r2c", "_fft_c2r", "_fft_c2c", "cummax", "cummin",
    "logcumsumexp", "median", "kthvalue", "mode", "_softmax_backward_data", "_log_softmax_backward_data", "glu",
    "glu_backward", "linalg_cross", "count_nonzero", "aminmax",
)  # fmt: skip


@rule(*_ALONG)
def along(call: Call) -> list[Layout]:
    """Run over given dimensions, which must not be the rows'."""
    value = call.values[0]
    layout = RowLayout(aligned(call, value))
    dims = next((call[name] for name in ("dim", "dims") if call[name] is not None), None)
    if dims is None or dims == []:
        raise Mixes("it goes over all rows")
    dims = [dim % value.ndim for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
    not_along(layout, dims, value.ndim, "it goes over the rows")
    if call.out.ndim < value.ndim:
        layout = layout.moved([dim - sum(gone < dim for gone in set(dims)) for dim in range(value.ndim)])
    if name_of(call.func).endswith(("_backward", "_backward_data")):
        vanish = [value.zero]
    else:
        vanish = zero_outputs(call) or [False] * len(call.outputs)
    return [replace(layout, vanish=each) for each in vanish]


@rule("sum")
def sum_(call: Call) -> Layout:
    value, layout = one_with_rows(call)
    dims = call["dim"]
    gone = _dims(None if dims == [] else dims, value.ndim)
    summed = [axis is not None and axis.dim in gone for axis in layout.axes]
    if any(summed):
        return _summed(layout, summed)
    if call.out.ndim < value.ndim:
        return layout.moved([dim - sum(g < dim for g in gone) for dim in range(value.ndim)])
    return layout


def _summed(layout: RowLayout, summed: Sequence[bool]) -> Layout:
    if not all(summed):
        raise Mixes("it sums over some rows")
    if not layout.vanish:
        raise Mixes("it sums over the rows")
    return Whole()
