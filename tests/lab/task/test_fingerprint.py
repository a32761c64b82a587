"""The version of a function in memory: of its code, and of what it uses."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
import pytest

from batchtrim.lab import Run
from batchtrim.lab.task.fingerprint import hash_of_function

RATE, SETTINGS, HISTORY = 0.1, {"rate": 0.1}, [0.1]


class Holder:
    def __init__(self, rate: float) -> None:
        self.rate, self.seen = rate, [rate]

    def __call__(self, run: Run) -> dict[str, float]:
        return self.train(run)

    def train(self, run: Run) -> dict[str, float]:
        return {"error": self.rate}


def closing_over(rate: Any) -> Any:
    return lambda run: {"error": rate}


def counting(start: int) -> Any:
    calls, counted = [start], start

    def train(run: Run) -> dict[str, float]:
        nonlocal counted
        counted += 1
        calls.append(counted)
        return {"error": 0.1}

    return train


def reading(run: Run) -> dict[str, float]:
    return {"error": RATE * SETTINGS["rate"] + len(HISTORY)}


def calling(run: Run) -> dict[str, float]:
    return reading(run)


PAIRS: dict[str, Any] = {
    "a closure's number": lambda: (closing_over(0.1), closing_over(0.2)),
    "NumPy's": lambda: (closing_over(np.float32(0.1)), closing_over(np.float32(0.2))),
    "a table of settings": lambda: (closing_over({"rate": 0.1}), closing_over({"rate": 0.2})),
    "a default": lambda: (lambda run, rate=0.1: rate, lambda run, rate=0.2: rate),
    "a partial's": lambda: (partial(closing_over, rate=0.1), partial(closing_over, rate=0.2)),
    "an object's": lambda: (Holder(0.1), Holder(0.2)),
    "a method's object's": lambda: (Holder(0.1).train, Holder(0.2).train),
    "another constant": lambda: (lambda run: {"error": 0.1}, lambda run: {"error": 0.2}),
    "a function it calls": lambda: (closing_over(closing_over(0.1)), closing_over(closing_over(0.2))),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_functions_that_use_other_values_are_other_versions(pair: str) -> None:
    """All had the same name and source, or none: the second comparison gave the first one's runs, without a word."""
    one, again, other = PAIRS[pair]()[0], PAIRS[pair]()[0], PAIRS[pair]()[1]
    assert hash_of_function(one) == hash_of_function(again) != hash_of_function(other)


def test_what_a_function_reads_and_calls_is_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    this, before = sys.modules[__name__], hash_of_function(calling)
    for name, value in (("RATE", 0.2), ("SETTINGS", {"rate": 0.2}), ("reading", lambda run: None)):
        with monkeypatch.context() as patch:
            patch.setattr(this, name, value)
            assert hash_of_function(calling) != before
    HISTORY.append(0.2)  # data
    try:
        assert hash_of_function(calling) == before
    finally:
        HISTORY.pop()
    assert hash_of_function(counting(1)) == hash_of_function(counting(2)), "a counter of its own"
