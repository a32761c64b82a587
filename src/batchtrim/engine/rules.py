"""Which operators leave rows apart, and where rows lie in what they return: one rule a kind of operator.

A rule answers from shapes and layouts, never from values. It promises: computed on the kept rows alone, the operator
gives exactly the kept rows of what it gives on all of them. A sum over rows keeps the promise where the rows that are
not kept are zero (``vanish``), as they are in every gradient that comes from the kept rows' losses: then the sum over
the kept ones is the whole sum. Everything else raises :class:`Mixes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from batchtrim.engine.layout import Axis, Broken, Layout, Mixes, Rows, Size, Whole, exact_ratio, factor_of, product

__all__ = ["Call", "Value", "apply_rule", "has_rule", "holds", "name_of"]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor as a rule sees it."""

    shape: tuple[Size, ...]
    layout: Layout = Whole()
    dtype: torch.dtype | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def zero(self) -> bool:
        """True where it is zero in every row that is not kept."""
        return self.layout.vanish if isinstance(self.layout, Rows) else isinstance(self.layout, Whole) and self.layout.zero


@dataclass
class Call:
    """One call of an operator, its tensors replaced by values and its symbolic sizes by expressions."""

    func: Any
    args: dict[str, Any]
    outputs: list[Value | None]
    symbols: tuple[sympy.Symbol, ...]

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    @property
    def values(self) -> list[Value]:
        found: list[Value] = []
        for arg in self.args.values():
            if isinstance(arg, Value):
                found.append(arg)
            elif isinstance(arg, (list, tuple)):
                found.extend(item for item in arg if isinstance(item, Value))
        return found

    @property
    def rows(self) -> list[Value]:
        return [value for value in self.values if isinstance(value.layout, Rows)]

    @property
    def out(self) -> Value:
        output = self.outputs[0]
        assert output is not None
        return output


Rule = Callable[[Call], Layout | list[Layout]]
_RULES: dict[str, Rule] = {}


def name_of(func: Any) -> str:
    """``mm`` of ``aten.mm.default``."""
    schema = getattr(func, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else str(func)


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def has_rule(func: Any) -> bool:
    """True if the operator has a rule of its own or is pointwise."""
    return name_of(func) in _RULES or torch.Tag.pointwise in getattr(func, "tags", ())


def apply_rule(call: Call) -> list[Layout]:
    """Layouts of a call's outputs.

    Raises:
        Mixes: it mixes rows, or no rule tells that it does not.
    """
    for value in call.values:
        if isinstance(value.layout, Broken):
            raise Mixes(value.layout.reason)
    _no_count_as_number(call)
    sized = any(holds(arg, call.symbols) for arg in call.args.values() if not isinstance(arg, Value))
    shaped = any(holds(output.shape, call.symbols) for output in call.outputs if output is not None)
    if not call.rows and not sized and not shaped:
        return [Whole(_is_zero(call))] * len(call.outputs)
    if call["out"] is not None:
        raise Mixes("it writes into a tensor that is given")
    found = _RULES.get(name_of(call.func))
    if found is None:
        if torch.Tag.pointwise not in call.func.tags:
            raise Mixes("no rule tells what it does with rows")
        found = pointwise
    layouts = found(call)
    layouts = layouts if isinstance(layouts, list) else [layouts] * len(call.outputs)
    return [_checked(layout, output, call.symbols) for layout, output in zip(layouts, call.outputs, strict=True)]


def _checked(layout: Layout, output: Value | None, symbols: Sequence[sympy.Symbol]) -> Layout:
    """The layout, held against the shape: a rule that is wrong here is refused, not believed."""
    if output is None:
        return Whole()
    axes = layout.axes if isinstance(layout, Rows) else (None,) * len(symbols)
    for axis, symbol in zip(axes, symbols, strict=True):
        if axis is None:
            fits = not holds(output.shape, (symbol,))
        elif axis.outer is None:
            fits = holds(output.shape[axis.dim], (symbol,))
        else:
            expected = axis.outer * (symbol - axis.lost) * axis.inner
            rest = [size for dim, size in enumerate(output.shape) if dim != axis.dim]
            if holds(rest, (symbol,)):
                raise Mixes("it makes a tensor in which rows meet rows")
            fits = exact_ratio(output.shape[axis.dim], expected) == 1
        if not fits:
            raise Mixes("it gives rows a shape that its rule does not know")
    if isinstance(layout, Rows) and not layout.dims:
        return Whole(layout.vanish)
    return layout


def _is_zero(call: Call) -> bool:
    name = name_of(call.func)
    if name in _COPIES:
        return bool(call.values) and all(value.zero for value in call.values)
    return "zeros" in name or (name in ("full", "full_like", "new_full") and call["fill_value"] == 0)


def holds(size: Any, symbols: Sequence[sympy.Symbol]) -> bool:
    """True if a size, or one of several, counts rows."""
    if isinstance(size, (list, tuple)):
        return any(holds(each, symbols) for each in size)
    return isinstance(size, sympy.Basic) and bool(size.free_symbols & set(symbols))


def _no_count_as_number(call: Call) -> None:
    for argument in call.func._schema.arguments:
        value = call.args.get(argument.name)
        numeric = str(argument.type) in ("number", "float", "Optional[number]", "Optional[float]")
        numeric = numeric or (str(argument.type) == "Tensor" and isinstance(value, sympy.Basic))
        numeric = numeric or (isinstance(value, sympy.Basic) and argument.name not in _SIZES)
        if numeric and holds(value, call.symbols) and name_of(call.func) != "arange":
            raise Mixes("it computes with the number of rows")


# arguments that are one size, and not a number to compute with or a place to look at
_SIZES = ("N", "end", "size", "length")


# --- pointwise -------------------------------------------------------------------------------------------------------

# f(0) = 0, of one operand or of several
_COPIES = {
    "_to_copy", "clone", "alias", "detach", "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze",
    "squeeze", "expand", "lift_fresh_copy", "contiguous", "unflatten", "to", "_reshape_alias",
}  # fmt: skip
_ZERO_AT_ZERO = {
    "add", "sub", "neg", "relu", "abs", "tanh", "sin", "sign", "sgn", "sqrt", "copy", "maximum", "minimum", "asinh",
    "silu", "gelu", "hardswish", "expm1", "log1p", "square", "erf", "leaky_relu", "elu", "positive", "real", "conj",
    "_conj", "resolve_conj", "view_as_real", "view_as_complex", "clamp_min", "native_dropout", "nan_to_num",
} | _COPIES  # fmt: skip
_PRODUCTS = {"mul", "logical_and", "bitwise_and"}
_ZERO_WHERE_FIRST_IS = {
    "div", "pow", "native_dropout_backward", "threshold_backward", "fmod", "remainder", "prelu", "_prelu_kernel",
}  # fmt: skip
# no Tag.pointwise in every release
_POINTWISE = (
    "_to_copy", "clone", "alias", "detach", "lift_fresh_copy", "copy", "fill", "native_dropout", "bernoulli", "where",
    "rand_like", "randn_like", "randint_like", "full_like", "zeros_like", "ones_like", "empty_like", "uniform",
    "normal_functional", "exponential", "leaky_relu_backward", "hardswish_backward", "hardsigmoid_backward",
    "log_sigmoid_backward", "_prelu_kernel", "hardtanh_backward", "elu_backward", "softplus_backward", "mish_backward",
    "masked_fill", "_prelu_kernel_backward", "bucketize", "rrelu_with_noise_functional", "nan_to_num", "view_dtype",
    "_conj", "resolve_conj", "threshold_backward", "gelu_backward", "silu_backward", "sigmoid_backward",
    "tanh_backward", "native_dropout_backward", "log_sigmoid_forward", "hardswish", "hardsigmoid", "leaky_relu",
    "elu", "softplus", "mish", "celu", "selu", "hardtanh", "isnan", "isinf", "isfinite", "real", "imag", "random",
)  # fmt: skip


@rule(*_POINTWISE)
def pointwise(call: Call) -> list[Layout]:
    """Entry by entry, with broadcasting: where operands have rows, they must have them at one place."""
    name = name_of(call.func)
    if any(value.layout.iota for value in call.rows) and name not in _COPIES:  # type: ignore[union-attr]
        raise Mixes("it computes with the rows' own numbers")
    axes = _aligned(call, call.out)
    vanish = _vanishes(call, name)
    iota = name in _COPIES and any(value.layout.iota for value in call.rows)  # type: ignore[union-attr]
    layouts: list[Layout] = [Rows(axes, vanish, iota) for _ in call.outputs]
    if name in ("native_dropout", "rrelu_with_noise_functional"):
        layouts[1:] = [Rows(axes)] * (len(layouts) - 1)
    return layouts


def _aligned(call: Call, out: Value, values: list[Value] | None = None) -> tuple[Axis | None, ...]:
    """Where rows lie after broadcasting to ``out``."""
    found: list[Axis | None] = []
    for i, symbol in enumerate(call.symbols):
        place: Axis | None = None
        for value in call.rows if values is None else values:
            axis = value.layout.axes[i] if isinstance(value.layout, Rows) else None  # type: ignore[union-attr]
            if axis is not None:
                place = _same(place, replace(axis, dim=axis.dim + out.ndim - value.ndim))
        if place is None and holds(out.shape, (symbol,)):
            place = _only_dim(out.shape, symbol)
        found.append(place)
    return tuple(found)


def _same(a: Axis | None, b: Axis) -> Axis:
    if a is None:
        return b
    if a.dim != b.dim or a.lost != b.lost:
        raise Mixes("it puts different rows together")
    if a.outer is None:
        return b
    if b.outer is not None and (a.outer, a.inner) != (b.outer, b.inner):
        raise Mixes("it puts different rows together")
    return a


def _only_dim(shape: Sequence[Size], symbol: sympy.Symbol) -> Axis:
    """The axis of a tensor in which every row is alike, from its shape."""
    dims = [dim for dim, size in enumerate(shape) if holds(size, (symbol,))]
    if len(dims) != 1:
        raise Mixes("it makes a tensor in which rows meet rows")
    factor = factor_of(shape[dims[0]], symbol)
    if factor is None:
        raise Mixes("it makes a tensor whose size is no multiple of the number of rows")
    return Axis(dims[0], *((1, 1) if factor == 1 else (None, None)))


def _vanishes(call: Call, name: str) -> bool:
    values = call.values
    numbers = [v for k, v in call.args.items() if isinstance(v, (int, float, complex)) and k in ("other", "value")]
    if name == "zeros_like":
        return True
    if name in ("full_like", "fill"):
        return call["fill_value"] == 0 if name == "full_like" else call["value"] == 0
    if name == "where":
        return all(_zero(call[side]) for side in ("self", "other"))
    if name == "masked_fill":
        return _zero(call["self"]) and _zero(call["value"])
    if name == "copy":
        return _zero(call["src"])
    if name in _PRODUCTS:
        return any(value.zero for value in values)
    if name == "pow":
        return _zero(call["self"]) and isinstance(call["exponent"], (int, float)) and call["exponent"] > 0
    if name.endswith("_backward") or name in _ZERO_WHERE_FIRST_IS:
        return bool(values) and values[0].zero and values[0] is next(iter(call.args.values()))
    if name in _ZERO_AT_ZERO:
        return all(value.zero for value in values) and not any(numbers)
    return False


def _zero(value: Any) -> bool:
    return value.zero if isinstance(value, Value) else value == 0


# --- shapes ----------------------------------------------------------------------------------------------------------


def _one(call: Call) -> tuple[Value, Rows]:
    """The only operand that has rows."""
    rows = call.rows
    if len(rows) != 1:
        raise Mixes("no rule tells what it does with rows")
    return rows[0], rows[0].layout  # type: ignore[return-value]


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten", "contiguous")
def view(call: Call) -> Layout:
    value = call.values[0]
    if not isinstance(value.layout, Rows):
        raise Mixes("it makes rows of what has none")
    axes = [
        None if axis is None else view_axis(axis, symbol, value.shape, call.out.shape)
        for axis, symbol in zip(value.layout.axes, call.symbols, strict=True)
    ]
    return replace(value.layout, axes=tuple(axes))


def view_axis(axis: Axis, symbol: sympy.Symbol, before: Sequence[Size], after: Sequence[Size]) -> Axis:
    """Where an axis lies once a tensor of one shape is viewed as another."""
    if axis.outer is None:
        return _only_dim(after, symbol)
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
    raise Mixes("it cuts the dimension of the rows apart")


@rule("permute")
def permute(call: Call) -> Layout:
    value, layout = _one(call)
    order = [int(dim) % value.ndim for dim in call["dims"]]
    return layout.moved({old: new for new, old in enumerate(order)})


@rule("transpose", "t", "adjoint", "swapaxes")
def transpose(call: Call) -> Layout:
    value, layout = _one(call)
    if value.ndim < 2:
        return layout
    a, b = (0, 1) if call["dim0"] is None else (call["dim0"] % value.ndim, call["dim1"] % value.ndim)
    order = list(range(value.ndim))
    order[a], order[b] = b, a
    return layout.moved(order)


@rule("unsqueeze")
def unsqueeze(call: Call) -> Layout:
    value, layout = _one(call)
    at = call["dim"] % (value.ndim + 1)
    return layout.moved([dim + (dim >= at) for dim in range(value.ndim)])


@rule("squeeze")
def squeeze(call: Call) -> Layout:
    value, layout = _one(call)
    given = call["dim"]
    given = range(value.ndim) if given is None else given if isinstance(given, (list, tuple)) else [given]
    gone = {dim % value.ndim for dim in given} - layout.dims
    gone = {dim for dim in gone if value.shape[dim] == 1}
    return layout.moved([dim - sum(g < dim for g in gone) for dim in range(value.ndim)])


@rule("expand", "broadcast_to")
def expand(call: Call) -> Layout:
    """A dimension of size 1 may become that of the rows: each row then holds the same."""
    value = call.values[0]
    axes = _aligned(call, call.out)
    layout = value.layout
    return Rows(axes, value.zero, isinstance(layout, Rows) and layout.iota)


@rule("repeat")
def repeat(call: Call) -> Layout:
    """One copy after the other: the rows' dimension gets a factor in front."""
    value = call.values[0]
    repeats = call["repeats"]
    shift = len(repeats) - value.ndim
    axes: list[Axis | None] = []
    for i, symbol in enumerate(call.symbols):
        axis = value.layout.axes[i] if isinstance(value.layout, Rows) else None
        if axis is None:
            dims = [d for d, size in enumerate(repeats) if holds(size, (symbol,))]
            if not dims:
                axes.append(None)
                continue
            size = 1 if dims[0] < shift else value.shape[dims[0] - shift]
            if len(dims) > 1 or factor_of(repeats[dims[0]], symbol) != 1:
                raise Mixes("it makes a tensor in which rows meet rows")
            axes.append(Axis(dims[0], 1, size))
        elif holds(repeats[axis.dim + shift], call.symbols):
            raise Mixes("it makes a tensor in which rows meet rows")
        else:
            outer = None if axis.outer is None else axis.outer * repeats[axis.dim + shift]
            axes.append(replace(axis, dim=axis.dim + shift, outer=outer))
    return Rows(tuple(axes), value.zero)


@rule("slice", "slice_backward")
def slice_(call: Call) -> Layout:
    """Along another dimension than the rows', or one that takes nothing away; tokens may lose some at the end."""
    value = call.values[0]
    layout = value.layout
    if not isinstance(layout, Rows):
        raise Mixes("it makes rows of what has none")
    dim = (call["dim"] or 0) % value.ndim
    axes = list(layout.axes)
    for i, axis in enumerate(axes):
        if axis is None or axis.dim != dim or value.shape[dim] == call.out.shape[dim]:
            if dim not in layout.dims and holds(call["end"], call.symbols):
                raise Mixes("it computes with the number of rows")
            continue
        lost = call.symbols[i] - call.out.shape[dim]
        if i == 0 or not axis.plain or call["start"] not in (0, None) or call["step"] not in (1, None):
            raise Mixes("it takes some rows and leaves others")
        if not getattr(lost, "is_Integer", True):
            raise Mixes("it takes some rows and leaves others")
        axes[i] = replace(axis, lost=int(lost))
    return replace(layout, axes=tuple(axes))


def _not_along(layout: Rows, dims: Sequence[int], ndim: int, what: str = "it goes along the rows") -> None:
    if layout.dims & {dim % ndim for dim in dims}:
        raise Mixes(what)


@rule("select")
def select(call: Call) -> Layout:
    value, layout = _one(call)
    at = call["dim"] % value.ndim
    _not_along(layout, [at], value.ndim, "it takes one row")
    return layout.moved([dim - (dim > at) for dim in range(value.ndim)])


@rule("select_backward")
def select_backward(call: Call) -> Layout:
    value, layout = _one(call)
    at = call["dim"] % (value.ndim + 1)
    return layout.moved([dim + (dim >= at) for dim in range(value.ndim)])


@rule("split", "split_with_sizes", "unbind", "unsafe_split", "chunk")
def split(call: Call) -> Layout:
    value, layout = _one(call)
    at = (call["dim"] or 0) % value.ndim
    _not_along(layout, [at], value.ndim, "it takes the rows apart")
    if name_of(call.func) == "unbind":
        return layout.moved([dim - (dim > at) for dim in range(value.ndim)])
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
    axes = _aligned(call, call.out, values)
    layout = Rows(axes, all(value.zero for value in values))
    _not_along(layout, [at], call.out.ndim, "it puts rows behind rows")
    return layout


def _opened(layout: Layout, at: int, ndim: int) -> Layout:
    return layout.moved([dim + (dim >= at) for dim in range(ndim)]) if isinstance(layout, Rows) else layout


@rule("full", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "rand", "randn", "empty_strided",
      "randint", "new_empty_strided", "empty_permuted")  # fmt: skip
def create(call: Call) -> Layout:
    axes = tuple(_only_dim(call.out.shape, s) if holds(call.out.shape, (s,)) else None for s in call.symbols)
    name = name_of(call.func)
    if name in ("rand", "randn", "randint") and any(axis is not None and axis.outer is None for axis in axes):
        raise Mixes("it draws random numbers for a shape that does not tell where the rows are")
    return Rows(axes, "zeros" in name or (name in ("full", "new_full") and call["fill_value"] == 0))


@rule("arange")
def arange(call: Call) -> Layout:
    """0 to B - 1 are the rows' own numbers."""
    if call["start"] not in (None, 0) or call["step"] not in (None, 1) or call.out.shape[0] != call.symbols[0]:
        raise Mixes("it counts rows")
    return Rows((Axis(0), *(None,) * (len(call.symbols) - 1)), iota=True)


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(call: Call) -> Layout:
    value, layout = _one(call)
    widths = call["pad"] if call["pad"] is not None else call["padding"]
    touched = [value.ndim - 1 - i // 2 for i, width in enumerate(widths) if width != 0]
    _not_along(layout, touched, value.ndim, "it adds rows")
    return replace(layout, vanish=layout.vanish and not call["value"])


@rule("diagonal", "unfold", "as_strided", "diagonal_scatter", "as_strided_scatter")
def strided(call: Call) -> Layout:
    value, layout = _one(call)
    if name_of(call.func) == "unfold":
        _not_along(layout, [call["dimension"]], value.ndim)
        return layout
    if name_of(call.func) == "diagonal":
        a, b = call["dim1"] or 0, 1 if call["dim2"] is None else call["dim2"]
        _not_along(layout, [a, b], value.ndim)
        gone = {a % value.ndim, b % value.ndim}
        return layout.moved([dim - sum(g < dim for g in gone) for dim in range(value.ndim)])
    raise Mixes("it reads memory past the shape of its tensor")


@rule("slice_scatter", "select_scatter")
def scatter_part(call: Call) -> Layout:
    at = (call["dim"] or 0) % call.out.ndim
    inner = call["src"]
    if name_of(call.func) == "select_scatter":
        inner = replace(inner, shape=(*inner.shape[:at], 1, *inner.shape[at:]), layout=_opened(inner.layout, at, inner.ndim))
    axes = _aligned(call, call.out, [call["self"], inner])
    layout = Rows(axes, call["self"].zero and inner.zero)
    if inner.shape[at] != call.out.shape[at] or name_of(call.func) == "select_scatter":
        _not_along(layout, [at], call.out.ndim, "it writes into some rows")
    return layout


# --- along other dimensions ------------------------------------------------------------------------------------------

_ALONG = (
    "_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "flip", "sort", "topk", "argsort", "roll",
    "mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "logsumexp", "any", "all", "var", "std",
    "var_mean", "std_mean", "linalg_vector_norm", "norm", "_fft_r2c", "_fft_c2r", "_fft_c2c", "cummax", "cummin",
    "logcumsumexp", "median", "kthvalue", "mode", "_softmax_backward_data", "_log_softmax_backward_data", "glu",
    "glu_backward", "linalg_cross", "count_nonzero", "aminmax",
)  # fmt: skip
_LINEAR_ALONG = {"mean", "cumsum", "flip", "roll", "_fft_r2c", "_fft_c2r", "_fft_c2c", "prod"}


@rule(*_ALONG)
def along(call: Call) -> Layout:
    """Over given dimensions, which must not be the rows'."""
    value = call.values[0]
    layout = Rows(_aligned(call, value))
    dims = next((call[name] for name in ("dim", "dims") if call[name] is not None), None)
    if dims is None or dims == []:
        raise Mixes("it goes over all rows")
    dims = [dim % value.ndim for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
    _not_along(layout, dims, value.ndim, "it goes over the rows")
    name = name_of(call.func)
    vanish = values_vanish(call, name)
    layout = replace(layout, vanish=vanish)
    if call.out.ndim < value.ndim:
        layout = layout.moved([dim - sum(gone < dim for gone in set(dims)) for dim in range(value.ndim)])
    return layout


def values_vanish(call: Call, name: str) -> bool:
    first = call.values[0]
    return (name in _LINEAR_ALONG or name.endswith(("_backward", "_backward_data"))) and first.zero


@rule("sum")
def sum_(call: Call) -> Layout:
    value, layout = _one(call)
    dims = call["dim"]
    dims = range(value.ndim) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = {dim % value.ndim for dim in dims}
    summed = [axis is not None and axis.dim in gone for axis in layout.axes]
    if any(summed):
        return _summed(layout, summed)
    if call.out.ndim < value.ndim:
        return layout.moved([dim - sum(g < dim for g in gone) for dim in range(value.ndim)])
    return layout


def _summed(layout: Rows, summed: Sequence[bool]) -> Layout:
    if not all(summed):
        raise Mixes("it sums over some rows")
    if not layout.vanish:
        raise Mixes("it sums over the rows")
    return Whole()


# --- products --------------------------------------------------------------------------------------------------------

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
        if bias is not None and isinstance(layout, Rows) and not bias.zero:
            return replace(layout, vanish=False)
        return layout
    if not isinstance(layout, Rows):
        raise Mixes("it puts different rows together")
    product_ = Value(call.out.shape, layout)
    return Rows(_aligned(call, call.out, [bias, product_]), layout.vanish and bias.zero)


def contract(symbols: Sequence[Any], inputs: Sequence[str], out: str, values: Sequence[Value]) -> Layout:
    """``einsum`` of values: rows must lie along one letter; a letter that is summed needs rows that vanish."""
    axes: list[Axis | None] = []
    summed: list[bool] = []
    for i in range(len(symbols)):
        letter, place, holders = None, None, 0
        for value, letters in zip(values, inputs, strict=True):
            axis = value.layout.axes[i] if isinstance(value.layout, Rows) else None
            if axis is None:
                continue
            if letter is not None and letters[axis.dim] != letter:
                raise Mixes("it multiplies rows with rows")
            letter = letters[axis.dim]
            place = _same(place, replace(axis, dim=0))
            holders += 1
        summed.append(letter is not None and letter not in out)
        axes.append(None if letter is None or letter not in out else replace(place, dim=out.index(letter)))  # type: ignore[type-var]
    vanish = any(value.zero for value in values)
    if not any(summed):
        return Rows(tuple(axes), vanish)
    if not all(summed):
        raise Mixes("it sums over some rows")
    if not vanish:
        raise Mixes("it sums over the rows")
    return Whole()
