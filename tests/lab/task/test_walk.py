"""Folders of images as found on disks: links, hidden folders, pixels of 32 bits. All that is left out is noted."""

from __future__ import annotations

import os
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


def test_a_linked_folder_in_a_class_is_noted(mine: Path, tmp_path: Path) -> None:
    fill(tmp_path / "more", 3, 200)
    (mine / "a" / "more").symlink_to(tmp_path / "more")
    assert "mine: 1 linked folder in a class folder left out: a/more" in read().notes


def test_a_class_folder_may_be_a_link_but_not_to_what_holds_it(mine: Path, tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", 5, 200)
    (mine / "c").symlink_to(tmp_path / "elsewhere")
    assert read().class_names == ("a", "b", "c")
    (mine / "all").symlink_to(".")
    with pytest.raises(ValueError, match="expected class folders in mine, got all, a link to"):
        read()


def test_images_in_hidden_folders_are_not_samples(mine: Path) -> None:
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


def test_links_that_lead_to_themselves_are_broken_images(mine: Path) -> None:
    (mine / "a" / "self.png").symlink_to("self.png")
    (mine / "a" / "one.txt").symlink_to("two.txt")
    (mine / "a" / "two.txt").symlink_to("one.txt")
    (mine / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"got 1 that cannot \(a/self\.png: it cannot be opened \(Too many levels"):
        read()
    found = read(skip_broken=True)
    assert len(found.train_labels) + len(found.test_labels) == 10
    assert any("2 files left out that are not images, such as one.txt" in note for note in found.notes)


def test_names_are_printed_on_one_line_and_as_text(mine: Path) -> None:
    """Notes go into records and pages, which hold UTF-8: after all runs there was no report."""
    (mine / "a" / "two\nlines.png").write_bytes(b"")
    (mine / "a" / os.fsdecode(b"note\xff.txt")).write_text("x")
    (mine / "b" / os.fsdecode(b"link\xff")).symlink_to("/")
    (mine / os.fsdecode(b"empty\xff\n")).mkdir()
    with pytest.raises(OSError, match=r"\(a/two\\nlines\.png: it is empty\)"):
        read()
    notes = read(skip_broken=True).notes
    assert [note for note in notes if "\n" in note or not note.isprintable()] == []
    assert "mine: class folder without images left out: empty\\udcff\\n" in notes
    assert "mine: 1 file left out that is no image: note\\udcff.txt" in notes
    assert "mine: 1 linked folder in a class folder left out: b/link\\udcff" in notes


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing")])
def test_splits_by_other_names_are_not_classes(train: str, test: str, mine: Path) -> None:
    """They were two classes without a word."""
    for side in (train, test):
        for number, name in enumerate("xy"):
            fill(mine.parent / "other" / side / name, 3, 100 * number + len(side) * 10)
    found = load("other", ImageOptions())
    assert found.class_names == ("x", "y")
    assert (len(found.train_labels), len(found.test_labels)) == (6, 6)


def test_a_class_may_be_called_train(mine: Path) -> None:
    (mine / "a").rename(mine / "train")
    assert read().class_names == ("b", "train")
    (mine / "b").rename(mine / "test")  # two splits whose labels are elsewhere
    with pytest.raises(ValueError, match="expected images in class folders"):
        load("mine", ImageOptions())


def test_a_test_folder_without_classes_gives_way_to_val(mine: Path) -> None:
    """As in many competitions, whose test images have no labels."""
    root = mine.parent / "contest"
    for number, name in enumerate("xy"):
        fill(root / "train" / name, 3, 100 * number)
        fill(root / "val" / name, 2, 100 * number + 50)
    fill(root / "test", 4, 80)
    found = load("contest", ImageOptions())
    assert len(found.test_labels) == 4
    assert found.notes == ("contest: 'val' is tested on", "contest: left out: test")


def test_images_under_several_classes_are_counted(mine: Path) -> None:
    root = mine.parent / "twins"
    for number, name in enumerate("xy"):
        fill(root / "train" / name, 4, 100 * number)
        fill(root / "test" / name, 2, 100 * number + 50)
    for i in (0, 1, 1):
        (root / "train" / "y" / f"as{i}.png").write_bytes((root / "train" / "x" / f"{i}.png").read_bytes())
    (root / "train" / "y" / "twice.png").write_bytes((root / "train" / "y" / "0.png").read_bytes())
    (note,) = load("twins", ImageOptions()).notes
    assert note.startswith("twins: 2 training images occur under several classes, pixel by pixel, such as train/x/")
    assert "and train/y/as" in note


def test_a_class_of_broken_images_alone_is_left_out(mine: Path) -> None:
    """It stayed among the classes, without an image to train or test on, and without a word."""
    fill(mine / "c", 3, 200)
    for i, file in enumerate((mine / "a").iterdir()):
        file.write_bytes(b"no image" * i)
    found = read(skip_broken=True)
    assert found.class_names == ("b", "c")
    assert sorted({*found.train_labels.tolist(), *found.test_labels.tolist()}) == [0, 1]
    assert "mine: classes left out, since all their images are broken: a" in found.notes
    for file in (mine / "c").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="two classes in mine, got 1 with images that can be decoded"):
        read(skip_broken=True)


@pytest.mark.parametrize("name", ["lost+found", "@eaDir", "__MACOSX"])
def test_folders_that_systems_create_are_not_classes(name: str, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thumbnails of a network disk were samples; on a disk of its own, nothing could be read but by root."""
    fill(mine / name, 3, 200)
    fill(mine / "a" / name, 3, 220)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "lost+found")
    found = read()
    assert found.class_names == ("a", "b")
    assert len(found.train_labels) + len(found.test_labels) == 10


def test_a_data_folder_that_may_not_be_read_is_named(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in it was named that is not there."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "mine")
    with pytest.raises(PermissionError, match="that can be read, got mine, which this user may not read"):
        read()


def test_images_without_file_endings_are_reported(mine: Path) -> None:
    for number, file in enumerate(mine.rglob("*.png")):
        file.rename(file.with_name(f"image{number}"))
    with pytest.raises(ValueError, match=r"got none\. Files there without the suffix of an image: 10, such as image\d"):
        read()


def _refusal(folder: str) -> str:
    with pytest.raises(ValueError, match="save_to_disk") as error:
        load(folder, ImageOptions(test_split=0.2))
    return str(error.value)


def test_a_data_set_that_was_saved_to_disk_names_the_cure(mine: Path, tmp_path: Path) -> None:
    """It was called a folder without class folders."""
    for folder, files in {"one": ["state.json", "dataset_info.json"], "all": ["dataset_dict.json"]}.items():
        (tmp_path / folder / "train").mkdir(parents=True)
        for name in files:
            (tmp_path / folder / name).write_text("{}")
    assert "datasets.load_from_disk('one').to_parquet('DIR/train-0.parquet'). Then" in _refusal("one")
    assert "datasets.load_from_disk('all')['train'].to_parquet('DIR/train-0.parquet'), and each" in _refusal("all")
