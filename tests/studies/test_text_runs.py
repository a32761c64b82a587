"""The study on TREC's questions, on a few made-up ones: the counts in its rows, and resuming it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

pytest.importorskip("transformers")
import batchtrim
from batchtrim.lab.files import load_toml
from studies import text_runs

RECORD = Path(__file__).parents[2] / "records/2026-11-25-trec-loss-mass"
ROWS, EPOCHS, BATCH = 44, 2, 8
SETTINGS = """
methods = ["full", "trim", "full_equal_compute"]
seeds = 1
epochs = 2
batch_size = 8
lr = 2e-3
layers = 1
size = 8
length = 4
keep_end = 0.5
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that holds ``runs.jsonl`` once ``text_runs.main()`` has run."""
    (tmp_path / "trec").mkdir()
    for split, n in (("train", ROWS), ("test", 12)):
        rows = {"text": [f"word{row % 6} what ?" for row in range(n)], "coarse_label": [row % 6 for row in range(n)]}
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "trec" / f"{split}-0.parquet")
    settings, out = tmp_path / "config.toml", tmp_path / "out"
    settings.write_text(SETTINGS)
    monkeypatch.setattr("sys.argv", ["text_runs", str(settings), "--out", str(out), "--data-dir", str(tmp_path)])
    return out


def read(folder: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    return {row["config"]["method"]: row for row in rows}


def test_a_row_counts_the_samples_that_there_are_and_no_run_is_done_twice(study: Path) -> None:
    text_runs.main()
    rows = read(study)
    last = batchtrim.keep_count(0.5, ROWS % BATCH) + ROWS // BATCH * batchtrim.keep_count(0.5, BATCH)
    counted = {name: (row["samples_forward"], row["samples_backward"]) for name, row in rows.items()}
    assert counted == {
        "full": (ROWS * EPOCHS, ROWS * EPOCHS),  # the last batch of an epoch has 4
        "trim": (ROWS * EPOCHS, ROWS + last),
        "full_equal_compute": (ROWS + last, ROWS + last),
    }
    assert {row["status"] for row in rows.values()} == {"finished"}
    before = (study / "runs.jsonl").read_bytes()
    text_runs.main()
    assert (study / "runs.jsonl").read_bytes() == before


def test_the_study_can_continue_the_record() -> None:
    """The names of the runs, and what trim_full_end keeps."""
    settings = load_toml(RECORD / "config.toml")
    recorded = [json.loads(line) for line in (RECORD / "runs.jsonl").read_text().splitlines()]
    runs = {config.key: config for config in text_runs.configs(settings)}
    assert {row["key"] for row in recorded} <= set(runs)
    (row,) = (row for row in recorded if row["config"]["method"] == "trim_full_end" and row["config"]["seed"] == 0)
    method, kept = text_runs.method_of(runs[row["key"]], 5452, 64), 0
    for _ in range(6):
        keep = method.trim.keep
        kept += 5452 // 64 * batchtrim.keep_count(keep, 64) + batchtrim.keep_count(keep, 5452 % 64)
        method.trim.step()
    assert kept == row["samples_backward"] == 23001


def test_seeds_are_a_number_or_a_list() -> None:
    settings = load_toml(RECORD / "config.toml")
    assert {config.seed for config in text_runs.configs(settings | {"seeds": 2})} == {0, 1}
    assert {config.seed for config in text_runs.configs(settings | {"seeds": [5, 9]})} == {5, 9}
