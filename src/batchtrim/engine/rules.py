"""One rule per kind of operator: whether it keeps rows apart, and where rows lie in its results.

A rule answers from shapes and layouts, never from values. It promises: computed on the kept rows alone, the operator
gives exactly the kept rows of its result on all rows. A sum over rows keeps the promise if the rows that are
not kept are zero (``vanish``), as in every gradient that comes from the kept rows' losses: then the sum over
the kept rows is the whole sum. Everything else raises :class:`Mixes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from batchtrim.engine.graphs import name_of
from batchtrim.engine.layout import Axis, Broken, Layout, Mixes, RowLayout, Size, Whole, exact_ratio, factor_of
from batchtrim.engine.operators import zeros_at_zero

__all__ = [
    "Call",
    "Value",
    "aligned",
    "alike",
    "apply_rule",
    "has_rule",
    "holds",
    "not_along",
    "one_with_rows",
    "only_dim",
    "rule",
    "same_axis",
    "zero_outputs",
]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor as a rule sees it."""

    shape: tuple[Size, ...]
    layout: Layout = field(default_factory=Whole)
    dtype: torch.dtype | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def zero(self) -> bool:
        """True if it is zero in every row that is not kept."""
        return (
            self.layout.vanish
            if isinstance(self.layout, RowLayout)
            else isinstance(self.layout, Whole) and self.layout.zero
        )


@dataclass
class Call:
    """One call of an operator, with tensors replaced by values and symbolic sizes by expressions."""

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
        return [value for value in self.values if isinstance(value.layout, RowLayout)]

    @property
    def out(self) -> Value:
        output = self.outputs[0]
        assert output is not None
        return output


OperatorRule = Callable[[Call], Layout | list[Layout]]
_RULES: dict[str, OperatorRule] = {}


def rule(*names: str) -> Callable[[OperatorRule], OperatorRule]:
    """Register a function as the rule of the operators of these names."""

    def register(function: OperatorRule) -> OperatorRule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def has_rule(func: Any) -> bool:
    """True if the operator has a rule of its own or is pointwise."""
    return name_of(func) in _RULES or torch.Tag.pointwise in getattr(func, "tags", ())


def apply_rule(call: Call) -> list[Layout]:
    """Return the layouts of a call's outputs.

    Raises:
        Mixes: it mixes rows, or no rule shows that it does not.
    """
    for value in call.values:
        if isinstance(value.layout, Broken):
            raise Mixes(value.layout.reason)
    _no_count_as_number(call)
    _no_positions(call)
    sized = any(holds(arg, call.symbols) for arg in call.args.values() if not isinstance(arg, Value))
    shaped = any(holds(output.shape, call.symbols) for output in call.outputs if output is not None)
    if not call.rows and not sized and not shaped:
        return [Whole(_is_zero(call))] * len(call.outputs)
    if any(argument.is_out for argument in call.func._schema.arguments):
        raise Mixes("it writes into a given tensor")
    found = _RULES.get(name_of(call.func))
    if found is None:
        if torch.Tag.pointwise not in call.func.tags:
            raise Mixes("no rule tells what it does with rows")
        found = pointwise
    layouts = found(call)
    layouts = layouts if isinstance(layouts, list) else [layouts] * len(call.outputs)
    layouts = [_checked(layout, output, call.symbols) for layout, output in zip(layouts, call.outputs, strict=True)]
    if torch.Tag.nondeterministic_seeded in call.func.tags and any(map(alike, layouts)):
        raise Mixes("it draws random numbers for a shape that does not tell where the rows are")
    return layouts


def alike(layout: Layout) -> bool:
    """True if all rows hold the same values, so that nothing else shows where they lie."""
    return isinstance(layout, RowLayout) and any(axis is not None and axis.outer is None for axis in layout.axes)


def _checked(layout: Layout, output: Value | None, symbols: Sequence[sympy.Symbol]) -> Layout:
    """Return the layout after checking it against the shape, which refuses a wrong rule."""
    if output is None:
        return Whole()
    axes = layout.axes if isinstance(layout, RowLayout) else (None,) * len(symbols)
    if isinstance(layout, RowLayout) and layout.iota and output.dtype not in (torch.int32, torch.int64):
        raise Mixes("it computes with the rows' positions in the batch")
    for axis, symbol in zip(axes, symbols, strict=True):
        if axis is None:
            fits = not holds(output.shape, (symbol,))
        elif not 0 <= axis.dim < output.ndim:
            fits = False
        elif holds([size for dim, size in enumerate(output.shape) if dim != axis.dim], (symbol,)):
            raise Mixes("it makes a tensor with rows along two dimensions")
        elif axis.outer is None:
            fits = exact_ratio(output.shape[axis.dim], symbol * axis.inner) is not None
        else:
            fits = exact_ratio(output.shape[axis.dim], axis.outer * (symbol - axis.lost) * axis.inner) == 1
        if not fits:
            raise Mixes("it gives rows a shape that its rule does not know")
    if isinstance(layout, RowLayout) and not layout.dims:
        return Whole(layout.vanish)
    return layout


_ZEROS = frozenset(("zeros", "zeros_like", "new_zeros", "_new_zeros_with_same_feature_meta"))


def _is_zero(call: Call) -> bool:
    name = name_of(call.func)
    if name in _COPIES:
        return bool(call.values) and all(value.zero for value in call.values)
    if name == "scalar_tensor":
        return call["s"] == 0
    if name in ("full", "full_like", "new_full"):
        return call["fill_value"] == 0
    return name in _ZEROS


def holds(size: Any, symbols: Sequence[sympy.Symbol]) -> bool:
    """True if a size, or one of several, counts rows."""
    if isinstance(size, (list, tuple)):
        return any(holds(each, symbols) for each in size)
    return isinstance(size, sympy.Basic) and bool(size.free_symbols & set(symbols))


def _no_count_as_number(call: Call) -> None:
    """Refuse the number of rows used as a number rather than a size: on the kept rows it differs."""
    name = name_of(call.func)
    for argument in call.func._schema.arguments:
        value = call.args.get(argument.name)
        if isinstance(value, Value) or not holds(value, call.symbols):
            continue
        placed = {
            "stride": _WITH_STRIDES,
            "start": ("slice", "slice_backward") if call.rows else (),
            "groups": _WITH_GROUPS,
            "bias_sizes": _WITH_GROUPS,
        }
        if name != "arange" and argument.name not in _SIZES and name not in placed.get(argument.name, ()):
            raise Mixes("it computes with the number of rows")


# arguments that are sizes, not numbers to compute with or positions
_SIZES = (
    "N", "end", "size", "length", "sizes", "shape", "repeats", "input_size", "input_sizes", "split_size", "split_sizes",
    "self_size",
)  # fmt: skip
_WITH_STRIDES = ("empty_strided", "new_empty_strided", "as_strided", "_reshape_alias")
_WITH_GROUPS = ("convolution", "convolution_backward")


def _no_positions(call: Call) -> None:
    """Refuse the rows' positions, which differ on kept rows, unless an operator copies them or indexes by them."""
    name = name_of(call.func)
    if name in _COPIES or name in ("slice", "select"):
        return
    indices = call["indices"] if name in ("index", "_unsafe_index", "index_put", "_unsafe_index_put") else ()
    numbered = [value for value in call.rows if value.layout.iota]  # type: ignore[union-attr]
    if any(not any(value is each for each in indices) for value in numbered):
        raise Mixes("it computes with the rows' positions in the batch")


# --- pointwise -------------------------------------------------------------------------------------------------------

# copies of their operand's values
_COPIES = {
    "_to_copy", "convert_element_type", "clone", "alias", "detach", "view", "_unsafe_view", "reshape", "permute",
    "transpose", "t", "unsqueeze", "squeeze", "expand", "lift_fresh_copy", "_reshape_alias",
}  # fmt: skip
# zero if one of the operands is
_PRODUCTS = {"mul", "logical_and", "bitwise_and"}
# zero if the first operand is
_ZERO_WHERE_FIRST_IS = {
    "div", "pow", "native_dropout_backward", "threshold_backward", "fmod", "remainder", "_prelu_kernel",
}  # fmt: skip
# where a result is stored, which does not change its values
_PLACES = ("device", "layout", "pin_memory", "memory_format")
# not tagged pointwise in every release
_POINTWISE = (
    "_to_copy", "clone", "alias", "detach", "lift_fresh_copy", "copy", "fill", "native_dropout", "bernoulli", "where",
    "rand_like", "randn_like", "randint_like", "full_like", "zeros_like", "ones_like", "empty_like", "uniform",
    "normal_functional", "exponential", "leaky_relu_backward", "hardswish_backward", "hardsigmoid_backward",
    "log_sigmoid_backward", "_prelu_kernel", "hardtanh_backward", "elu_backward", "softplus_backward", "mish_backward",
    "masked_fill", "_prelu_kernel_backward", "rrelu_with_noise_functional", "nan_to_num",
    "_conj", "resolve_conj", "threshold_backward", "gelu_backward", "silu_backward", "sigmoid_backward",
    "tanh_backward", "native_dropout_backward", "log_sigmoid_forward", "hardswish", "hardsigmoid", "leaky_relu",
    "elu", "softplus", "mish", "celu", "selu", "hardtanh", "isnan", "isinf", "isfinite", "real", "imag", "random",
    "fma",
)  # fmt: skip


@rule(*_POINTWISE)
def pointwise(call: Call) -> list[Layout]:
    """Compute entry by entry, with broadcasting: operands with rows must have them in the same place."""
    name = name_of(call.func)
    if name == "where" and "self" not in call.args:
        raise Mixes("the number of its results depends on values")
    axes = aligned(call, call.out)
    vanish = _vanishes(call, name)
    iota = name in _COPIES and any(value.layout.iota for value in call.rows)  # type: ignore[union-attr]
    layouts: list[Layout] = [RowLayout(axes, vanish, iota) for _ in call.outputs]
    if name in ("native_dropout", "rrelu_with_noise_functional"):
        layouts[1:] = [RowLayout(axes)] * (len(layouts) - 1)
    return layouts


def aligned(call: Call, out: Value, values: list[Value] | None = None) -> tuple[Axis | None, ...]:
    """Return where rows lie after broadcasting to ``out``."""
    found: list[Axis | None] = []
    for i, symbol in enumerate(call.symbols):
        place: Axis | None = None
        for value in call.rows if values is None else values:
            axis = value.layout.axes[i] if isinstance(value.layout, RowLayout) else None  # type: ignore[union-attr]
            if axis is not None:
                place = same_axis(place, replace(axis, dim=axis.dim + out.ndim - value.ndim))
        if place is None and holds(out.shape, (symbol,)):
            place = only_dim(out.shape, symbol, call.symbols)
        found.append(place)
    return tuple(found)


def same_axis(a: Axis | None, b: Axis) -> Axis:
    """Return the axis of both operands; ``a`` is None if there was none before. Refuse different ones."""
    if a is None:
        return b
    if a.dim != b.dim or a.lost != b.lost:
        raise Mixes("it combines different rows")
    if a.outer is None and (b.outer is not None or exact_ratio(b.inner, a.inner) is not None):
        a, b = b, a
    fits = exact_ratio(a.inner, b.inner) is not None if b.outer is None else (a.outer, a.inner) == (b.outer, b.inner)
    if not fits:
        raise Mixes("it combines different rows")
    return a


def only_dim(shape: Sequence[Size], symbol: sympy.Symbol, symbols: Sequence[sympy.Symbol]) -> Axis:
    """Return the axis of a tensor with equal rows, from its shape. Tokens may be missing at the end."""
    dims = [dim for dim, size in enumerate(shape) if holds(size, (symbol,))]
    if len(dims) != 1:
        raise Mixes("it makes a tensor with rows along two dimensions")
    factor = factor_of(shape[dims[0]], symbol)
    lost = symbol - shape[dims[0]]
    if factor is None and symbol != symbols[0] and lost.is_Integer and lost > 0:
        return Axis(dims[0], lost=int(lost))
    if factor is None:
        raise Mixes("it makes a tensor whose size is no multiple of the number of rows")
    return Axis(dims[0], 1 if factor == 1 else None)


def _vanishes(call: Call, name: str) -> bool:
    values = call.values
    if name == "zeros_like":
        return True
    if name in ("full_like", "fill"):
        return _zero(call["fill_value"] if name == "full_like" else call["value"])
    if name == "where":
        return all(_zero(call[side]) for side in ("self", "other"))
    if name == "masked_fill":
        return _zero(call["self"]) and _zero(call["value"])
    if name == "fma":
        return (_zero(call["a"]) or _zero(call["b"])) and _zero(call["c"])
    if name == "copy":
        return _zero(call["src"])
    if name == "native_dropout":
        return values[0].zero
    if name in _PRODUCTS:
        return any(value.zero for value in values)
    first = bool(values) and values[0].zero and values[0] is next(iter(call.args.values()))
    if first and name == "pow":
        return isinstance(call["exponent"], (int, float)) and call["exponent"] > 0
    if first and (name.endswith("_backward") or name in _ZERO_WHERE_FIRST_IS):
        return True
    found = zero_outputs(call)
    return bool(found) and all(found)


def zero_outputs(call: Call) -> list[bool]:
    """Return which outputs vanish because all operands do; none if that is unknown. A few entries are computed."""
    if not all(value.zero for value in call.values) or torch.Tag.nondeterministic_seeded in call.func.tags:
        return []
    zeros = {
        key: ([min(size, 8) if isinstance(size, int) else 2 for size in value.shape], value.dtype)
        for key, value in call.args.items()
        if isinstance(value, Value)
    }
    return zeros_at_zero(call.func, {**call.args, **dict.fromkeys(_PLACES)}, zeros)


def _zero(value: Any) -> bool:
    return value.zero if isinstance(value, Value) else value == 0


def one_with_rows(call: Call) -> tuple[Value, RowLayout]:
    """Return the only operand that has rows."""
    rows = call.rows
    if len(rows) != 1:
        raise Mixes("no rule tells what it does with rows")
    return rows[0], rows[0].layout  # type: ignore[return-value]


def not_along(layout: RowLayout, dims: Sequence[int], ndim: int, what: str = "it goes along the rows") -> None:
    """Raise Mixes if one of ``dims`` holds rows."""
    if layout.dims & {dim % ndim for dim in dims}:
        raise Mixes(what)
