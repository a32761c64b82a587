"""What cannot be put back is refused and named, and only where a function changes it; the rest runs."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import logging
import os
import queue
import re
import sqlite3
import sys
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doing import Doing
from torch import Tensor, nn

import batchtrim
from batchtrim.engine.reachable import Reachable
from batchtrim.errors import EngineRefused


class Object:
    pass


def _names(value: Any, method: str) -> Callable[[], Any]:
    """Return a function that holds a value and names one of its methods."""
    return eval(f"lambda: value.{method}", {"value": value})


REFUSED: dict[str, Callable[[], tuple[Any, str]]] = {
    "hash": lambda: (hashlib.sha256(), "update"), "packed": lambda: (zlib.compressobj(), "flush"),
    "scanner": lambda: (re.compile("a").scanner("aa"), "match"),  # type: ignore[attr-defined]
    "simple queue": lambda: (queue.SimpleQueue(), "put"),
    "database": lambda: (sqlite3.connect(":memory:"), "execute"),
    "file": lambda: (Path(os.devnull).open("w"), "write"), # noqa: SIM115
    "seeds": lambda: (np.random.SeedSequence(0), "spawn"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_put_back_is_refused_where_it_is_used(name: str) -> None:
    value, method = REFUSED[name]()
    model = Doing(_names(value, method))
    kind = f"{type(value).__module__}.{type(value).__name__}".replace(".", r"\.")
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "two_pass")
    with pytest.raises(EngineRefused, match=rf"it holds an object of type {kind} \(Doing\.do\)"):
        step(torch.randn(12, 6), torch.arange(12) % 5)
    assert Reachable(Doing(_names(value, "method_that_changes_nothing"))).lasting is None
    if hasattr(value, "close"):
        value.close()


@pytest.mark.parametrize("take", ["in a closure", "by a default", "bound", "of a class"])
def test_an_iterator_is_found_where_a_function_takes_its_next_value(take: str) -> None:
    numbers = itertools.count()

    class Numbered:
        numbers = itertools.count()

    def by_a_default(own: Any = numbers) -> int:
        return next(own)

    following = numbers.__next__
    does: dict[str, Callable[..., Any]] = {
        "in a closure": lambda: next(numbers), "by a default": by_a_default,
        "bound": lambda: following(), "of a class": lambda: next(Numbered.numbers),
    }  # fmt: skip
    assert "it holds an iterator" in str(Reachable(Doing(does[take])).lasting)


class Numbered(nn.Module):
    """Models of which each gets a number, when it is made."""

    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.number = next(self.numbers)


def _script(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


HARMLESS: dict[str, Callable[[], Any]] = {
    "logger": lambda: logging.getLogger("another"), "lock": threading.Lock, "pattern": lambda: re.compile("a"),
    "module": lambda: os, "partial": lambda: lambda: None, "output": lambda: sys.stdout, "hash": hashlib.md5,
    "event": threading.Event, "file": lambda: Path(os.devnull).open(),  # noqa: SIM115
    "weak": lambda: weakref.ref(Object),
    "function of C": lambda: ctypes.CDLL(None).abs, "type": lambda: list[int],
    "numbered": Numbered,
    "script": lambda: _script(nn.BatchNorm1d(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_only_held_is_no_reason_to_refuse(name: str) -> None:
    held = HARMLESS[name]()

    class Holding(Doing):
        def __init__(self) -> None:
            super().__init__(lambda: held is not None)
            self.held = held

    model = Holding()
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "two_pass")
    step(torch.randn(12, 6), torch.arange(12) % 5).backward()
    assert step.last is not None
    assert step.last.engine == "two_pass"
    if name == "file":
        held.close()


def test_what_is_drawn_elsewhere_is_named_as_such() -> None:
    class Drawing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + int.from_bytes(os.urandom(2), "big") / 65536)

    step = batchtrim.TrimmedForward(Drawing(6, 5), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "two_pass")
    with pytest.raises(EngineRefused, match="its losses change when it runs again from the same state"):
        step(torch.randn(12, 6), torch.arange(12) % 5)
