"""Which members of a table of cases run by default: a few of each kind. The others are marked slow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def few(names: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Return one parameter for each name; those not in ``default`` are slow."""
    names = list(names)
    missing = set(default) - set(names)
    assert not missing, f"no such cases: {missing}"
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names]


def one_of_each(names: Iterable[str], kind: Callable[[str], Any], count: int = 1) -> list[str]:
    """Return the first ``count`` names of each kind, for :func:`few`."""
    found: dict[Any, list[str]] = {}
    for name in names:
        found.setdefault(kind(name), []).append(name)
    return [name for each in found.values() for name in each[:count]]
