"""NumPy's numbers, fractions and 0-d tensors are accepted like Python's numbers, for every argument."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import batchtrim
from batchtrim import KeepLog, Trimmer, by_accuracy, linear
from batchtrim.errors import ScheduleOutOfRange

LOSSES = torch.rand(12)


@pytest.mark.parametrize("half", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)])
def test_numbers_of_any_kind_serve_as_fractions(half: Any) -> None:
    wanted = Trimmer(0.5)(LOSSES)
    assert Trimmer(half)(LOSSES) == wanted
    assert Trimmer(lambda progress: half, total=3)(LOSSES) == wanted
    assert Trimmer(linear(half, half), total=3)(LOSSES) == wanted
    trim = Trimmer(by_accuracy({0.4: 0.5}))
    trim.step(accuracy=half)
    assert trim(LOSSES) == wanted


@pytest.mark.parametrize("three", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_numbers_of_any_kind_serve_as_counts(three: Any) -> None:
    trim = Trimmer(total=three, seed=three)
    trim.step(three)
    assert (trim.total, trim.steps, trim.seed, trim.keep) == (3, 3, 3, 0.2)
    trim.load_state_dict({**trim.state_dict(), "steps": three})
    assert type(trim.steps) is int
    assert KeepLog(three).n == 3
    assert batchtrim.selection.above(2.0, min_keep=three)(LOSSES, 1.0).k == 3


@pytest.mark.parametrize("wrong", [True, np.bool_(True), "0.5", [0.5, 0.5], np.array([0.5, 0.5]), 1j])
def test_values_that_are_not_numbers(wrong: Any) -> None:
    with pytest.raises(TypeError, match="expected `keep` to be"):
        Trimmer(wrong)
    with pytest.raises(ScheduleOutOfRange, match="expected the keep schedule to return a fraction"):
        Trimmer(lambda progress: wrong, total=2)


def test_a_number_just_outside_is_shown_in_full() -> None:
    """It said: expected `keep` in (0, 1], got 1."""
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 1\.0000001\."):
        Trimmer(1.0000001)
