"""An error in one line: its type, and the first line of its message if it has one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from batchtrim._checks import first_line, in_one_line
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


def test_a_collective_that_fails_without_a_message_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(dist, "all_gather", fail)
    with pytest.raises(RanksDisagree, match=r"no matching answer \(RuntimeError\)"):
        gather(torch.zeros(1), 2, None)
