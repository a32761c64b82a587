"""One place is one experiment, however its path is typed and wherever the command is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import batchtrim


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path / "cache"))


def test_images_are_one_experiment_wherever_they_lie_and_the_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`./mine` and its absolute path had two keys, and --out refused the second."""
    from PIL import Image

    for kind in range(2):
        (tmp_path / "mine" / str(kind)).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (6, 6), 100 * kind + i).save(tmp_path / "mine" / str(kind) / f"{i}.png")
    out = str(tmp_path / "out")
    words = ["--test-split", "0.5", "--seeds", "1", "--epochs", "1", "--workers", "1", "--keep-log", "--out", out]
    first = batchtrim("compare", "--dataset", "./mine", *words)
    assert first.exit_code == 0, first.output
    for dataset in ("mine/", str(tmp_path / "mine")):
        assert "2 of 2 runs are recorded already" in batchtrim("compare", "--dataset", dataset, *words).stderr
    (tmp_path / "else").mkdir()
    (tmp_path / "mine").rename(tmp_path / "else" / "mine")
    assert "or run this in the folder that now holds mine" in batchtrim("show", out).stderr
    monkeypatch.chdir(tmp_path / "else")
    assert batchtrim("show", out).exit_code == 0
    done = batchtrim("compare", "--dataset", "mine", *words)
    assert "2 of 2 runs are recorded already" in done.stderr
    report = Path(out, "report.md").read_text().replace("\\", "")
    assert "batch_size 128 is more than the 6 training images of mine: every epoch is a single step" in report
    assert "epochs 1: a schedule moves between epochs" in report


def test_two_folders_of_one_name_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    from PIL import Image

    for place, first in (("a", 0), ("copy", 0), ("c", 20)):
        for kind in range(2):
            folder = tmp_path / place / "mine" / str(kind)
            folder.mkdir(parents=True)
            for i in range(6):
                Image.new("L", (6, 6), first + 100 * kind + i).save(folder / f"{i}.png")
    words = ["--test-split", "0.5", "--seeds", "1", "--epochs", "2", "--workers", "1", "--methods", "full"]
    done = batchtrim("compare", "--dataset", "a/mine,copy/mine,c/mine", *words, "--out", "out")
    assert done.exit_code == 0, done.output
    assert f"dataset {tmp_path}/copy/mine: left out, since its images are those of another mine" in done.stderr
    assert "2/2 runs" in done.stderr
    for place in "ac":
        assert f"## {tmp_path}/{place}/mine, mlp, adam" in Path("out/report.md").read_text().replace("\\", "")
