"""Folders of images as they lie on disks: links, hidden folders, pixels of 32 bits. All that is left out is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchtrim.lab.task.data import ImageData
from batchtrim.lab.task.images import ImageOptions, load


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("ab"):
        fill(tmp_path / "mine" / name, 5, 100 * number)
    return tmp_path / "mine"


def fill(folder: Path, count: int, first: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (first + i, 50, 60)).save(folder / f"{i}.png")


def read(**options: bool) -> ImageData:
    return load("mine", ImageOptions(test_split=0.4, **options))


def test_a_link_that_leads_nowhere_is_a_broken_image(mine: Path) -> None:
    """It was left out without a word, as a data set whose files were moved away would be."""
    (mine / "a" / "gone.png").symlink_to(mine / "moved.png")
    with pytest.raises(OSError, match=r"got 1 that cannot \(a/gone\.png: there is no such file\)"):
        read()
    found = read(skip_broken=True)
    assert len(found.train_labels) + len(found.test_labels) == 10
    assert any("1 broken image left out (a/gone.png: there is no such file)" in note for note in found.notes)


def test_a_linked_folder_in_a_class_is_said(mine: Path, tmp_path: Path) -> None:
    fill(tmp_path / "more", 3, 200)
    (mine / "a" / "more").symlink_to(tmp_path / "more")
    assert "mine: 1 linked folders in class folders left out, such as a/more" in read().notes


def test_a_class_folder_may_be_a_link_but_not_to_what_holds_it(mine: Path, tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", 5, 200)
    (mine / "c").symlink_to(tmp_path / "elsewhere")
    assert read().class_names == ("a", "b", "c")
    (mine / "all").symlink_to(".")
    with pytest.raises(ValueError, match="expected class folders in mine, got all, a link to"):
        read()


def test_images_in_hidden_folders_are_no_samples(mine: Path) -> None:
    """Notebooks keep copies of the images one looked at there."""
    fill(mine / "a" / ".ipynb_checkpoints", 4, 200)
    found = read()
    assert len(found.train_labels) + len(found.test_labels) == 10


@pytest.mark.parametrize(("largest", "broken"), [(200, True), (60_000, False)])
def test_pixels_of_32_bits(largest: int, broken: bool, mine: Path) -> None:
    """The upper 8 of 16 bits were kept of values that fit into 8: a black image."""
    Image.fromarray(np.full((8, 8), largest, dtype=np.int32)).save(mine / "a" / "wide.tif")
    if broken:
        with pytest.raises(OSError, match="its pixels of 32 bits go up to 200, of unknown range"):
            read()
    else:
        assert any(int(each[0, 0, 0]) == 60_000 >> 8 for each in [*read().train_images, *read().test_images])
