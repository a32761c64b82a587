"""Every file in examples/ runs: on digits, and on TREC's questions if BATCHTRIM_DATA has them."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import launch
from batchtrim.lab.present import gallery
from tiers import few

EXAMPLES = Path(__file__).parents[2] / "examples"
BACKEND = {"backend": "aot_eager"}
# Without the questions the example reads digits as sequences, which a transformer learns more slowly.
TEXT = {"epochs": 2, "rows": 1000} if os.environ.get("BATCHTRIM_DATA") else {"epochs": 8, "rows": 600}
# arguments, and what the returned accuracy must reach; a fall in loss for the language model, a gain in accuracy over
# trimming the hardest for the noise-robust one, an overlap for the segmentation
RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "01_plain_loop": ({"epochs": 4}, 0.85),
    "04_accumulation": ({"epochs": 4}, 0.85),
    "05_lightning": ({"epochs": 4}, 0.85),
    "06_huggingface_classification": (TEXT, 0.4),
    "07_causal_lm_tokens": ({"epochs": 2, "rows": 400}, 0.5),
    "08_accelerate": ({"epochs": 4}, 0.85),
    "09_compile": ({"epochs": 4, **BACKEND}, 0.85),
    "11_engine": ({"epochs": 3, "rows": 700}, 0.85),
    "12_noise_robust": ({"epochs": 15}, 0.03),
    "13_segmentation": ({"epochs": 3}, 0.4),
    "14_mixed_precision": ({"epochs": 4}, 0.85),
    "15_own_images": ({"epochs": 4, "seeds": 1, "clips": 12}, 0.3),
    "16_own_regression": ({"epochs": 6, "seeds": 2, "out": "regression"}, 0.3),
    "18_optuna": ({"trials": 3, "epochs": 3, "seeds": 2, "out": "optuna"}, 0.3),
}
TORCHRUN = ("02_ddp", "03_fsdp2")
pytestmark = [
    pytest.mark.usefixtures("settled"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # Accelerate's default, on a machine without an accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(EXAMPLES)
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


# By default other tests run the same code: test_accumulation.py that of 04 and 14, those of the Hugging Face trainer
# that of 06 and 07, test_compile.py that of 09, test_docs.py, with docs/engines.md, that of 11, the table of methods,
# with two_sided, that of 12, field/test_losses.py, with a loss for each pixel, that of 13, and those of Lightning,
# Accelerate and own tasks that of 05, 08, 15, 16 and 18.
SLOW = {
    "04_accumulation", "05_lightning", "06_huggingface_classification", "07_causal_lm_tokens", "08_accelerate",
    "09_compile", "11_engine", "12_noise_robust", "13_segmentation", "14_mixed_precision", "15_own_images",
    "16_own_regression", "18_optuna",
}  # fmt: skip


@pytest.mark.parametrize("name", few(RUNS, set(RUNS) - SLOW))
def test_example_learns(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "18_optuna":
        pytest.importorskip("optuna", reason="optuna is not installed: make test brings it")
    options, least = RUNS[name]
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert load(name, monkeypatch)["main"](**options) >= least


@pytest.mark.slow  # by default test_engine_in_the_training_step is run
def test_lightning_with_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("05_lightning", monkeypatch)
    assert example["main"](4, example["FasterDigits"]) >= 0.85


def test_the_text_task_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path(os.environ.get("BATCHTRIM_DATA") or "none", "trec").is_dir():
        pytest.skip("BATCHTRIM_DATA has no trec")
    monkeypatch.setenv("TREC_ROWS", "200")
    monkeypatch.chdir(tmp_path)
    assert 0.1 < load("17_own_text", monkeypatch)["main"](epochs=1, seeds=1, methods="trim", out="text") < 0.95
    page = gallery.build("text").read_text(encoding="utf-8")
    assert "how did serfdom develop in and then leave russia ?" in page
    assert "description" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHRUN)
def test_example_under_torchrun(name: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    path = str(EXAMPLES / f"{name}.py")
    command += [launch.__file__, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) >= 0.9


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("[0-9]*.py")} == {*RUNS, *TORCHRUN, "10_resume", "17_own_text"}


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (["01_plain_loop.py", "--epochs", "0"], "argument --epochs: expected a whole number of at least 1, got '0'."),
        (["01_plain_loop.py", "--epoch-s", "3"], "unrecognized arguments: --epoch-s 3"),
        (["02_ddp.py"], "start it with: torchrun --nproc-per-node 2 examples/02_ddp.py"),
        (["03_fsdp2.py"], "start it with: torchrun --nproc-per-node 2 examples/03_fsdp2.py"),
        (["10_resume.py"], "the following arguments are required: FOLDER"),
        (["10_resume.py", __file__], "expected a folder, got the file"),
    ],
)
def test_what_is_typed_wrong_is_answered_in_a_sentence(
    typed: list[str], answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", typed)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / typed[0]), run_name="__main__")
    assert stop.value.code != 0
    assert answer in f"{stop.value.code} {capsys.readouterr().err}"


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("10_resume", monkeypatch)
    expected = example["main"](tmp_path / "whole").state_dict()

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(EXAMPLES / "10_resume.py"), str(tmp_path / "killed"), "--pause", "0.1"]
    process = subprocess.Popen(command, env=environment)
    state = tmp_path / "killed" / "state.pt"
    end = time.monotonic() + 60
    while not (state.exists() and torch.load(state, weights_only=True)["done"] >= 13):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = torch.load(state, weights_only=True)["done"]
    assert 13 <= done < 30, "in the middle of the second epoch or the third"
    assert done % 10, "and of an epoch"

    found = example["main"](tmp_path / "killed")
    for name, tensor in expected.items():
        assert torch.equal(found.state_dict()[name], tensor), name
