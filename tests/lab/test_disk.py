"""A full disk, and a folder that is gone: one line at once, and what is recorded stays."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import re
import shutil
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from batchtrim import KeepLog, lab
from batchtrim.lab import cli, files, records
from batchtrim.lab.execute import grid, local, on_ray, progress, scheduler
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
    scheduler.run_all(CONFIGS[:1], scheduler.SharedOptions(tmp_path), progress.Quiet())
    monkeypatch.setattr(records.os, "write", full)
    with pytest.raises(CannotWrite, match=r"cannot write .*runs\.jsonl \(No space left on device\)"):
        scheduler.run_all(CONFIGS, scheduler.SharedOptions(tmp_path), spy)
    assert len(spy.begun) == 1
    monkeypatch.undo()
    assert len(records.read(tmp_path)) == 1


def test_a_checkpoint_that_cannot_be_saved_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CannotWrite, match=r"checkpoints/.*\.pt"):
        scheduler.run_all(CONFIGS, scheduler.SharedOptions(tmp_path, checkpoint_seconds=0.0), progress.Quiet())
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_folder_that_is_gone_is_reported_and_not_recreated(tmp_path: Path) -> None:
    class Removes(Counts):
        def finished(self, config: RunConfig, row: records.Row | None) -> None:
            super().finished(config, row)
            shutil.rmtree(tmp_path / "out")

    spy = Removes()
    with pytest.raises(CannotWrite, match="the folder is gone"):
        scheduler.run_all(CONFIGS, scheduler.SharedOptions(tmp_path / "out"), spy)
    assert spy.over == 1
    assert not (tmp_path / "out").exists()


def test_a_row_is_not_written_into_a_recreated_folder(tmp_path: Path) -> None:
    there = Records(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    os.mkdir(tmp_path / "out")
    with pytest.raises(CannotWrite, match="the folder is gone"):
        there.append({"key": "a"})
    assert os.listdir(tmp_path / "out") == []


def test_a_disk_that_is_full_from_the_start_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "write_whole", full)
    with pytest.raises(CannotWrite, match=r"cannot write .*grid\.json \(No space left on device\)"):
        scheduler.run_all(CONFIGS, scheduler.SharedOptions(tmp_path), progress.Quiet())


def test_a_keep_log_that_cannot_be_written_does_not_fail_the_task(
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


CLAIMS = """
title = "a record"
effect = 0.1
[[claim]]
text = "Trimming lowers the error."
method = "trim"
against = "full"
says = "lower"
"""


def unwritable(*_: object) -> int:
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("there", ["", "new/folder"])
def test_a_report_in_a_read_only_folder_names_out_and_shows_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_runs: Path, there: str
) -> None:
    """It said that the same command goes on, which it does not."""
    words = ["report", str(made_runs), *(["--out", str(tmp_path / there)] if there else [])]
    monkeypatch.setattr(files.os, "replace", unwritable)
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 2
    assert re.search(
        r"error: cannot write .*report\.html \(Read-only file system\)\. .*report elsewhere.*--out", done.stderr
    )
    assert not re.search("same command|repeat the command", done.stderr)
    assert "full" in done.stdout
    assert "trim" in done.stdout


def test_a_report_as_json_writes_nothing(made_runs: Path) -> None:
    """Its help says so, but it wrote the report as well."""
    done = CliRunner().invoke(cli.app, ["report", str(made_runs), "--json"])
    assert json.loads(done.stdout)["runs"] == 4
    assert os.listdir(made_runs) == ["runs.jsonl"]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["report", "RUNS", "--out", "elsewhere", "--figures", "drawn"], "--figures FOLDER"),
        (["claims", "RECORDS", "--out", "page.md"], "--out PAGE"),
        (["claims", "RECORDS", "--table", "page.md"], "--table PAGE"),
    ],
)
def test_another_page_that_cannot_be_written_names_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_runs: Path, words: list[str], option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("<!-- results --><!-- /results -->")
    record = tmp_path / "records" / "one"
    shutil.copytree(made_runs, record)
    (record / "claims.toml").write_text(CLAIMS)
    replace = os.replace
    monkeypatch.setattr(
        files.os, "replace", lambda old, new: replace(old, new) if "elsewhere" in str(new) else unwritable()
    )
    places = {"RUNS": str(made_runs), "RECORDS": str(record.parent)}
    done = CliRunner().invoke(cli.app, [places.get(word, word) for word in words])
    assert done.exit_code == 2, done.output
    assert option in done.stderr
    assert not re.search("same command|repeat the command", done.stderr)


@pytest.fixture
def made_runs(tmp_path: Path, make_row: Callable[..., Any]) -> Path:
    """Return a folder of four runs."""
    folder = tmp_path / "made"
    folder.mkdir()
    rows = [make_row(method, seed) for method in ("full", "trim") for seed in range(2)]
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class NearlyFull:
    """A file on a disk with room for some bytes more."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        if len(memoryview(data).cast("B")) > self.room:
            full()
        self.room -= len(memoryview(data).cast("B"))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_disk_that_fills_up_within_a_checkpoint_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save raised a RuntimeError about its own container there, and every run failed by it."""
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: save(state, NearlyFull(file, 3000)))
    with pytest.raises(CannotWrite, match=r"\.pt \(No space left on device\)\. .*Free space there"):
        scheduler.run_all(CONFIGS, scheduler.SharedOptions(tmp_path, checkpoint_seconds=0.0), progress.Quiet())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_runtime_error_that_no_disk_is_to_blame_for_is_passed_on(tmp_path: Path) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        files.write_whole(tmp_path / "a", fails)
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_fits_by_half_says_that_space_is_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write takes what fits, without an error: the cure said to make the folder writable."""
    there, write = Records(tmp_path), os.write
    room = [30]

    def fill(file: int, data: bytes) -> int:
        taken = write(file, data[: room[0]]) if room[0] else full()
        room[0] -= taken
        return taken

    monkeypatch.setattr(records.os, "write", fill)
    with pytest.raises(CannotWrite, match=r"runs\.jsonl \(No space left on device\)\. .*Free space there"):
        there.append({"schema": 1, "key": "a", "config": {"method": "full"}, "status": "finished"})
    assert (tmp_path / "runs.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("code", "cure", "says"),
    [
        (errno.ENOSPC, None, "Free space there and repeat the command."),
        (errno.EDQUOT, None, "Free space there and repeat the command."),
        (errno.EFBIG, None, "Raise the limit on the size of files (ulimit -f) and repeat the command."),
        (errno.EROFS, None, "Make the folder writable, or pass another --out, and repeat the command."),
        (errno.ENOSPC, "Name another page.", "Free space there. Name another page."),
        (errno.EROFS, "Name another page.", "(Read-only file system). Name another page."),
    ],
)
def test_the_cure_fits_the_reason(code: int, cure: str | None, says: str) -> None:
    with pytest.raises(CannotWrite) as told, files.writing(Path("a"), cure):
        raise OSError(code, os.strerror(code))
    assert str(told.value).endswith(says)


def test_events_that_cannot_be_written_do_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard's thread showed a traceback, and every run failed, or the command ended without naming a file."""
    writers = pytest.importorskip("tensorboard.summary.writer.record_writer")
    monkeypatch.setattr(writers.RecordWriter, "write", full)
    with pytest.raises(CannotWrite, match=r"tensorboard/digits_mlp_full.* \(No space left on device\)"):
        scheduler.run_all(CONFIGS, scheduler.SharedOptions(tmp_path, tensorboard=True), progress.Quiet())
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


class Line:
    """The end of a pipe that a worker has: gives it one run, and keeps what it says."""

    def __init__(self) -> None:
        self.runs, self.said = [CONFIGS[0]], []

    def recv(self) -> RunConfig:
        if not self.runs:
            raise EOFError
        return self.runs.pop()

    def send(self, news: Any) -> None:
        self.said.append(pickle.loads(pickle.dumps(news)))


def at_work(shared: scheduler.SharedOptions, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what a worker says, in this process."""
    monkeypatch.setattr(local, "_settle_in", lambda: None)
    line = Line()
    local._work(line, shared)  # type: ignore[arg-type]
    return line.said


def test_a_worker_does_not_recreate_a_removed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It did where the folder went before the worker had begun: the rows came into a folder without the others."""
    ((what, error),) = at_work(scheduler.SharedOptions(tmp_path / "gone"), monkeypatch)
    assert (what, type(error)) == ("unusable", CannotWrite)
    assert "the folder is gone" in str(error)
    assert not (tmp_path / "gone").exists()


def test_records_that_a_worker_cannot_read_are_reported_once_and_end_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died with a traceback, and others were started in its place."""
    Records(tmp_path)
    (tmp_path / "runs.jsonl").mkdir()
    ((what, error),) = at_work(scheduler.SharedOptions(tmp_path), monkeypatch)
    assert (what, type(error)) == ("unusable", IsADirectoryError)
    (tmp_path / "runs.jsonl").rmdir()
    (tmp_path / "runs.jsonl").write_text("no run\n")
    ((what, error),) = at_work(scheduler.SharedOptions(tmp_path), monkeypatch)
    assert (what, type(error)) == ("unusable", records.ReplaceRecords)


def test_a_full_disk_on_a_node_of_a_cluster_does_not_fail_the_run() -> None:
    class TaskError(Exception):
        cause = CannotWrite("cannot write a (No space left on device).")

    def get(_: object) -> None:
        raise TaskError("a traceback of many lines")

    ray = types.SimpleNamespace(get=get, exceptions=types.SimpleNamespace(RayError=TaskError))
    with pytest.raises(CannotWrite, match=r"^cannot write a \(No space left on device\)\.$"):
        on_ray._result(ray, None, CONFIGS[0])
    TaskError.cause = ValueError("of the run")  # type: ignore[assignment]
    assert on_ray._result(ray, None, CONFIGS[0])["status"] == "failed"


def test_a_clock_that_runs_backwards_does_not_change_durations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1.7e9 - 3600 * next(hours))
    scheduler.run_all(CONFIGS, scheduler.SharedOptions(tmp_path, checkpoint_seconds=0.0), progress.Quiet())
    rows = records.read(tmp_path)
    assert len(rows) == len(CONFIGS)
    assert all(0 <= row["seconds"] <= row["seconds_total"] < 100 for row in rows)
