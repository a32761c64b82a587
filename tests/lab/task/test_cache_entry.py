"""Damaged entries of the cache are refused by name: none gives other images, or a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchtrim.lab.task.data import ReplaceFile
from batchtrim.lab.task.images import ImageOptions, load

N = 12


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The entry of N images in ``mine``."""
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for i in range(N):
        file = tmp_path / "mine" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(1, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    read()
    (found,) = (tmp_path / "cache" / "images").iterdir()
    return found


def read() -> int:
    found = load("mine", ImageOptions(test_split=0.25))
    return len(found.train_labels) + len(found.test_labels)


FILES = ("about.json", "pixels.npy", "kept.npy", "hashes.npy")


@pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_short(name: str, part: float, folder: Path) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ReplaceFile, match="got a damaged cache"):
        read()


def without(name: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.write_text(json.dumps({key: each for key, each in json.loads(file.read_text()).items() if key != name}))

    return change


def as_array(array: np.ndarray) -> Callable[[Path], None]:
    return lambda file: np.save(file, array)


def zeroed(file: Path) -> None:
    array = np.load(file)
    array[N // 2] = 0
    np.save(file, array)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("about.json", without("std")),
        ("about.json", without("notes")),
        ("about.json", lambda file: file.write_text("[]")),
        ("about.json", lambda file: file.write_text('{"mean": 1, "std": 2, "notes": []}')),
        ("pixels.npy", as_array(np.zeros((3, 3, 8, 8), np.uint8))),
        ("pixels.npy", as_array(np.zeros((N, 3, 8, 8), np.float32))),
        ("pixels.npy", as_array(np.zeros((N, 64), np.uint8))),
        ("pixels.npy", as_array(np.zeros((N, 1, 8, 8), np.uint8))),
        ("pixels.npy", zeroed),
        ("kept.npy", as_array(np.ones(5, bool))),
        ("kept.npy", as_array(np.ones(N, np.int64))),
        ("hashes.npy", as_array(np.ones(5, np.uint64))),
    ],
)
def test_files_of_other_images(name: str, change: Callable[[Path], None], folder: Path) -> None:
    """As of another release, or after a power failure, when files hold zeros: they were trained on."""
    change(folder / name)
    with pytest.raises(ReplaceFile, match=r"got a damaged cache .* Remove that folder and try again"):
        read()


def test_a_folder_without_files_is_filled(folder: Path) -> None:
    for each in folder.iterdir():
        each.unlink()
    assert read() == N
