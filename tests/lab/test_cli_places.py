"""Where a command's runs go and come from, as a person types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from batchtrim.lab import cli

TINY = ["--epochs", "1", "--train-size", "100", "--seeds", "0,", "--workers", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BATCHTRIM_DATA", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)  # a terminal's width, which whoever runs the tests may have set


def batchtrim(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def test_a_second_comparison_with_other_settings_goes_to_a_folder_of_its_own(tmp_path: Path) -> None:
    batchtrim("compare", *TINY, "-q")
    done = batchtrim("compare", *TINY, "--lr", "0.01")
    assert done.exit_code == 0, done.output
    assert "runs go to runs/digits-mlp-adam-1ep-lr0.01: runs/digits-mlp-adam-1ep holds runs" in done.stderr
    again = batchtrim("compare", *TINY, "--lr", "0.01")
    assert "2 of 2 runs are recorded already" in again.stderr


def test_show_takes_method_and_seed_and_lists_runs_by_name() -> None:
    batchtrim("compare", *TINY, "--out", "here", "--keep-log", "-q")
    done = batchtrim("show", "here", "--method", "full", "--seed", "0", "--out", "full.html")
    assert done.exit_code == 0, done.output
    assert "digits mlp full seed 0" in Path("full.html").read_text()
    wrong = batchtrim("show", "here", "--method", "tirm")
    assert wrong.exit_code == 2
    assert "digits mlp trim linear 1-0.2 seed 0  (--key" in wrong.stderr


def test_lines_to_a_pipe_are_whole_and_times_are_told_apart() -> None:
    done = batchtrim("compare", *TINY, "--out", "here")
    assert any("minus baseline on the same seed, in points" in line for line in done.stdout.splitlines())
    assert "s training, " in done.stderr
    assert "s in all" in done.stderr
    assert "epoch 1/1, batch 1/1" in done.stderr


@pytest.mark.parametrize("command", [[], ["compare"], ["show"]])
def test_h_is_help(command: list[str]) -> None:
    assert "Usage:" in batchtrim(*command, "-h").stdout
