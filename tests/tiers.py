"""Choose the members of a table of cases that run by default, a few of each kind; the others are marked slow.

``BATCHTRIM_TEST_PART=2/4`` leaves three quarters of the slow members out. CI takes another quarter for each commit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest

default_only = False  # True if slow tests are not asked for; conftest.py sets it


def few(names: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Return one parameter for each name, or several for a tuple; what is not in ``default`` is slow.

    If slow tests are not asked for, it is left out, as long as a parameter remains.
    """
    names = list(names)
    missing = [name for name in default if name not in names]
    assert not missing, f"no such cases: {missing}"
    if default_only:
        names = [name for name in names if name in default] or names[:1]
    kept = in_part([name for name in names if name not in default])
    names = [name for name in names if name in default or name in kept] or names[:1]
    values = [name if isinstance(name, tuple) else (name,) for name in names]
    marks = [() if name in default else pytest.mark.slow for name in names]
    return [pytest.param(*each, marks=mark) for each, mark in zip(values, marks, strict=True)]


def often(given: Callable[[Any], Any], test: Any, examples: int) -> Any:
    """Return a slow test of a property that draws more examples than ``test``, which has the same ``given``."""
    from hypothesis import settings

    return pytest.mark.slow(settings(max_examples=examples, deadline=None)(given(test.hypothesis.inner_test)))


def in_part(names: Iterable[Any], part: str | None = None) -> list[Any]:
    """Return each n-th name of a table, for ``part`` or BATCHTRIM_TEST_PART as "k/n"; without one, all names."""
    names = list(names)
    part = part or os.environ.get("BATCHTRIM_TEST_PART") or "1/1"
    at, _, of = part.partition("/")
    if not (at.isdecimal() and of.isdecimal() and 1 <= int(at) <= int(of)):
        raise ValueError(f"expected BATCHTRIM_TEST_PART to be k/n, such as 2/4, got {part!r}.")
    first = (int(at) + len(names)) % int(of)  # tables of few names do not all begin in the same part
    return names[first :: int(of)]


def one_of_each(names: Iterable[str], kind: Callable[[str], Any], count: int = 1) -> list[str]:
    """Return the first ``count`` names of each kind, for :func:`few`."""
    found: dict[Any, list[str]] = {}
    for name in names:
        found.setdefault(kind(name), []).append(name)
    return [name for each in found.values() for name in each[:count]]
