"""Layouts: found by shape and value, taken without changing the order of strides."""

from __future__ import annotations

import pytest
import torch

from batchtrim.engine.layouts import WHOLE, Layout, candidates, close, take


def shapes(full: tuple[int, ...], part: tuple[int, ...]) -> list[Layout]:
    return candidates(torch.Size(full), torch.Size(part), batch=6, k=2)


def test_candidates() -> None:
    assert shapes((6, 3), (2, 3)) == [Layout(0)]
    assert shapes((3, 6), (3, 2)) == [Layout(1)]
    assert shapes((6, 6), (2, 6)) == [Layout(0)], "a channel count equal to B is not the batch"
    assert shapes((6, 6), (2, 2)) == [], "samples against samples"
    assert shapes((5, 3), (5, 3)) == [WHOLE]
    assert shapes((24,), (8,)) == [Layout(0, 1, 4), Layout(0, 2, 2), Layout(0, 4, 1)]
    assert shapes((7, 3), (2, 3)) == [], "not a multiple of the batch"
    assert shapes((24,), (9,)) == [], "grows otherwise than the batch"
    assert shapes((6,), (2, 1)) == []


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (1, 4), (4, 1), (2, 2)])
def test_take(outer: int, inner: int) -> None:
    rows = torch.tensor([1, 4])
    full = torch.arange(outer * 6 * inner * 3.0).view(outer, 6, inner, 3)
    taken = take(full.reshape(-1, 3), Layout(0, outer, inner), rows)
    assert torch.equal(taken, full[:, rows].reshape(-1, 3))


def test_take_keeps_channels_last() -> None:
    full = torch.randn(6, 3, 4, 5).to(memory_format=torch.channels_last)
    taken = take(full, Layout(0), torch.tensor([0, 5]))
    assert torch.equal(taken, full[[0, 5]])
    assert taken.is_contiguous(memory_format=torch.channels_last)


def test_close_is_relative_to_the_largest_value_and_never_true_of_nan() -> None:
    value = torch.tensor([1000.0, 1e-3])
    assert close(value, value + torch.tensor([0.1, 0.1]))
    assert not close(value, value + torch.tensor([1.0, 0.0]))
    assert not close(value, value[:1])
    assert not close(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert close(torch.tensor([1, 2]), torch.tensor([1, 2]))
