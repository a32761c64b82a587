"""The call of a training function: what its time includes, and what it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from batchtrim import Trimmer
from batchtrim.lab.run.config import ENGINES
from batchtrim.lab.run.perform import _import_ahead, perform
from batchtrim.lab.run.task_config import TaskConfig
from batchtrim.lab.run.task_run import Run
from batchtrim.lab.task.own_code import Code

_TASK = """
import sys
import time

time.sleep(0.3)


def train(run):
    there = int("torch._dynamo" in sys.modules)
    run.trim.step()
    run.log(epoch=0, error=0.5)
    return {"error": 0.5, "there": there}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskConfig:
    monkeypatch.chdir(tmp_path)
    Path("slow_to_import.py").write_text(_TASK)
    return TaskConfig(task="slow", epochs=1, code=Code.in_file("slow_to_import.py:train", "train")).resolved()


def test_curves_and_the_run_share_a_clock(config: TaskConfig, tmp_path: Path) -> None:
    """Seconds of the curves began before the function's file was imported, and ended after the run's own."""
    row = perform(config, tmp_path)
    assert row["status"] == "finished"
    assert row["curve"]["seconds"][0] <= row["seconds"] < 0.3


def test_imports_during_the_call_are_noted(config: TaskConfig, tmp_path: Path) -> None:
    """They counted as training of the first run, and so of its method, without a word."""
    file = Path("slow_to_import.py")
    Path("my_helper_here.py").write_text("")
    file.write_text(file.read_text().replace("    run.trim.step()", "    import my_helper_here\n    run.trim.step()"))
    config = replace(config, code=Code.in_file("slow_to_import.py:train", "train"))
    first, second = (perform(config, tmp_path) for _ in range(2))
    (note,) = first["notes"]
    assert note.startswith("the first run of a process imported my_helper_here during the call, which adds to its time")
    assert "notes" not in second


@pytest.mark.slow
def test_the_process_is_left_as_it_was_by_what_is_imported_ahead() -> None:
    """A notebook may have turned gradients off, or set another dtype or device."""
    drawn = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        for engine in ENGINES:
            with torch.inference_mode():
                _import_ahead.__wrapped__(engine)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), drawn)


@pytest.mark.slow
def test_torchs_compiler_is_imported_before_the_clock_starts(config: TaskConfig) -> None:
    """The first run of each process counted seconds of imports as training, and with it its method."""
    program = (
        "from batchtrim.lab.run.perform import perform; from batchtrim.lab.run.task_config import TaskConfig\n"
        "from batchtrim.lab.task.own_code import Code; from pathlib import Path\n"
        "code = Code.in_file('slow_to_import.py:train', 'train')\n"
        "print(perform(TaskConfig(task='slow', epochs=1, code=code).resolved(), Path('.'))['also'])"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert told.stdout.strip() == "{'there': 1.0}", told.stderr


_RESUMES = """
from pathlib import Path

import torch


def train(run):
    file, first = run.out / "checkpoint.pt", 0
    if file.exists():
        state = torch.load(file)
        first = state["epochs"]
        if "trim" in state:
            run.trim.load_state_dict(state["trim"])
    for epoch in range(first, run.epochs):
        run.trim(torch.arange(10.0))
        run.trim.step()
        run.log(epoch=epoch, error=0.5)
        trim = {"trim": run.trim.state_dict()} if SAVED else {}
        torch.save({"epochs": epoch + 1, **trim}, file)
        if epoch == int(Path("stop").read_text()):
            raise RuntimeError("the power went out")
    return {"error": 0.5}
"""


def _attempt(out: Path, *, stop: int, saved: bool = True, error: float = 0.5) -> dict[str, Any]:
    Path("stop").write_text(str(stop))  # a file changed within a second may be imported as it was before
    Path("resumes.py").write_text(_RESUMES.replace("SAVED", str(saved)).replace("0.5", str(error)))
    code = Code.in_file("resumes.py:train", "train")
    return perform(TaskConfig(task="resumes", method="trim", epochs=5, code=code).resolved(), out)


@pytest.mark.usefixtures("config")
def test_a_task_that_continues_counts_all_its_parts(tmp_path: Path) -> None:
    """Time, samples and curve were those of the last part, so that a resumed run seemed to cost less than it did."""
    whole = _attempt(tmp_path / "whole", stop=9)
    first = _attempt(tmp_path / "parts", stop=1)
    second = _attempt(tmp_path / "parts", stop=3)
    third = _attempt(tmp_path / "parts", stop=9)
    assert [row["status"] for row in (whole, first, second, third)] == ["finished", "failed", "failed", "finished"]
    for name in ("samples_forward", "samples_backward", "steps", "notes"):
        assert third.get(name) == whole.get(name), name
    assert third["steps"] == 5
    for name in ("epoch", "keep", "kept_loss", "error", "test_error", "samples_backward"):
        assert third["curve"].get(name) == whole["curve"].get(name), name
    seconds = third["curve"]["seconds"]
    assert seconds == sorted(seconds)
    assert len(seconds) == 5
    assert seconds[-1] <= third["seconds"]


@pytest.mark.usefixtures("config")
def test_a_task_that_may_have_continued_without_the_counts_has_a_note(tmp_path: Path) -> None:
    """Nothing said that the numbers were those of the last part."""
    first, second = (_attempt(tmp_path / "out", stop=stop, saved=False) for stop in (2, 9))
    assert "notes" not in first
    assert any(
        note.startswith("the run's folder held files of an earlier attempt (checkpoint.pt): if the task continued")
        for note in second["notes"]
    )


@pytest.mark.usefixtures("config")
def test_a_task_that_continues_from_another_version_has_a_note(tmp_path: Path) -> None:
    """It was recorded as a run of the new version alone."""
    _attempt(tmp_path / "out", stop=1)
    _attempt(tmp_path / "out", stop=2, error=0.4)
    (note,) = _attempt(tmp_path / "out", stop=9, error=0.4)["notes"]
    assert note.startswith("the run continued from a state that another version of the task saved")


def test_a_state_of_another_run_or_of_a_plain_trimmer_brings_no_counts(tmp_path: Path) -> None:
    config = TaskConfig(task="mine.py:train", method="trim", epochs=3)
    one, other = (Run(replace(config, seed=seed).resolved(), tmp_path) for seed in (0, 1))
    one.trim(torch.rand(10))
    one.trim.step()
    other.trim.load_state_dict(one.trim.state_dict())
    assert (other.trim.steps, other.rule.counts.calls, other.rule.counts.continued) == (1, 0, False)
    plain = Trimmer(one.keep, total=3)
    plain.load_state_dict(one.trim.state_dict())
    other.trim.load_state_dict(plain.state_dict())
    assert other.rule.counts.calls == 0
    one.trim.load_state_dict(one.trim.state_dict())  # back to the run's own checkpoint: what was done stays counted
    assert one.rule.counts.calls == 1
