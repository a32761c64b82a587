"""Calls of every operator that has a rule: generated from the schema for pointwise ones, by hand for others."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from rule_check import BOOL, FLOAT, INT, S, Sample, Spec, T, mapped, specs_of, with_numbers
from rule_table import NUMBERS, TABLE, a

__all__ = ["by_hand", "pointwise", "tokens"]

aten = torch.ops.aten


def by_hand(draw: random.Random) -> Iterator[Sample]:
    """Yield every call of the table, with each size in turn as the number of rows."""
    for sample in _table():
        specs = specs_of(sample.args, sample.kwargs)
        held = _letters(specs) if specs else {a}
        for letter in sorted(held, key=str):
            yield placed(sample, {letter: S})


def tokens(draw: random.Random) -> Iterator[Sample]:
    """Yield every call of the table, with each two sizes in turn as the numbers of samples and of their tokens."""
    for sample in _table():
        held = _letters(specs_of(sample.args, sample.kwargs))
        for samples, each in itertools.permutations(sorted(held, key=str), 2):
            yield placed(sample, {samples: S, each: T})


def _table() -> Iterator[Sample]:
    for entry, given in TABLE:
        name, _, overload = entry.partition(".")
        packet = getattr(aten, name, None)
        if packet is None:  # not in this release
            continue
        kwargs = given[-1] if given and isinstance(given[-1], dict) else {}
        names = packet.overloads()
        func = getattr(packet, overload or ("default" if "default" in names else names[0]))
        yield Sample(func, given[:-1] if kwargs else given, kwargs)


def _letters(specs: list[Spec]) -> set[sympy.Symbol]:
    return {each for spec in specs for size in spec.shape for each in sympy.sympify(size).free_symbols}


def placed(sample: Sample, rows: dict[Any, Any]) -> Sample:
    """Return the sample with some of the sizes as symbols of rows, and the others as numbers."""

    def one(item: Any) -> Any:
        sizes = {**NUMBERS, **rows}
        if isinstance(item, Spec):
            shape = tuple(_size(size, sizes) for size in item.shape)
            return Spec(shape, item.dtype, item.below, item.low)
        return _size(item, sizes) if isinstance(item, sympy.Expr) else item

    return Sample(sample.func, mapped(list(sample.args), one), mapped(sample.kwargs, one))


def _size(size: Any, sizes: dict[Any, Any]) -> Any:
    if isinstance(size, int):
        return size
    size = sympy.sympify(size).subs(sizes)
    return int(size) if size.is_Integer else size


# --- from schemas ----------------------------------------------------------------------------------------------------

_SHAPES = ((S, 3), (2, S), (S,), (3 * S, 2), (2, S, 3))
_SCALARS = (0, 1, -1, 2, 0.0, 0.5, -1.5, 0.1)


def pointwise(func: Any, draw: random.Random, count: int) -> Iterator[Sample]:
    """Yield calls of an operator with random operands, broadcast in every way, and random numbers."""
    tensors = [each for each in func._schema.arguments if "Tensor" in str(each.type)]
    fitting = _dtypes(func, len(tensors), draw)
    for _ in range(count if fitting else 0):
        shape = draw.choice(_SHAPES)
        dtypes = iter(draw.choice(fitting))
        args, kwargs = _arguments(func, draw, lambda: Spec(_broadcast(shape, draw), next(dtypes), 4))  # noqa: B023
        yield Sample(func, args, kwargs)


def _broadcast(shape: tuple[Any, ...], draw: random.Random) -> tuple[Any, ...]:
    kind = draw.random()
    if kind < 0.6:
        return shape
    if kind < 0.8:
        return tuple(1 if draw.random() < 0.5 else size for size in shape)
    return shape[draw.randint(0, len(shape)) :]


def _arguments(func: Any, draw: random.Random, tensor: Callable[[], Spec]) -> tuple[list[Any], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in func._schema.arguments:
        kind = str(argument.type)
        if kind == "Tensor" or (kind == "Optional[Tensor]" and draw.random() < 0.7):
            value: Any = tensor()
        elif "number" in kind or "float" in kind:
            value = None if "Optional" in kind and draw.random() < 0.3 else draw.choice(_SCALARS)
            value = float(value) if "float" in kind and value is not None else value
        elif kind == "bool":
            value = draw.random() < 0.5
        elif kind == "int":
            value = draw.choice((0, 1, 2))
        elif argument.name == "approximate":
            value = draw.choice(("none", "tanh"))
        elif argument.name == "rounding_mode":
            value = draw.choice((None, "floor", "trunc"))
        else:
            value = argument.default_value
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


def _dtypes(func: Any, tensors: int, draw: random.Random) -> list[tuple[torch.dtype, ...]]:
    """Return the types of operands that an operator takes."""
    found = []
    for dtypes in itertools.product((FLOAT, INT, BOOL), repeat=tensors):
        each = iter(dtypes)
        args, kwargs = _arguments(func, draw, lambda: Spec((2,), next(each), 4))  # noqa: B023
        try:
            with_run = with_numbers((args, kwargs), {}, lambda spec: spec.tensor({}))
            func(*with_run[0], **with_run[1])
        except (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError):
            continue
        found.append(dtypes)
    return found
