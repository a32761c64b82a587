"""Check a rule against its operator: cutting the inputs and cutting the outputs must give the same result."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from batchtrim.engine.cutting import KeptRows, can_be_cut, cut, put_back
from batchtrim.engine.graphs import name_of
from batchtrim.engine.layout import Axis, Broken, Layout, Mixes, RowLayout, Whole
from batchtrim.engine.proof import make_call
from batchtrim.engine.rules import Value, alike, apply_rule

S, T = sympy.symbols("s t", positive=True, integer=True)  # how many samples, how many tokens each
SIZES = {S: 7, T: 5}
FLOAT, INT, BOOL, COMPLEX = torch.float64, torch.int64, torch.bool, torch.complex128


@functools.cache
def _number(size: sympy.Expr, *sizes: tuple[sympy.Symbol, int]) -> int:
    return int(size.subs(dict(sizes)))


@functools.cache
def _over(size: Any, symbol: sympy.Symbol) -> sympy.Expr:
    return sympy.cancel(size / symbol)


@dataclass(frozen=True)
class Spec:
    """A tensor to be made: sizes may hold S and T.

    Attributes:
        below: integers are drawn from 0 to below - 1. low: floats are from low up; None for normal ones.
        factors: of each dimension that holds S, the factor in front of S; None where all rows are alike.
        zero: zero in the rows that are not kept, or everywhere where it has no rows. iota: 0, 1, 2, ...
    """

    shape: tuple[Any, ...]
    dtype: torch.dtype = FLOAT
    below: int = 2
    low: float | None = None
    factors: tuple[int | None, ...] = ()
    zero: bool = False
    iota: bool = False

    def layout(self, symbols: Sequence[sympy.Symbol]) -> Layout:
        axes: list[Axis | None] = []
        for symbol in symbols:
            dims = [d for d, size in enumerate(self.shape) if not isinstance(size, int) and size.has(symbol)]
            if not dims:
                axes.append(None)
                continue
            (dim,) = dims
            rest = _over(self.shape[dim], symbol)
            rest = int(rest) if rest.is_Integer else rest
            if len(symbols) > 1 and isinstance(rest, sympy.Expr):  # samples and their tokens in one dimension
                axes.append(Axis(dim, 1, T) if symbol is S else Axis(dim, S, 1))
                continue
            outer = self.factors[dim] if self.factors else 1
            axes.append(Axis(dim, None) if outer is None else Axis(dim, outer, rest // outer))
        return RowLayout(tuple(axes), self.zero, self.iota) if any(axes) else Whole(self.zero)

    def tensor(self, sizes: dict[Any, int]) -> Tensor:
        shape = [size if isinstance(size, int) else _number(size, *sizes.items()) for size in self.shape]
        if self.iota:
            return torch.arange(shape[0])
        if self.dtype == BOOL:
            made = torch.rand(shape) > 0.4
        elif self.dtype == INT:
            made = torch.randint(0, max(self.below, 1), shape)
        elif self.dtype == torch.int32:  # pivots of a matrix, which count from 1
            made = torch.randint(1, 1 + max(self.below, 1), shape, dtype=torch.int32)
        elif self.low is not None:
            made = torch.rand(shape, dtype=self.dtype) + self.low
        else:
            made = torch.randn(shape, dtype=self.dtype)
        for dim, factor in enumerate(self.factors):
            if factor is None:
                made = made.narrow(dim, 0, 1).expand(shape).clone()
        return made


@dataclass(frozen=True)
class Sample:
    """One call: specs in place of tensors, sizes that may hold S and T."""

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]


def mapped(item: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(item, (list, tuple)):
        return [mapped(each, function) for each in item]
    if isinstance(item, dict):
        return {key: mapped(each, function) for key, each in item.items()}
    return function(item)


def specs_of(*items: Any) -> list[Spec]:
    found: list[Spec] = []
    mapped(items, lambda each: found.append(each) if isinstance(each, Spec) else None)
    return found


def run(func: Any, args: Any, kwargs: Any) -> list[Any]:
    if name_of(func) == "view" and func._overloadname == "default":
        func = torch.ops.aten.reshape.default  # as the engine does
    outputs = func(*args, **kwargs)
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def with_numbers(item: Any, sizes: dict[Any, int], tensors: Callable[[Spec], Tensor]) -> Any:
    def one(each: Any) -> Any:
        if isinstance(each, Spec):
            return tensors(each)
        return _number(each, *sizes.items()) if isinstance(each, sympy.Expr) else each

    return mapped(item, one)


def outputs_of(sample: Sample, symbols: Sequence[sympy.Symbol]) -> list[Value | None]:
    """Return the outputs with their symbolic shapes, found by running it for several sizes."""
    tries = []
    for sizes in itertools.product((7, 11), (5, 9) if len(symbols) > 1 else (5,)):
        given = dict(zip((S, T), sizes, strict=True))
        args, kwargs = with_numbers((sample.args, sample.kwargs), given, lambda spec: spec.tensor(given))  # noqa: B023
        tries.append(run(sample.func, args, kwargs))
    found: list[Value | None] = []
    for at, first in enumerate(tries[0]):
        if not isinstance(first, Tensor):
            found.append(None)
            continue
        shape = [_size_of([out[at].shape[dim] for out in tries], symbols) for dim in range(first.ndim)]
        found.append(Value(tuple(shape), dtype=first.dtype))
    return found


def _size_of(found: Sequence[int], symbols: Sequence[sympy.Symbol]) -> Any:
    """Return ``p + q S``, or ``p + q S + r T + u S T``, of the numbers found for S = 7, 11 and T = 5, 9."""
    if len(symbols) == 1:
        q = sympy.Rational(found[1] - found[0], 4)
        size = found[0] - 7 * q + q * S
    else:
        at_5, at_9, at_5_, at_9_ = found  # of 7, and of 11
        u = sympy.Rational(at_9_ - at_5_ - at_9 + at_5, 16)
        q, r = sympy.Rational(at_5_ - at_5, 4) - 5 * u, sympy.Rational(at_9 - at_5, 4) - 7 * u
        size = at_5 - 7 * q - 5 * r - 35 * u + q * S + r * T + u * S * T
    return int(size) if size.is_Integer else size


def answer_of(sample: Sample, symbols: tuple[sympy.Symbol, ...]) -> list[Layout] | None:
    """Return what the rule says; None where it says that rows mix."""

    def see(item: Any) -> Any:
        return Value(item.shape, item.layout(symbols), item.dtype) if isinstance(item, Spec) else item

    call = make_call(sample.func, sample.args, sample.kwargs, None, symbols, see)
    call.outputs = outputs_of(sample, symbols)
    try:
        return apply_rule(call)
    except Mixes:
        return None
    except Exception as error:  # not the operator's own, which says that it takes no such call
        raise AssertionError(f"the rule fails: {sample.func} {sample.args} {sample.kwargs}") from error


def violation(sample: Sample, symbols: tuple[sympy.Symbol, ...] = (S,), k: int = 3) -> str | None:
    """Return how the rule's answer is wrong; "" if it is right, None if the rule gives none."""
    layouts = answer_of(sample, symbols)
    if layouts is None:
        return None
    if any(axis is not None and axis.lost for each in layouts if isinstance(each, RowLayout) for axis in each.axes):
        return None  # the engine leaves such a slice out
    count = SIZES[S] * (SIZES[T] if len(symbols) > 1 else 1)
    kept = torch.tensor(sorted(random.sample(range(count), k)))
    chosen = KeptRows(kept, SIZES[S], SIZES[T] if len(symbols) > 1 else None)
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    numbers = itertools.count()

    def pair(spec: Spec) -> Tensor:
        layout, whole = spec.layout(symbols), spec.tensor(SIZES)
        if isinstance(layout, Whole):
            whole = torch.zeros_like(whole) if layout.zero else whole
            part = whole
        else:
            part = cut(whole, layout, chosen)
            if layout.vanish:
                everywhere = alike(layout) or None in layout.axes  # no row of theirs can be told from the others
                whole = torch.zeros_like(whole) if everywhere else put_back(part, layout, chosen)
                part = cut(whole, layout, chosen)
        number = next(numbers)
        pairs[number] = whole, part
        return torch.tensor(number)

    everything = [*layouts, *(spec.layout(symbols) for spec in specs_of(sample.args, sample.kwargs))]
    if any(isinstance(each, RowLayout) and not can_be_cut(each, len(symbols)) for each in everything):
        return None
    fewer = {S: k, T: 1} if len(symbols) > 1 else {S: k, T: SIZES[T]}
    plan = mapped((list(sample.args), sample.kwargs), lambda each: pair(each) if isinstance(each, Spec) else each)

    def side(at: int, sizes: dict[Any, int]) -> list[Any]:
        args, kwargs = mapped(plan, lambda each: pairs[int(each)][at].clone() if isinstance(each, Tensor) else each)
        return run(sample.func, *with_numbers((args, kwargs), sizes, lambda spec: spec))  # type: ignore[arg-type]

    whole = side(0, SIZES)
    try:
        part = side(1, fewer)
    except (RuntimeError, IndexError, ValueError) as error:
        return f"it cannot run on the kept rows: {str(error).splitlines()[0]}"
    random_ = torch.Tag.nondeterministic_seeded in sample.func.tags
    for at, layout in enumerate(layouts):
        try:
            found = _wrong(layout, whole[at], part[at], chosen, random_)
        except (RuntimeError, IndexError) as error:
            found = f"no rows of this layout can be taken from it: {str(error).splitlines()[0]}"
        if found:
            return f"output {at}: {found}"
    return ""


def _wrong(layout: Layout, whole: Any, part: Any, chosen: KeptRows, random_: bool) -> str | None:
    if not isinstance(whole, Tensor) or isinstance(layout, Broken):
        return None
    if isinstance(layout, Whole):
        if layout.zero and whole.any():
            return "it is not zero"
        return None if random_ or _same(whole, part) else "it is another for the kept rows alone"
    if layout.iota:
        (axis,) = layout.axes
        numbers = torch.arange(chosen.batch).view([-1 if d == axis.dim else 1 for d in range(whole.ndim)])  # type: ignore[union-attr]
        if not (whole == numbers).all():
            return "it is not the rows' positions in the batch"
    elif not random_ and not _same(cut(whole, layout, chosen), part):
        return "its kept rows are others than from the kept rows alone"
    for axis in layout.axes:
        if axis is not None and axis.outer is None:
            blocks = whole.unflatten(axis.dim, (-1, axis.inner))
            if not _same(blocks, blocks.narrow(axis.dim, 0, 1).expand_as(blocks)):
                return "its rows are not alike"
    whole = whole.nan_to_num() if whole.is_floating_point() else whole  # 0 / 0 is nobody's gradient
    if layout.vanish and (alike(layout) or None in layout.axes):
        return "it is not zero" if whole.any() else None
    if layout.vanish and not torch.equal(put_back(cut(whole, layout, chosen), layout, chosen), whole):
        return "rows that are not kept are not zero"
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() and not a.is_complex():
        return torch.equal(a, b)
    near = 1e-9 if a.dtype in (FLOAT, COMPLEX) else 1e-5
    return torch.allclose(a, b, rtol=near, atol=near, equal_nan=True)


def varied(spec: Spec, draw: random.Random) -> Spec:
    """Return the spec with other factors, and with rows that vanish or not."""
    factors: list[int | None] = []
    for size in spec.shape:
        rest = 0 if isinstance(size, int) else _over(size, S)
        number = int(rest) if rest and rest.is_Integer and rest > 0 else 1
        choices = [f for f in range(1, number + 1) if number % f == 0]
        factors.append(None if number > 1 and draw.random() < 0.15 else draw.choice(choices))
    iota = spec.dtype == INT and spec.shape == (S,) and draw.random() < 0.3
    return replace(spec, factors=tuple(factors), zero=draw.random() < 0.5 and not iota, iota=iota)
