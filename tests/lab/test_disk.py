"""A disk that is full, and a folder that is gone: one line at once, and what is recorded stays."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from batchtrim import KeepLog, lab
from batchtrim.lab import files, records
from batchtrim.lab.execute import grid, progress, scheduler
from batchtrim.lab.files import CannotWrite
from batchtrim.lab.present import readme_table
from batchtrim.lab.records import Records
from batchtrim.lab.run.config import RunConfig

CONFIGS = grid.expand({"methods": ["full", "trim"], "seeds": 2, "epochs": 1, "train_size": 100})


class Counts(progress.Quiet):
    def __init__(self) -> None:
        self.begun: list[str] = []
        self.over = 0

    def epoch(self, config: RunConfig, point: dict[str, Any]) -> None:
        self.begun.append(config.key)

    def finished(self, config: RunConfig, row: records.Row | None) -> None:
        self.over += 1


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_stops_the_runs_at_the_first_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Counts()
    scheduler.run_all(CONFIGS[:1], scheduler.Workplace(tmp_path), progress.Quiet())
    monkeypatch.setattr(records.os, "write", full)
    with pytest.raises(CannotWrite, match=r"cannot write .*runs\.jsonl \(No space left on device\)"):
        scheduler.run_all(CONFIGS, scheduler.Workplace(tmp_path), spy)
    assert len(spy.begun) == 1
    monkeypatch.undo()
    assert len(records.read(tmp_path)) == 1


def test_a_checkpoint_that_cannot_be_saved_is_no_fault_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CannotWrite, match=r"checkpoints/.*\.pt"):
        scheduler.run_all(CONFIGS, scheduler.Workplace(tmp_path, checkpoint_seconds=0.0), progress.Quiet())
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_folder_that_is_gone_is_told_and_not_made_again(tmp_path: Path) -> None:
    class Removes(Counts):
        def finished(self, config: RunConfig, row: records.Row | None) -> None:
            super().finished(config, row)
            shutil.rmtree(tmp_path / "out")

    spy = Removes()
    with pytest.raises(CannotWrite, match="the folder is gone"):
        scheduler.run_all(CONFIGS, scheduler.Workplace(tmp_path / "out"), spy)
    assert spy.over == 1
    assert not (tmp_path / "out").exists()


def test_a_row_is_not_written_into_a_folder_made_anew(tmp_path: Path) -> None:
    there = Records(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    os.mkdir(tmp_path / "out")
    with pytest.raises(CannotWrite, match="the folder is gone"):
        there.append({"key": "a"})
    assert os.listdir(tmp_path / "out") == []


def test_a_disk_that_is_full_from_the_start_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "write_whole", full)
    with pytest.raises(CannotWrite, match=r"cannot write .*grid\.json \(No space left on device\)"):
        scheduler.run_all(CONFIGS, scheduler.Workplace(tmp_path), progress.Quiet())


def test_a_keep_log_of_a_task_that_cannot_be_written_is_no_fault_of_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(run: lab.Run) -> dict[str, float]:
        run.keep_log(8)
        return {"error": 0.1}

    monkeypatch.setattr(KeepLog, "to_parquet", full)
    with pytest.raises(CannotWrite, match=r"cannot write .*keep/.*\.parquet \(No space left on device\)"):
        lab.compare(train, ["full"], 2, epochs=1, out=tmp_path, quiet=True)
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_page_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- results --><!-- /results -->")
    monkeypatch.setattr(readme_table, "table", lambda _: "| a |")
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(CannotWrite, match=r"cannot write .*README\.md"):
        readme_table.write([], page)
    assert page.read_text() == "<!-- results --><!-- /results -->"
    assert os.listdir(tmp_path) == ["README.md"]
