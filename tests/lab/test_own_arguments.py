"""Arguments of the wrong kind to `compare` and `summarize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchtrim.lab import compare, headline, run_once, summarize
from own_tasks import calls


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "rows", ["runs.csv", 5, None, {"method": "trim"}, ["method", "seed"], [("trim", 0, 0.1)], Path("runs")]
)
def test_arguments_that_are_not_rows_are_refused(rows: Any) -> None:
    with pytest.raises(TypeError, match="expected `rows` to be a list of mappings such as"):
        summarize(rows)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seeds": "two"}, "expected `seeds` to be a number .*got 'two'"),
        ({"methods": 5}, "expected `methods` .*got 5"),
        ({"out": 5}, "expected `out` to be the path of a folder, got 5"),
        ({"ray": 5}, "expected `ray` to be the address .*got 5"),
        ({"retries": "x"}, "expected `retries` to be an int, got 'x'"),
        ({"quiet": "no"}, "expected `quiet` to be True or False, got 'no'"),
        ({"tensorboard": "no"}, "expected `tensorboard` to be True or False, got 'no'"),
        ({"params": ["a"]}, r"expected `params` to be tables .*got \['a'\]"),
    ],
)
def test_settings_of_another_kind_are_refused_before_the_first_run(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        compare(calls(), **{"out": "here", **settings})
    assert not Path("here").exists()


def test_arguments_that_are_not_flag_table_or_summary_are_refused() -> None:
    with pytest.raises(TypeError, match="expected `higher_is_better` to be True or False, got 'yes'"):
        summarize([{"method": "full", "seed": 0, "score": 0.1}], higher_is_better="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected `params` to be a mapping of methods .*got 5"):
        run_once(calls(), params=5)
    with pytest.raises(TypeError, match=r"to take one argument, the run"):
        run_once(lambda: None)  # type: ignore[arg-type, misc]
    with pytest.raises(TypeError, match="expected `summary` to be what compare or summarize returns, got 5"):
        headline(5)  # type: ignore[arg-type]


def test_errors_of_python_calls_name_its_arguments() -> None:
    """They named options of the command line."""
    with pytest.raises(ValueError, match=r"got mae, rmse\. Name it with metric=NAME\."):
        summarize([{"method": "full", "seed": 0, "mae": 0.1, "rmse": 0.2}])
    with pytest.raises(ValueError, match="in Python, higher_is_better=True or False"):
        summarize([{"method": "full", "seed": 0, "score": 0.1}])


def test_a_baseline_that_has_no_runs_is_refused() -> None:
    rows = [{"method": method, "seed": 0, "score": 0.1} for method in ("plain", "trim")]
    assert summarize(rows, higher_is_better=True).groups[0].baseline is None
    with pytest.raises(ValueError, match="expected `baseline` to be one of 'plain', 'trim', got 'plan'"):
        summarize(rows, "plan", higher_is_better=True)
