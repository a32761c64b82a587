"""A training function with mistakes: what stops the comparison, what fails a run, and what is noted."""

from __future__ import annotations

import asyncio
import copy
import io
import math
import os
import pickle
import signal
import sys
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batchtrim import Trimmer
from batchtrim.lab import Run, compare, headline, records, run_once
from own_tasks import calls, failing


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("method", ["infobatch", "rho_loss", "focal", "superloss", "full_equal_compute"])
def test_a_method_no_trimmer_drives_is_refused_before_the_first_run(method: str) -> None:
    with pytest.raises(ValueError, match=f"expected a method that a Trimmer drives.*got '{method}'"):
        compare(calls(), ["full", method], 1, out="here")
    assert not Path("here").exists()


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (None, 'expected the task to return {"error": ...}, got None'),
        ("0.3", "got '0.3'"),
        (0.3, "got 0.3"),
        ([0.3], "got [0.3]"),
        ({}, "got nothing in it"),
        ({"accuracy": 0.3}, "got accuracy. To compare by another number, name it: --metric, or metric= in Python"),
        ({"error": "low"}, "expected `error` to be a number, got 'low'"),
        ({"error": True}, "expected `error` to be a number, got True"),
        ({"error": None}, "expected `error` to be a number, got None"),
        ({"error": 12.5}, "expected `error` in [0, 1], a fraction of the test samples, got 12.5"),
        ({"error": -0.1}, "expected `error` in [0, 1]"),
        ({"error": torch.rand(3)}, "expected `error` to be a number, got a tensor of shape (3,)"),
    ],
)
def test_an_invalid_result_stops_the_comparison(returned: Any, says: str) -> None:
    done = []

    def train(run: Run) -> Any:
        done.append(run)
        calls()(run)
        return returned

    text = failing(train)
    assert says in text
    assert "\n" not in text
    assert len(done) == 1, "the other runs would end the same way"


@pytest.mark.parametrize("value", [torch.tensor(0.25), np.float64(0.25), np.array(0.25), torch.tensor([0.25]), 0.25])
def test_numbers_of_every_kind_are_results(value: Any) -> None:
    def train(run: Run) -> dict[str, Any]:
        run.trim(torch.rand(4))
        run.trim.step()
        return {"error": value, "rmse": np.float32(2.0), "words": "ignored"}

    compare(train, ["full"], 1, epochs=1, out="here", quiet=True)
    (row,) = records.read("here")
    assert row["test_error"] == 0.25
    assert row["also"] == {"rmse": 2.0}


def test_nan_is_a_run_that_diverged() -> None:
    found = compare(calls(math.nan), ["full", "trim"], 2, epochs=2, quiet=True, out="here")
    assert found.diverged == 4
    assert "every run diverged" in headline(found)


def test_another_metric_each_time_keeps_what_finished() -> None:
    def train(run: Run) -> dict[str, float]:
        calls()(run)
        return {"error": 0.1} if run.method == "full" else {"accuracy": 0.9}

    assert "got accuracy" in failing(train)
    assert [row["status"] for row in records.read("here")] == ["finished", "failed"]


def test_a_task_that_raises_is_reported_by_its_own_lines(capfd: pytest.CaptureFixture[str]) -> None:
    def inner(run: Run) -> None:
        raise KeyError("column")

    def train(run: Run) -> dict[str, float]:
        if run.method == "trim":
            inner(run)
        return calls()(run)

    found = compare(train, ["full", "trim"], 2, epochs=2, quiet=True, out="here")
    assert found.failed == 2
    told = capfd.readouterr().err
    assert told.count("Traceback") == 1, "the same for both seeds"
    assert "in inner" in told
    assert "KeyError: 'column'" in told
    assert "perform.py" not in told
    assert "own.py" not in told.replace("test_own.py", "")
    assert "every run failed" in failing(lambda run: inner(run), out="there")


def test_our_own_lines_are_left_out_below_theirs_too() -> None:
    def train(run: Run) -> dict[str, float]:
        run.trim(torch.rand(3).mean())
        return {"error": 0.0}

    told = failing(train)
    assert "Did the loss function average already?" in told
    assert "in train" in told
    assert "trimmer.py" not in told
    assert "_checks.py" not in told


def test_exit_fails_one_run() -> None:
    def train(run: Run) -> dict[str, float]:
        if run.seed == 1 and run.method == "trim":
            raise SystemExit(3)
        return calls()(run)

    found = compare(train, ["full", "trim"], 3, epochs=2, quiet=True, out="here")
    assert (found.runs, found.failed) == (6, 1)
    assert next(row for row in records.read("here") if row["status"] == "failed")["error"].startswith(
        "the task called exit(3)"
    )


def test_a_task_that_forgets_its_trimmer_is_reported() -> None:
    text = failing(lambda run: {"error": 0.1})
    assert "got a run of 'trim' in which it was never called: that is plain training" in text
    assert [row["config"]["method"] for row in records.read("here") if row["status"] == "finished"] == ["full"]


def test_a_task_that_forgets_the_clock_is_reported() -> None:
    assert "to call run.trim.step() once an epoch" in failing(calls(steps=False))


def test_a_trimmer_that_is_copied_counts_as_used() -> None:
    def train(run: Run) -> dict[str, float]:
        trim = copy.deepcopy(run.trim)
        for _ in range(run.epochs):
            trim(torch.rand(8))
            trim.step()
        return {"error": 0.1 + 0.01 * run.seed}

    compare(train, ["full", "trim"], 1, epochs=2, threads=1, quiet=True, out="here")
    assert records.read("here")[1]["samples_backward"] == 8 + 2


def test_a_trimmer_that_is_sent_away_is_noted() -> None:
    """It may have been used there: it was refused as never called."""

    def train(run: Run) -> dict[str, float]:
        pickle.dumps(run.trim_options)  # as to a process of its own
        return {"error": 0.1 + 0.01 * run.seed}

    compare(train, ["trim"], 1, epochs=2, threads=1, quiet=True, out="here")
    assert records.read("here")[0]["notes"] == [
        "run.trim was copied to another process and not called in this one, so it is not known whether it chose"
    ]


@pytest.mark.slow
@pytest.mark.torch28
def test_a_compiled_step_counts_as_used() -> None:
    def train(run: Run) -> dict[str, float]:
        @torch.compile(fullgraph=True, backend="aot_eager")
        def loss_of(losses: Tensor) -> Tensor:
            return run.trim(losses)

        for _ in range(run.epochs):
            loss_of(torch.rand(8))
            run.trim.step()
        return {"error": 0.1}

    assert run_once(train, "trim", epochs=2) == 0.1


@pytest.mark.slow
@pytest.mark.torch28
def test_another_trimmer_in_a_compiled_step_has_a_clock_of_its_own() -> None:
    """The run was refused, as one that did not step run.trim, which it need not."""

    def train(run: Run) -> dict[str, float]:
        trim = Trimmer(run.keep, total=run.epochs, **run.trim_options)
        loss_of = torch.compile(trim.__call__, fullgraph=True, backend="aot_eager")
        for _ in range(run.epochs):
            loss_of(torch.rand(8))
            trim.step()
        return {"error": 0.1}

    compare(train, ["trim"], 1, epochs=2, threads=1, quiet=True, out="here")
    assert records.read("here")[0]["notes"] == [
        "run.trim.step() was not called: if compiled steps call run.trim, all of them kept 1"
    ]


def test_log_refuses_invalid_numbers_and_a_second_point() -> None:
    def words(run: Run) -> dict[str, float]:
        run.log(error="low")  # type: ignore[arg-type]
        return {"error": 0.1}

    assert "expected `error` to be a number, got 'low'" in failing(words)

    for value, says in (
        (0.5, "expected numbers by name, run.log(epoch=..., error=...), got 0.5 without a name."),
        ({"error": 0.5}, "run.log(epoch=..., **values), got {'error': 0.5} without a name."),
    ):  # Python's own: "takes 1 positional argument but 2 were given"
        assert says in failing(lambda run, value=value: run.log(value), out=type(value).__name__)

    def twice(run: Run) -> dict[str, float]:
        run.log(epoch=0, error=0.2)
        run.log(epoch=0, error=0.1)
        return {"error": 0.1}

    assert "expected `epoch` after 0, got 0" in failing(twice, out="there")
    percent = failing(lambda run: run.log(error=12.5), out="percent")  # curves and views were drawn with it
    assert "expected `error` in [0, 1], a fraction of the test samples, got 12.5" in percent
    for name in ("seconds", "samples_backward", "value"):  # they were replaced, or taken for the metric
        taken = failing(lambda run, name=name: run.log(**{name: 0.1}), out=name)
        assert (
            f"expected names of numbers besides the lab's own (samples_backward, seconds, value), got '{name}'" in taken
        )


def test_settings_that_are_wrong_are_refused() -> None:
    for settings, says in (
        ({"lr": 0.1}, "expected settings of a task"),
        ({"model": "mlp"}, r"got 'model'\. A training function of your own decides"),
        ({"epoch": 3}, r"got 'epoch'\. Did you mean 'epochs'\?"),
        ({"epochs": 0}, "expected `epochs` to be at least 1"),
        ({"keep_end": 20}, "It is a fraction of the batch"),
        ({"metric": "score"}, "expected `higher_is_better` for the metric 'score'"),
        ({"metric": "rmse", "higher_is_better": True}, "expected lower to be better for the metric 'rmse'"),
        ({"metric": ""}, "expected `metric` to be a name"),
        ({"schedule": "steep"}, "expected `schedule` to be one of"),
    ):
        with pytest.raises((ValueError, TypeError), match=says.replace("(", r"\(")):
            compare(calls(), **settings)
    with pytest.raises(TypeError, match=r"expected a function or 'FILE.py:NAME', got 3"):
        compare(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"to take one argument, the run"):
        compare(lambda: None, out="here")  # type: ignore[arg-type, misc]


class OwnBase(BaseException):
    pass


class WithoutText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("error", [OwnBase("mine"), asyncio.CancelledError(), GeneratorExit(), WithoutText()])
def test_whatever_a_task_raises_fails_its_run_alone(error: BaseException, capfd: pytest.CaptureFixture[str]) -> None:
    """A BaseException ended the comparison; an error without a text hid the lines it came from."""

    def train(run: Run) -> dict[str, float]:
        if run.method == "trim":
            raise error
        return calls()(run)

    compare(train, ["full", "trim"], 1, epochs=2, threads=1, quiet=True, out="here")
    told = capfd.readouterr().err
    assert "raise error" in told
    assert type(error).__name__ in told
    assert [row["status"] for row in records.read("here")] == ["finished", "failed"]


def test_ctrl_c_is_not_a_failed_run() -> None:
    def train(run: Run) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a command in the background has none
    try:
        with pytest.raises(KeyboardInterrupt):
            compare(train, ["full"], 1, epochs=2, threads=1, quiet=True, out="here")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not Path("here/runs.jsonl").exists()


def test_the_cause_of_an_error_is_reported() -> None:
    def train(run: Run) -> None:
        try:
            run.trim(1)
        except TypeError as error:
            raise ExceptionGroup("training failed", [RuntimeError("deep inside")]) from error

    text = failing(train)
    assert text.index("run.trim(1)") < text.index("direct cause") < text.index("training failed")
    assert "deep inside" in text
    assert "trimmer.py" not in text


async def waits(run: Run) -> dict[str, float]:
    return {"error": 0.5}


def yields(run: Run) -> Any:
    yield {"error": 0.5}


@pytest.mark.parametrize(("function", "kind"), [(waits, "an async one"), (yields, "one that yields")])
def test_functions_that_return_later_are_refused_before_the_first_run(function: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"to be a function that returns, got {kind}"):
        compare(function, ["full"], 1, out="here")


@pytest.mark.parametrize("value", [Decimal("0.5"), Fraction(1, 2)])
def test_numbers_of_the_standard_library_are_results(value: Any) -> None:
    train = lambda run: {"error": value}  # noqa: E731
    assert compare(train, ["full"], 1, quiet=True, out="here").groups[0].arms[0].moments.mean == 0.5


def test_what_a_task_does_to_the_process_does_not_reach_the_next_run() -> None:
    """A default device, closed streams' stand-ins and warnings made errors stayed, for all runs and the report."""
    state = (
        lambda: torch.get_default_device(), torch.are_deterministic_algorithms_enabled, torch.is_anomaly_enabled,
        np.geterr, lambda: (sys.stdout, sys.stderr), lambda: [each for each in warnings.filters if each[0] == "error"],
        torch.get_float32_matmul_precision,
    )  # fmt: skip
    before, begun = [read() for read in state], []

    def train(run: Run) -> dict[str, float]:
        begun.append([read() for read in state])
        found = calls()(run)
        torch.set_default_device("meta")
        torch.use_deterministic_algorithms(True)
        torch.autograd.set_detect_anomaly(True, check_nan=False)
        torch.set_float32_matmul_precision("medium")
        np.seterr(all="raise")
        sys.stdout = sys.stderr = io.StringIO()
        warnings.simplefilter("error", ResourceWarning)
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        before[5] = state[5]()
        compare(train, ["full", "trim"], 1, epochs=2, threads=1, quiet=True, out="here")
        assert begun == [before, before]
        assert [read() for read in state] == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_a_task_forks_records_nothing() -> None:
    def train(run: Run) -> dict[str, float]:
        if run.method == "trim" and (child := os.fork()):
            os.waitpid(child, 0)
        return calls()(run)

    compare(train, ["full", "trim"], 1, epochs=2, threads=1, quiet=True, out="here")
    assert len(Path("here/runs.jsonl").read_text().splitlines()) == 2
