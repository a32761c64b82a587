"""Files that change: images are decoded again, and those on a disk that was removed are not called broken."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from batchtrim.lab.task import decode
from batchtrim.lab.task.images import ImageOptions, load
from batchtrim.lab.task.stamps import stamps

SKIP = ImageOptions(test_split=0.25, skip_broken=True)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        draw(tmp_path / "mine" / "ab"[i % 2] / f"{i}.png", i)
    return tmp_path / "mine"


def draw(file: Path, value: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)


def csv(folder: Path) -> Path:
    rows = "".join(f"{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]}\n" for i in range(8))
    (folder / "t.csv").write_text("image,label\n" + rows)
    return folder / "t.csv"


def parquet(folder: Path, hub: bool, some_bytes: bool = False) -> Path:
    cells: list[Any] = [f"{'ab'[i % 2]}/{i}.png" for i in range(8)]
    if hub:
        cells = [{"bytes": None, "path": each} for each in cells]
        for cell in cells[:4] if some_bytes else ():
            cell["bytes"] = (folder / cell["path"]).read_bytes()
    table = pyarrow.table({"image": cells, "label": list("abababab")})
    pyarrow.parquet.write_table(table, folder / "t.parquet", row_group_size=2)
    return folder / "t.parquet"


SOURCES: dict[str, Callable[[Path], Path]] = {
    "folder": lambda mine: mine,
    "csv": csv,
    "parquet": lambda mine: parquet(mine, hub=False),
    "hub": lambda mine: parquet(mine, hub=True),
    "mixed": lambda mine: parquet(mine, hub=True, some_bytes=True),
}


@pytest.mark.parametrize("source", SOURCES)
def test_an_image_that_changes_is_decoded_again(source: str, mine: Path) -> None:
    """Where a table named the image, the old pixels were taken for it without a word."""
    data = str(SOURCES[source](mine))
    first = load(data, SKIP)
    assert load(data, SKIP).version == first.version
    draw(mine / "b" / "7.png", 100)
    assert load(data, SKIP).version != first.version


@pytest.mark.parametrize("source", ["csv", "parquet", "hub", "mixed"])
def test_an_image_that_reappears_is_included(source: str, mine: Path) -> None:
    """It stayed left out, as a broken one."""
    data = str(SOURCES[source](mine))
    (mine / "b" / "7.png").rename(mine / "away")
    assert any("1 broken image left out" in note for note in load(data, SKIP).notes)
    (mine / "away").rename(mine / "b" / "7.png")
    found = load(data, SKIP)
    assert len(found.train_labels) + len(found.test_labels) == 8


def test_images_in_a_parquet_file_are_not_read_for_their_paths(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [{"bytes": (mine / "ab"[i % 2] / f"{i}.png").read_bytes(), "path": f"{i}.png"} for i in range(8)]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": list("abababab")}), mine / "t.parquet")
    first = load(str(mine / "t.parquet"), SKIP)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("read again"))
    assert load(str(mine / "t.parquet"), SKIP).version == first.version


def test_an_image_that_becomes_readable_is_included(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """chmod changes neither size nor time."""
    access = os.access
    locked = mine / "b" / "7.png"
    before = stamps([("7", locked)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != locked and access(path, mode))
        assert stamps([("7", locked)]) != before
    assert stamps([("7", locked)]) == before


def moved(mine: Path) -> None:
    mine.rename(mine.with_name("elsewhere"))


def emptied(mine: Path) -> None:
    (mine / "b" / "7.png").write_bytes(b"")


def removed(mine: Path) -> None:
    shutil.rmtree(mine / "b")


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("happens", "named"), [(moved, "a/0.png"), (emptied, "b/7.png"), (removed, "b/1.png")])
def test_a_folder_that_goes_away_while_it_is_decoded(
    happens: Callable[[Path], None], named: str, skip: bool, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With skip_broken, the images that were left were kept in the cache as if there were no others."""
    whole = load("mine", SKIP, cache_dir=mine.parent / "other").version
    opened, seen = decode._open, []

    def watched(source: decode.Source) -> Any:
        seen.append(source)
        if len(seen) == 2:  # one to tell the form, and one of all
            happens(mine)
        return opened(source)

    monkeypatch.setattr(decode, "_open", watched)
    monkeypatch.setattr(decode, "_cores", lambda: 1)
    with pytest.raises(OSError, match=f"expected mine to stay as it is .* that vanished or changed, such as {named}"):
        load("mine", ImageOptions(test_split=0.25, skip_broken=skip))
    monkeypatch.setattr(decode, "_open", opened)
    if happens is moved:
        mine.with_name("elsewhere").rename(mine)
        assert load("mine", SKIP).version == whole


def test_a_file_that_is_gone_when_its_fault_is_worded_is_broken(mine: Path) -> None:
    """The cache folder was blamed."""
    assert decode._reason(SyntaxError("no chunk"), mine / "gone.png") == "it cannot be decoded (no chunk)"
