"""An error in one line: its type, and the first line of its message if it has one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from batchtrim import Trimmer
from batchtrim._checks import describe, first_line, in_one_line
from batchtrim.distributed import gather
from batchtrim.errors import RanksDisagree


@pytest.mark.parametrize(
    ("error", "line", "named"),
    [
        (ValueError("one\ntwo"), "one", "ValueError: one"),
        (ValueError("\n one\n"), "one", "ValueError: one"),
        (ValueError(), "ValueError", "ValueError"),
        (ValueError("x" * 500), "x" * 160, "ValueError: " + "x" * 200),
    ],
)
def test_an_error_in_one_line(error: Exception, line: str, named: str) -> None:
    assert first_line(error) == line
    assert in_one_line(error) == named


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (np.zeros((3, 400)), "an array of shape (3, 400) and dtype float64"),  # over two lines, cut after 80 characters
        ([torch.zeros(2)] * 2, "a list of " + ", ".join(["a tensor of shape (2,) and dtype torch.float32"] * 2)),
        ((torch.zeros(()),) * 9, ", a tensor of shape () and dtype torch.float32, ... (9 in all)"),
        (SyntaxError("a\nb"), "SyntaxError('a\\nb')"),
    ],
)
def test_what_arrived_is_described_in_one_line(value: object, described: str) -> None:
    assert describe(value).endswith(described)


def test_losses_as_an_array_are_refused_with_the_cause() -> None:
    with pytest.raises(TypeError, match=r"got an array of shape \(4,\) .* before \.numpy\(\)"):
        Trimmer(0.5)(np.zeros(4))  # type: ignore[arg-type]


def test_a_collective_that_fails_without_a_message_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(dist, "all_gather", fail)
    with pytest.raises(RanksDisagree, match=r"no matching answer \(RuntimeError\)"):
        gather(torch.zeros(1), 2, None)
