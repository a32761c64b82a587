"""One pass over the files: each is read once, and an image unlike the first begins another pass."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from batchtrim.lab.task import decode, images
from batchtrim.lab.task.images import ImageOptions, load


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path / "cache"))
    for side, name in itertools.product(("train", "test"), "ab"):
        (tmp_path / "mine" / side / name).mkdir(parents=True)
    return tmp_path / "mine"


def drawn(value: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_every_file_is_read_once(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was read three times: for its header, for the orientation of a PNG, and for its pixels."""
    for value, folder in enumerate(sorted(mine.glob("*/*"))):
        for i, kind in enumerate(("png", "jpg", "webp")):
            drawn(10 * value + i, (30 + i, 20)).save(folder / f"{i}.{kind}")
    reads: Counter[Any] = Counter()
    read = decode._read

    def counted(path: Path) -> bytes | Path:
        reads[path] += 1
        return read(path)

    monkeypatch.setattr(decode, "_read", counted)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read apart"))
    load(str(mine), ImageOptions(image_size=8))
    first, *others = reads.values()
    assert first == 2  # it tells the form of all
    assert set(others) == {1}
    assert len(reads) == 12


KINDS = {"grey": ((12, 10), "L"), "colour": ((12, 10), "RGB"), "other": ((9, 14), "L"), "large": ((200, 150), "L")}


@pytest.mark.parametrize("kinds", [*itertools.permutations(KINDS, 2), ("grey", "colour", "large", "other")])
def test_the_form_is_that_of_all_images_in_any_order(kinds: tuple[str, ...], mine: Path) -> None:
    """Every image as Pillow brings it to the one size and number of channels that all headers ask for."""
    for place, kind in enumerate(kinds):
        size, mode = KINDS[kind]
        drawn(place, size, mode).save(mine / "train" / "a" / f"{place}.png")
    drawn(50, KINDS[kinds[0]][0], KINDS[kinds[0]][1]).save(mine / "train" / "b" / "0.png")
    drawn(51, KINDS[kinds[0]][0], KINDS[kinds[0]][1]).save(mine / "test" / "b" / "0.png")
    found = load(str(mine), ImageOptions())
    one_size = {KINDS[kind][0] for kind in kinds} == {(12, 10)}
    size, mode = (12, 10) if one_size else (64, 64), "RGB" if "colour" in kinds else "L"
    assert found.shape == (len(mode), size[1], size[0])
    form = decode.ImageForm(size, mode == "L", uniform=False)
    for place, kind in enumerate(kinds):
        source = mine / "train" / "a" / f"{place}.png"
        image, header, turned = decode._open(source)
        assert (header.width, header.height) == KINDS[kind][0]
        assert np.array_equal(found.train_images[place], decode._pixels(image, source, turned, form))


def test_a_late_image_of_another_kind_begins_another_pass(mine: Path) -> None:
    """Three passes at most: all grey and of one size, then of colours, then of several sizes."""
    for value in range(300):
        mode, size = ("RGB" if value == 250 else "L"), ((9, 9) if value == 299 else (12, 10))
        drawn(value, size, mode).save(mine / "train" / "ab"[value % 2] / f"{value:03}.png")
    drawn(1000, (12, 10)).save(mine / "test" / "a" / "0.png")
    found = load(str(mine), ImageOptions())
    assert found.shape == (3, 64, 64)
    assert found.train_images.flatten(1).float().std(1).min() > 0  # none stayed black
    pixels = found.train_images.double()
    assert found.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert any("images of 9 x 9 to 12 x 10 pixels resized to 64 x 64" in note for note in found.notes)


def test_chunks_of_large_images_stay_small(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of few bytes gives what one of many gives; a broken image leaves a gap among the places."""
    for value, folder in enumerate(sorted(mine.glob("*/*"))):
        for i in range(7):
            drawn(10 * value + i, (20, 20)).save(folder / f"{i}.png")
    (mine / "train" / "a" / "3.png").write_bytes(b"no image")
    options = ImageOptions(skip_broken=True)
    whole = load(str(mine), options, cache_dir=mine.parent / "one")
    monkeypatch.setattr(decode, "CHUNK_BYTES", 2 * 3 * 20 * 20)
    small = load(str(mine), options, cache_dir=mine.parent / "two")
    assert torch.equal(whole.train_images, small.train_images)
    assert (whole.mean, whole.std, whole.version) == (small.mean, small.std, small.version)
    assert len(whole.train_images) == 13


def test_a_tiff_turned_by_its_metadata_has_one_size(mine: Path) -> None:
    """Pillow tells a turned TIFF's size as it is seen; it was taken for turned once more, and cropped."""
    for value, folder in enumerate(sorted(mine.glob("*/*"))):
        photo = drawn(value, (20, 10))
        exif = photo.getexif()
        exif[0x0112] = 6
        photo.save(folder / "0.tif", exif=exif)
    found = load(str(mine), ImageOptions())
    assert found.shape == (3, 20, 10)
    assert found.notes == ()
    assert np.array_equal(
        found.train_images[0], np.asarray(drawn(2, (20, 10)).rotate(-90, expand=True)).transpose(2, 0, 1)
    )


def test_no_image_that_can_be_decoded(mine: Path) -> None:
    for folder in mine.glob("*/*"):
        (folder / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for skip in (False, True):
        with pytest.raises(OSError, match="got none: 4 that cannot"):
            load(str(mine), ImageOptions(skip_broken=skip))
    assert not list((mine.parent / "cache" / "images").iterdir())


def test_a_file_too_large_to_be_read_whole(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, folder in enumerate(sorted(mine.glob("*/*"))):
        drawn(value, (20, 20)).save(folder / "0.png")
    whole = images.load(str(mine), ImageOptions(), cache_dir=mine.parent / "one")
    monkeypatch.setattr(decode, "WHOLE", 10)
    again = images.load(str(mine), ImageOptions(), cache_dir=mine.parent / "two")
    assert whole.version == again.version


def test_paths_of_a_table_that_lead_nowhere_name_the_cure(mine: Path) -> None:
    """As where the table was written on Windows."""
    (mine / "a.csv").write_text("image,label\na\\0.png,a\na\\1.png,a\nb\\0.png,b\nb\\1.png,b\n")
    with pytest.raises(OSError, match=r"got none: \d that cannot .*Paths are relative to the table's folder"):
        load(str(mine / "a.csv"), ImageOptions(test_split=0.5))


def test_files_are_announced_before_they_are_read_and_odd_ones_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: announced.append(given[0]), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    (tmp_path / "a").write_bytes(b"a")
    decode._announce([tmp_path / "a", tmp_path / "gone", tmp_path, b"bytes"])
    assert len(announced) in (1, 2)  # a folder can be opened on some systems
    monkeypatch.delattr(os, "posix_fadvise")
    decode._announce([tmp_path / "a"])
