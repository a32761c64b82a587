"""The record of a run that raised an error."""

from __future__ import annotations

from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.failed import LONGEST, error_line, failed_row
from batchtrim.lab.task.own_code import YourCodeFailed


def test_an_error_of_several_lines_is_recorded_as_one() -> None:
    error = ValueError("first\n  second\n" + "x" * 900)
    assert error_line(error).startswith("ValueError: first second xxx")
    assert len(error_line(error)) == LONGEST
    assert error_line(YourCodeFailed("raised.\nTraceback")) == "YourCodeFailed: raised.\nTraceback"
    assert failed_row(RunConfig().resolved(), error)["error"] == error_line(error)
