"""The call of a training function: what its time includes, and what it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from batchtrim.lab.run.config import ENGINES
from batchtrim.lab.run.perform import _import_ahead, perform
from batchtrim.lab.run.task_config import TaskConfig
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
