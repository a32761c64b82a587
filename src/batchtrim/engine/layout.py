"""The layout of a tensor: the dimensions along which it holds the rows of a batch.

A row is the unit of choice: a sample, or a token. A tensor holds rows along the dimensions of the symbols that count
them: along ``s0`` (the batch size) for samples, along ``s0`` and the number of tokens for tokens. Where dimensions were
merged, a dimension of size ``outer * s0 * inner`` holds row b at positions ``(o * s0 + b) * inner + i``: batch-major
if ``outer`` is 1, batch-minor if ``inner`` is 1. Sizes are integers, or sympy expressions of such symbols.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy

__all__ = ["Axis", "Broken", "Layout", "Mixes", "RowLayout", "Size", "Whole", "exact_ratio", "factor_of", "product"]

Size = Any  # int or sympy.Expr


class Mixes(Exception):
    """An operator mixes rows, or no rule shows that it does not; the message says which."""


@dataclass(frozen=True)
class Axis:
    """The position of one row symbol: dimension ``dim``, between factors ``outer`` and ``inner``.

    ``outer`` is None if every block of ``inner`` entries holds the same values: then any order of factors is right
    whose own ``inner`` is a multiple. ``lost`` counts the rows that a slice has cut off the end.
    """

    dim: int
    outer: Size | None = 1
    inner: Size = 1
    lost: Size = 0

    @property
    def plain(self) -> bool:
        return self.outer == 1 and self.inner == 1


@dataclass(frozen=True)
class RowLayout:
    """The layout of a value with rows: ``axes[i]`` is where row symbol i lies, None if the value does not depend on it.

    Attributes:
        vanish: rows that are not kept are zero.
        iota: entry b is b, the row's position in the batch; it may only index rows by themselves.
    """

    axes: tuple[Axis | None, ...]
    vanish: bool = False
    iota: bool = False

    def moved(self, to: dict[int, int] | Sequence[int | None], **changes: Any) -> RowLayout:
        """Return the layout after dimensions were moved: dimension d is now ``to[d]``."""
        axes = tuple(None if a is None else replace(a, dim=to[a.dim]) for a in self.axes)
        return replace(self, axes=axes, **changes)

    @property
    def dims(self) -> set[int]:
        return {axis.dim for axis in self.axes if axis is not None}


@dataclass(frozen=True)
class Whole:
    """A value that belongs to no row: the same for all rows and for the kept ones alone."""

    zero: bool = False


@dataclass(frozen=True)
class Broken:
    """A value that cannot be computed from the kept rows alone."""

    reason: str


Layout = RowLayout | Whole | Broken


def product(sizes: Sequence[Size]) -> Size:
    """Return the number of entries of a tensor of these sizes."""
    return math.prod(sizes)


def exact_ratio(a: Size, b: Size) -> Size | None:
    """Return a / b if it is an integer for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if a == b:
        return 1
    ratio = sympy.sympify(a) / sympy.sympify(b)
    ratio = sympy.cancel(ratio) if not ratio.is_Integer else ratio
    if sympy.fraction(ratio)[1] != 1:
        return None
    return int(ratio) if ratio.is_Integer else ratio


def factor_of(size: Size, symbol: sympy.Symbol) -> Size | None:
    """Return c if ``size`` is ``c * symbol`` and c does not contain the symbol, else None."""
    factor = exact_ratio(size, symbol)
    if factor is None or (isinstance(factor, sympy.Expr) and symbol in factor.free_symbols):
        return None
    return factor
