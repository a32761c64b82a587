"""The output folder of a command without --out."""

from __future__ import annotations

import json
from pathlib import Path

from batchtrim.lab.execute.folders import free_folder, named_after
from batchtrim.lab.records import Records
from batchtrim.lab.run.config import RunConfig

OLD, NEW, THIRD = ({"dataset": "digits", "lr": lr, "norm": "batch"} for lr in (0.001, 0.01, 0.1))


def begin(folder: Path, cell: dict[str, object]) -> None:
    records = Records(folder)
    records.settle([cell])
    row = {"schema": 1, "key": "a", "config": {"method": "full", "seed": 0, **cell}, "status": "finished"}
    records.path.write_text(json.dumps(row) + "\n")


def test_an_empty_place_and_the_same_experiment_keep_the_name(tmp_path: Path) -> None:
    base = tmp_path / "digits"
    assert free_folder(base, [OLD]) == (base, "")
    begin(base, OLD)
    assert free_folder(base, [OLD]) == (base, "")


def test_another_experiment_gets_a_folder_that_names_the_difference_and_is_found_again(tmp_path: Path) -> None:
    base = tmp_path / "digits"
    begin(base, OLD)
    folder, said = free_folder(base, [NEW])
    assert folder == tmp_path / "digits-lr0.01"
    assert "lr 0.001" in said
    begin(folder, NEW)
    assert free_folder(base, [NEW])[0] == folder
    assert free_folder(base, [THIRD])[0] == tmp_path / "digits-lr0.1"
    assert not (tmp_path / "digits-lr0.1").exists()  # asking makes nothing


def test_a_long_or_taken_name_gets_a_number(tmp_path: Path) -> None:
    base = tmp_path / "digits"
    begin(base, OLD)
    begin(tmp_path / "digits-lr0.01", THIRD)
    assert free_folder(base, [NEW])[0].name == "digits-lr0.01-2"


def test_the_name_of_a_long_path_fits_into_a_file_system(tmp_path: Path) -> None:
    found = [named_after([RunConfig(dataset=f"/home/{'long/' * 60}{end}")]) for end in ("a", "b")]
    assert found[0] != found[1]
    assert all(len(each.name.encode()) < 200 for each in found)
    assert named_after([RunConfig()]) == Path("runs/digits-mlp-adam-10ep")
