"""Few images are decoded at once, however large they are and however many cores; and few images use all cores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from batchtrim.lab.task import decode, memory, tables


def test_room_is_shared_and_given_back() -> None:
    room, inside, most = memory.Room(100), 0, 0
    turn = threading.Lock()

    def work(size: int) -> None:
        nonlocal inside, most
        with room.taken(size):
            with turn:
                inside += min(size, 100)
                most = max(most, inside)
            threading.Event().wait(0.002)
            with turn:
                inside -= min(size, 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [40, 50, 1000, 10, 60, 100, 30] * 5))
    assert 60 < most <= 100
    assert room.free == 100


def test_room_is_given_back_by_an_image_that_is_broken() -> None:
    room = memory.Room(10)
    with pytest.raises(ValueError, match="broken"), room.taken(5):
        raise ValueError("broken")
    assert room.free == 10


@pytest.mark.parametrize(("mode", "each"), [("RGB", 8), ("L", 8), ("CMYK", 8), ("RGBA", 24), ("P", 24), ("I;16", 24)])
def test_what_an_image_needs(mode: str, each: int) -> None:
    assert memory.needed(Image.new(mode, (20, 10))) == 200 * each


def test_transparency_needs_more() -> None:
    image = Image.new("RGB", (20, 10))
    image.info["transparency"] = (0, 0, 0)
    assert memory.needed(image) == 200 * 24


def test_pillow_is_left_as_it_was() -> None:
    core: Any = Image.core
    before = core.get_blocks_max()
    with memory.blocks_kept():
        assert core.get_blocks_max() * core.get_block_size() >= memory.ROOM
    assert core.get_blocks_max() == before


def test_chunks_are_cut_by_their_bytes() -> None:
    """64 photos of a table were one chunk: with many cores, gigabytes waited."""
    large, small = bytes(3 * decode.CHUNK_BYTES), b"x"
    cut = list(decode._cut([(0, [large, large, small, large]), (4, [small] * 5)], 3))
    assert [(first, len(some)) for first, some in cut] == [(0, 1), (1, 2), (3, 1), (4, 3), (7, 2)]
    assert [each for _, some in cut for each in some] == [large, large, small, large, *[small] * 5]


def test_few_bytes_wait_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "WAITING_BYTES", 100)
    monkeypatch.setattr(decode, "_cores", lambda: 50)
    taken = 0

    def chunks() -> Iterator[tuple[int, list[decode.Source]]]:
        nonlocal taken
        for i in range(20):
            taken += 1
            yield i, [bytes(40)]

    done = decode._in_threads(lambda first, sources: first, chunks())
    assert next(done) == 0
    assert taken <= 4
    assert list(done) == list(range(1, 20))


def test_few_images_occupy_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks were of 64 images: fewer than that, however large, were decoded by one thread."""
    monkeypatch.setattr(decode, "_cores", lambda: 3)
    sizes: list[int] = []
    cut = decode._cut

    def watched(chunks: Any, most: int) -> Any:
        sizes.append(most)
        return cut(chunks, most)

    monkeypatch.setattr(decode, "_cut", watched)
    for i in range(24):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    files: list[decode.Source] = [tmp_path / f"{i}.png" for i in range(24)]
    places = np.arange(24)
    form = decode.ImageForm((4, 4), grey=False, uniform=True)
    found = decode.decode_all([(0, files)], tmp_path / "all.npy", places, form, 24)
    assert sizes == [2]
    assert not found.broken
    assert np.load(tmp_path / "all.npy")[:, 0, 0, 0].tolist() == list(range(24))


@pytest.mark.parametrize(("size", "rows", "at_once"), [(0, 0, 1), (1000, 10, 256), (2**30, 64, 2), (2**32, 2, 1)])
def test_rows_of_large_images_are_read_a_few_at_a_time(size: int, rows: int, at_once: int) -> None:
    """Always 256: gigabytes of photos."""
    assert tables.rows_at_once(size, rows) == (256 if rows == 10 else at_once)


def test_batches_hold_all_cells_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [bytes([i]) * 1000 for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "t.parquet", row_group_size=20)
    monkeypatch.setattr(tables, "ROWS_BYTES", 7000)
    found = list(tables.batches(tmp_path / "t.parquet", "image"))
    assert [each for batch in found for each in batch] == cells
    assert max(map(len, found)) <= 7
    assert [each for batch in tables.batches(tmp_path / "t.parquet", "image", [1]) for each in batch] == cells[20:40]
