"""runs.jsonl: lines are whole whichever process dies, and no run is done twice by processes on one folder."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchtrim.lab import records
from batchtrim.lab.records import Records, UseAnotherFolder

Row = dict[str, Any]


def row(key: str, **changes: Any) -> Row:
    return {"schema": 1, "key": key, "config": {"method": "full"}, "status": "finished", **changes}


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    kept = Records(tmp_path / "new" / "folder")
    for key in "abc":
        kept.append(row(key))
    assert [each["key"] for each in kept.rows()] == ["a", "b", "c"]
    assert records.read(tmp_path / "new" / "folder") == kept.rows()
    assert records.read(kept.path) == kept.rows()


def test_curves_are_kept_to_six_figures_and_results_in_full(tmp_path: Path) -> None:
    kept = Records(tmp_path)
    kept.append(row("a", test_error=0.123456789, curve={"epoch": [0, 1], "test_error": [0.987654321, 0.123456789]}))
    (back,) = kept.rows()
    assert back["test_error"] == 0.123456789
    assert back["curve"] == {"epoch": [0, 1], "test_error": [0.987654, 0.123457]}


def test_another_process_s_rows_are_seen(tmp_path: Path) -> None:
    first, second = Records(tmp_path), Records(tmp_path)
    first.append(row("a"))
    assert second.is_done("a")
    second.append(row("b"))
    assert first.is_done("b")


def test_the_last_row_of_a_key_counts_and_failed_runs_are_not_done(tmp_path: Path) -> None:
    kept = Records(tmp_path)
    kept.append(row("a", status="failed"))
    assert not kept.is_done("a")
    kept.append(row("a", status="diverged"))
    assert kept.is_done("a")
    assert [each["status"] for each in kept.rows()] == ["diverged"]
    assert [each["status"] for each in records.read(tmp_path)] == ["diverged"]


def test_a_partial_line_is_not_a_run_and_is_cut_off(tmp_path: Path) -> None:
    kept = Records(tmp_path)
    kept.append(row("a"))
    with kept.path.open("a") as file:
        file.write('{"schema": 1, "key": "b", "conf')
    fresh = Records(tmp_path)
    assert [each["key"] for each in fresh.rows()] == ["a"]
    assert [each["key"] for each in records.read(tmp_path)] == ["a"]
    fresh.append(row("c"))
    assert [json.loads(line)["key"] for line in kept.path.read_text().splitlines()] == ["a", "c"]
    assert [each["key"] for each in kept.rows()] == ["a", "c"]


def test_a_file_with_only_a_partial_line_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pread", raising=False)  # Windows has none
    kept = Records(tmp_path)
    kept.path.write_bytes(b"x" * 200_000)
    kept.append(row("a"))
    assert [each["key"] for each in records.read(tmp_path)] == ["a"]


def test_a_full_disk_leaves_nothing_of_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Records(tmp_path)
    kept.append(row("a"))
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]))
    with pytest.raises(OSError, match="Is the disk full"):
        kept.append(row("b"))

    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", no_space)
    with pytest.raises(OSError, match="No space"):
        kept.append(row("b"))
    monkeypatch.undo()
    assert [json.loads(line)["key"] for line in kept.path.read_text().splitlines()] == ["a"]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    kept = Records(tmp_path)
    kept.append(row("a", test_error=float("nan"), curve={"mean_loss": [1.0, float("inf")]}))
    (back,) = kept.rows()
    assert back["test_error"] is None
    assert back["curve"]["mean_loss"] == [1.0, None]


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"key": "a"}', '{"schema": 1}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "runs.jsonl").write_text(line + "\n")
    with pytest.raises(records.ReplaceRecords, match="expected a run on each line of"):
        records.read(tmp_path)


@pytest.mark.parametrize("notes", ["one", [1], {"a": "b"}])
def test_notes_that_are_no_list_of_texts_are_refused(tmp_path: Path, notes: object) -> None:
    """A text was printed letter by letter."""
    config = {"method": "full", "seed": 0}
    (tmp_path / "runs.jsonl").write_text(json.dumps(row("a", config=config, status="failed", notes=notes)) + "\n")
    with pytest.raises(records.ReplaceRecords, match=r"with `notes` a list of texts, got .* line 1\."):
        records.read_results(tmp_path)


def test_rows_of_another_release_are_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text(json.dumps(row("a", schema=99)) + "\n")
    with pytest.raises(records.ReplaceRecords, match=r"schema 1 in .*, got 99"):
        records.read(tmp_path)


def test_a_folder_without_runs_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="got nothing there"):
        records.read(tmp_path)


def test_a_file_in_the_way_is_reported(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match=r"Pass another --out|a file is in the way"):
        Records(tmp_path / "out")


def test_a_missing_permission_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root the file system would not refuse
    with pytest.raises(PermissionError, match=r"a folder that can be written, got .*Pass another --out"):
        Records(tmp_path)


def test_a_claim_is_held_once_and_freed(tmp_path: Path) -> None:
    first, second = Records(tmp_path), Records(tmp_path)
    with first.claim("a") as mine, second.claim("a") as theirs, second.claim("b") as other:
        assert (mine, theirs, other) == (True, False, True)
    with second.claim("a") as mine:
        assert mine
        second.append(row("a"))
    with first.claim("a") as mine:
        assert not mine  # done


def test_another_experiment_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    kept = Records(tmp_path)
    kept.settle([{"dataset": "digits", "epochs": 99}])  # nothing came of it
    kept.settle([{"dataset": "digits", "epochs": 10}])
    with kept.claim("a"), pytest.raises(UseAnotherFolder):
        Records(tmp_path).settle([{"dataset": "digits", "epochs": 20}])
    kept.append(row("a"))
    kept.settle([{"dataset": "digits", "epochs": 10}])
    with pytest.raises(UseAnotherFolder, match=r"got another: epochs 10 there and 20 here\. Pass another --out"):
        kept.settle([{"dataset": "digits", "epochs": 20}])
    kept.settle([{"dataset": "digits", "epochs": 10}, {"dataset": "cifar10", "epochs": 10}])  # a larger grid
    kept.settle([{"dataset": "cifar10", "epochs": 10}])  # a part of it
    with pytest.raises(UseAnotherFolder, match="dataset"):
        kept.settle([{"dataset": "digits", "epochs": 10}, {"dataset": "svhn", "epochs": 10}])


def test_changed_images_are_called_changed_images(tmp_path: Path) -> None:
    """It advised to pass the old settings, which were the same."""
    kept = Records(tmp_path)
    kept.append(row("a"))
    kept.settle([{"dataset": "mine", "data_version": "aa"}])
    with pytest.raises(UseAnotherFolder, match=r"Images, labels or the split have changed since\. Pass another --out"):
        kept.settle([{"dataset": "mine", "data_version": "bb"}])


# --- several processes, and sudden deaths -------------------------------------------------------------------------

BULK = "x" * 20_000  # a line longer than a page, as rows with long curves are


def _append_many(folder: Path, name: str, count: int) -> None:
    kept = Records(folder)
    for number in range(count):
        kept.append(row(f"{name}{number}", bulk=BULK))


def _claim_many(folder: Path, keys: list[str], pause: float) -> None:
    """Like a sweep: claim, work, record."""
    kept = Records(folder)
    for key in keys:
        with kept.claim(key) as mine:
            if mine:
                time.sleep(pause)
                kept.append(row(key, by=os.getpid(), bulk=BULK))


def _start(target: Callable[..., None], *args: object) -> Any:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    process = context.Process(target=target, args=args)
    process.start()
    return process


def lines(folder: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_two_processes_lose_and_mix_nothing(tmp_path: Path) -> None:
    processes = [_start(_append_many, tmp_path, name, 40) for name in "ab"]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(lines(tmp_path)) == sorted(f"{name}{number}" for name in "ab" for number in range(40))


def test_two_processes_do_each_run_once(tmp_path: Path) -> None:
    keys = [f"k{number}" for number in range(60)]
    processes = [_start(_claim_many, tmp_path, order, 0.002) for order in (keys, keys[::-1])]
    for process in processes:
        process.join()
    assert sorted(lines(tmp_path)) == sorted(keys)
    assert len({each["by"] for each in records.read(tmp_path)}) == 2


def kill_at_random(folder: Path, kills: int, seed: int) -> None:
    """Kill a recording process at random moments; each one must find whole lines, and none that was there may go."""
    draw = random.Random(seed)
    keys = [f"k{number}" for number in range(40 * kills)]
    before: list[str] = []
    for _ in range(kills):
        process = _start(_claim_many, folder, keys, 0.001)
        time.sleep(draw.uniform(0.02, 0.08))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        path = folder / "runs.jsonl"
        now = [each["key"] for each in records.read(folder)] if path.exists() else []
        assert now[: len(before)] == before
        before = now
    assert before
    rest = keys[: len(before) + 5]
    _claim_many(folder, rest, 0.0)
    assert sorted(lines(folder)) == sorted(rest)  # every run there, and there once


def test_kill_9_loses_no_finished_run(tmp_path: Path) -> None:
    kill_at_random(tmp_path, kills=6, seed=1)


@pytest.mark.slow
def test_kill_9_at_fifty_moments_loses_no_finished_run(tmp_path: Path) -> None:
    kill_at_random(tmp_path, kills=50, seed=2)


def test_a_run_that_is_done_stays_so_where_a_failed_one_is_appended(tmp_path: Path) -> None:
    """Files of two machines, joined by hand: the failed run hid the finished one."""
    kept = Records(tmp_path)
    for status in ("failed", "finished", "failed"):
        kept.append(row("a", status=status))
    kept.append(row("b", status="failed"))
    for read in (kept.rows(), Records(tmp_path).rows(), records.read(tmp_path)):
        assert [(each["key"], each["status"]) for each in read] == [("a", "finished"), ("b", "failed")]
    assert kept.is_done("a")
    assert not kept.is_done("b")


def test_blank_lines_between_runs_are_passed_over(tmp_path: Path) -> None:
    kept = Records(tmp_path)
    kept.append(row("a"))
    with kept.path.open("ab") as file:
        file.write(b"\n \r\n")
    kept.append(row("b"))
    assert [each["key"] for each in kept.rows()] == [each["key"] for each in records.read(tmp_path)] == ["a", "b"]
    with kept.path.open("ab") as file:
        file.write(b"no run\n")
    with pytest.raises(records.ReplaceRecords, match="line 5"):
        records.read(tmp_path)
