"""Tables of images as other programs write them, and names that look alike."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from batchtrim.lab.task import images
from batchtrim.lab.task.data import ImageData
from batchtrim.lab.task.images import ImageOptions

HALF = ImageOptions(test_split=0.5)


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def pixels(value: int) -> bytes:
    held = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(held, "PNG")
    return held.getvalue()


def csv(
    folder: Path, labels: list[str], head: str = "image,label", encoding: str = "utf-8", name: str = "a.csv"
) -> Any:
    delimiter = next(each for each in ",;\t" if each in head)
    rows = [head]
    for row, label in enumerate(labels):
        (folder / f"{row}.png").write_bytes(pixels(20 * row))
        rows.append(f"{row}.png{delimiter}{label}")
    (folder / name).write_text("\n".join(rows) + "\n", encoding=encoding)
    return folder / name


def parquet(folder: Path, columns: dict[str, list[Any]], name: str = "a.parquet") -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)
    return folder / name


def load(path: Path, options: ImageOptions = HALF) -> ImageData:
    return images.load(str(path), options)


def refusal(path: Path, options: ImageOptions = HALF) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load(path, options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["007", "008"], ("007", "008")),  # were 7 and 8
        (["01", "1"], ("01", "1")),  # were one class
        (["10", "9"], ("9", "10")),
        (["true", "false"], ("false", "true")),
        (["2020-01-01", "2020-01-02"], ("2020-01-01", "2020-01-02")),  # were refused
        (["1", "99999999999999999999"], ("1", "99999999999999999999")),  # was 1e+20
        (["NA", "DE"], ("DE", "NA")),
        (["1_0", "2"], ("1_0", "2")),
    ],
)
def test_classes_are_named_as_they_are_written(labels: list[str], names: tuple[str, ...], mine: Path) -> None:
    assert load(csv(mine, labels * 2)).class_names == names


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["1", "nan"], "expected a label in every row"),
        (["1", "NA"], "expected a label in every row"),
        (["a", " "], "expected a label in every row"),
        (["1", "0.5"], "expected classes in column 'label'"),
        (["1", "1e400"], "expected classes in column 'label'"),
    ],
)
def test_invalid_labels(labels: list[str], says: str, mine: Path) -> None:
    assert says in refusal(csv(mine, labels * 2))


@pytest.mark.parametrize(
    ("head", "encoding", "name"),
    [
        ("image;label", "utf-8", "a.csv"),
        ("image\tlabel", "utf-8", "a.csv"),
        ("image , label", "utf-8-sig", "a.CSV"),
        ("\n\nimage,label", "utf-8-sig", "a.csv"),  # had no column
        ('"image", "label"', "utf-8", "a.csv"),
    ],
)
def test_tables_of_other_programs(head: str, encoding: str, name: str, mine: Path) -> None:
    assert load(csv(mine, ["a", "b"] * 2, head, encoding, name)).class_names == ("a", "b")


@pytest.mark.parametrize("missing", ["", " "])
def test_a_row_in_no_group_is_refused(missing: str, mine: Path) -> None:
    """Images of unknown patients made one group, apart from those of the patients that they may be of."""
    path = csv(mine, ["x,1", "y,1", "x,2", f"y,{missing}"], head="image,label,patient")
    said = refusal(path, ImageOptions(test_split=0.5, group="patient"))
    assert said == f"expected a group in every row of {path}, got none in row 3 of column 'patient' (1 such row)."
    table = {
        "image": [pixels(each) for each in range(4)],
        "label": [0, 1, 0, 1],
        "patient": [1.0, 1.0, None, float("nan")],
    }
    said = refusal(parquet(mine, table), ImageOptions(test_split=0.5, group="patient"))
    assert "got none in row 2 of column 'patient' (2 such rows)" in said


def test_splits_have_the_names_that_folders_may_have(mine: Path) -> None:
    path = csv(mine, ["x,Train", "y,training", "x,TEST", "y,test"], head="image,label,split")
    found = load(path, ImageOptions())
    assert (len(found.train_labels), len(found.test_labels), found.notes) == (2, 2, ())
    (note,) = load(csv(mine, ["x,train", "y,train", "x,Val", "y,Val"], head="image,label,split"), ImageOptions()).notes
    assert note == "a.csv: 'Val' is tested on"
    assert "has a test split" in refusal(csv(mine, ["x,train", "y,train", "x,test"], head="image,label,Split"))
    path = csv(mine, ["x,train", "y,dev"], head="image,label,split")
    assert "expected train or test in column 'split'" in refusal(path, ImageOptions())


def test_a_table_without_a_line_of_names_and_an_empty_cell_are_named(mine: Path) -> None:
    path = csv(mine, ["x", "y"], head="7.png,x")
    assert "Is the first line one of names?" in refusal(path)
    said = refusal(csv(mine, ["x", "y"], head="sentence,label"))
    assert said.endswith(
        "got sentence, label. Name it with --image-column NAME. For texts or numbers write a training "
        "function: batchtrim compare --task."
    )
    assert "--task" not in refusal(csv(mine, ["x", "y"], head="image,kind"))
    path.write_text("image,label\n0.png,x\n1.png,y\n0.png,y\n,x\n")
    assert "a.csv row 3: nothing is in its cell" in refusal(path)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_tables_in_another_encoding(encoding: str, mine: Path) -> None:
    assert "to be text in UTF-8, got other bytes" in refusal(csv(mine, ["ä", "b"] * 2, encoding=encoding))


def test_a_name_of_two_lines(mine: Path) -> None:
    """The rows had "another number of columns"."""
    assert load(csv(mine, ["a,", "b,"] * 2, 'image,label,"seen\nby"')).class_names == ("a", "b")


def test_two_columns_of_one_name(mine: Path) -> None:
    """A traceback for the label and the split, the first of both for images of Parquet files."""
    assert "Give them different names" in refusal(csv(mine, ["a,b", "b,a"] * 2, "image,label,label"))
    assert "one split column" in refusal(csv(mine, ["a,train,test", "b,test,test"], "image,label,split,split"))
    held = pyarrow.array([pixels(1), pixels(2)] * 2)
    table = pyarrow.table([held, held, pyarrow.array(["a", "b"] * 2)], names=["image", "image", "label"])
    pyarrow.parquet.write_table(table, mine / "b.parquet")
    assert "expected one image column 'image'" in refusal(mine / "b.parquet")


def test_parquet_in_capitals(mine: Path) -> None:
    """Every image was called empty."""
    held = {"image": [pixels(10 * row) for row in range(4)], "label": ["a", "b"] * 2}
    assert load(parquet(mine, held, "A.PARQUET")).class_names == ("a", "b")


@pytest.mark.parametrize("cell", [1, [[1, 2], [3, 4]], "https://example.org/a.png"])
def test_cells_that_are_not_images(cell: Any, mine: Path) -> None:
    """They read "there is no such file"."""
    told = refusal(parquet(mine, {"image": [cell] * 4, "label": ["a", "b"] * 2}))
    assert "expected image files or their bytes" in told


def tree(folder: Path, *classes: str) -> Path:
    for number, name in enumerate(classes):
        (folder / name).mkdir()
        for row in range(4):
            (folder / name / f"{row}.png").write_bytes(pixels(40 * number + row))
    return folder


@pytest.mark.parametrize("alike", [("Cat", "cat"), ("cat", "cat "), ("e\u0301", "\u00e9"), ("1", "01")])
def test_classes_whose_names_look_alike_are_noted(alike: tuple[str, str], mine: Path) -> None:
    try:
        notes = load(tree(mine, *alike, "dog")).notes
    except FileExistsError:
        pytest.skip("names that this file system does not tell apart")
    assert [note for note in notes if "are 2 classes, though their names differ" in note]
    assert not [note for note in notes if "dog" in note]


def test_numbers_of_many_digits_and_names_with_a_line_do_not_look_alike(mine: Path) -> None:
    found = load(tree(mine, "12345678901234567890", "12345678901234567891", "1_0", "10", "snan"))
    assert "differ" not in str(found.notes)


def test_images_in_no_class_are_noted(mine: Path) -> None:
    tree(mine, "a", "b")
    (mine / "loose.PNG").write_bytes(pixels(9))
    assert [note for note in load(mine).notes if "1 image in no class folder left out: loose.PNG" in note]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.timeout(20)
def test_a_file_that_is_not_regular_is_a_broken_image(mine: Path) -> None:
    """A pipe was waited for without end; a link to itself was called empty."""
    tree(mine, "a", "b")
    os.mkfifo(mine / "a" / "pipe.png")
    (mine / "a" / "self.png").symlink_to("self.png")
    told = refusal(mine)
    assert "a/pipe.png: it is no regular file" in told
    assert "a/self.png: it cannot be opened" in told
    assert "2 broken images left out" in str(load(mine, ImageOptions(test_split=0.5, skip_broken=True)).notes)


def test_a_folder_that_cannot_be_read_is_refused(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was left out without a word."""
    tree(mine, "a", "b")
    (mine / "a" / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # root may read everything
    assert "which this user may not read" in refusal(mine)


def test_a_parquet_file_that_is_damaged_inside_is_named(mine: Path) -> None:
    """The cache folder was blamed."""
    file = parquet(mine, {"image": [pixels(10 * row) for row in range(4)], "label": ["a", "b"] * 2})
    held = bytearray(file.read_bytes())
    at = held.index(pixels(0)[:8]) if pixels(0)[:8] in held else 60
    held[4 : at + 60] = b"\xff" * (at + 56)
    file.write_bytes(held)
    assert f"expected {file} to be a table that can be read" in refusal(file)
