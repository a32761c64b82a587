"""Notes on the user's own images: bits that are lost, folders within folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchtrim.lab.task.data import ImageData
from batchtrim.lab.task.images import ImageOptions, load


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def draw(folder: Path, brightest: int, kind: type[np.unsignedinteger] = np.uint16) -> None:
    random = np.random.default_rng(brightest)
    for name in "ab":
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            values = random.integers(0, brightest, (6, 6), dtype=kind, endpoint=True)
            values[0, 0] = brightest
            Image.fromarray(values).save(folder / name / f"{brightest}-{i}.png")


def mine() -> ImageData:
    return load("mine", ImageOptions(test_split=0.5))


def test_bits_that_are_dropped_are_noted() -> None:
    """Images of 12 bits became nearly black without a word."""
    draw(Path("mine"), 4095)
    said = "6 images of 16 bits a pixel lost the lower 8, and their brightest pixel is then 15 of 255: scale them"
    assert any(said in note for note in mine().notes)
    draw(Path("mine"), 65535)
    assert any(note.endswith("12 images of 16 bits a pixel lost the lower 8") for note in mine().notes)


def test_bits_that_are_not_dropped_are_not_noted() -> None:
    draw(Path("mine"), 20, np.uint8)
    assert not any("bits" in note for note in mine().notes)


def test_class_folders_in_a_folder_are_named() -> None:
    """An archive often unpacks as photos/photos/CLASS; one class `photos` was all that the message said."""
    draw(Path("mine", "photos", "of", "2024"), 20, np.uint8)
    with pytest.raises(ValueError, match=r"got 1: photos\. If the classes .* pass --dataset mine/photos/of/2024$"):
        mine()
    for each in Path("mine", "photos", "of", "2024", "b").iterdir():
        each.unlink()
    with pytest.raises(ValueError, match=r"got 1: photos\.$"):
        mine()
