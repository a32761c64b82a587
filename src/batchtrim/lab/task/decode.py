"""Decode images of any size and mode on all cores into one array of uint8 pixels.

Every file is read once: its header and its pixels come from the same bytes. The common form depends on
all headers, so it is assumed from the first; if an image contradicts it, decoding starts over with another form.

Decoding runs in threads: Pillow releases the GIL while it decodes and resizes, and threads share memory. What holds
the GIL limits them, so counts and writes are done once per chunk. Only the current chunks are in memory.

n images, C channels, H and W pixels.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchtrim._checks import first_line, import_extra
from batchtrim.lab.task import memory
from batchtrim.lab.task.cache_entry import hash_of
from batchtrim.lab.terminal import ProgressCount

__all__ = ["BrokenImage", "Contradicted", "Decoded", "Header", "ImageForm", "Source", "decode_all", "first_header"]

Source = Path | bytes
"""An image: a file, or its bytes."""
CHUNK = 64  # images per chunk, which one thread decodes at a time
CHUNK_BYTES = 2**22  # bytes of pixels per chunk, if images are large; four times that for encoded images from a table
WAITING_BYTES = 2**27  # bytes of a table's encoded images that wait for a thread
WHOLE = 2**28  # files up to this many bytes are read whole; Pillow reads larger ones in pieces
READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for a writer
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
MAGIC = {b"\xff\xd8\xff": ("JPEG",), b"\x89PNG": ("PNG",)}  # otherwise Pillow tries all its formats in turn


class BrokenImage(ValueError):
    """An image cannot be used; the message says why."""


@dataclass(frozen=True)
class Header:
    """The header of an image file; width and height are after rotation by EXIF.

    Attributes:
        grey: one channel.
        deep: more than 8 bits in it.
    """

    width: int
    height: int
    grey: bool
    deep: bool = False


@dataclass(frozen=True)
class ImageForm:
    """The form that all images are converted to.

    Attributes:
        size: width and height.
        grey: one channel; otherwise three.
        uniform: every image has this size already.
    """

    size: tuple[int, int]
    grey: bool
    uniform: bool

    def fits(self, header: Header) -> bool:
        """True if an image with that header needs no other form."""
        return (header.grey or not self.grey) and (not self.uniform or (header.width, header.height) == self.size)


class Contradicted(Exception):
    """An image has a header that does not fit the form; ``header`` is that header."""

    def __init__(self, header: Header):
        super().__init__(header)
        self.header = header


@dataclass
class Decoded:
    """The result of decoding.

    Attributes:
        headers: of each image; None if it is too broken to have one.
        broken: the reason, by row.
        hashes: of each image's pixels.
        counts: how often each value occurs in a channel, int (C, 256).
    """

    headers: list[Header | None]
    hashes: np.ndarray
    counts: np.ndarray
    broken: dict[int, str]


def first_header(chunks: Iterable[tuple[int, list[Source]]]) -> Header | None:
    """Return the first image header that can be read."""
    with _quiet():
        for _, sources in chunks:
            for source in sources:
                try:
                    return _open(source)[1]
                except BrokenImage:
                    continue
    return None


def decode_all(
    chunks: Iterable[tuple[int, list[Source]]], file: Path, places: np.ndarray, form: ImageForm, counted: int
) -> Decoded:
    """Decode n images into ``file``, an .npy array of uint8 (n, C, H, W); broken ones stay black.

    Args:
        chunks: the number of the first row, and the images from that row on.
        places: int (n,): the position of each row in the array. Hashes are in that order.
        counted: how many positions, from the first on, enter the counts of pixel values.

    Raises:
        Contradicted: an image does not fit the form.
    """
    n = len(places)
    shape = (1 if form.grey else 3, form.size[1], form.size[0])
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(n, *shape))
    offset, length = array.offset, int(np.prod(shape))
    del array
    found = Decoded([None] * n, np.zeros(n, dtype=np.uint64), np.zeros((shape[0], 256), dtype=np.int64), {})
    turn = threading.Lock()  # not os.pwrite, which Windows lacks; nor a mapped array: a full disk would kill

    def decode(first: int, sources: list[Source]) -> tuple[int, np.ndarray]:
        pixels = np.empty((len(sources), *shape), dtype=np.uint8)
        whole = []
        for i, source in enumerate(sources):
            try:
                image, header, turned = _open(source)
                if not form.fits(header):
                    raise Contradicted(header)
                found.headers[first + i] = header
                pixels[i] = _pixels(image, source, turned, form)
            except BrokenImage as error:
                found.broken[first + i] = str(error)
                continue
            found.hashes[places[first + i]] = hash_of(pixels[i])
            whole.append(i)
        at = places[first : first + len(sources)]
        with turn:
            for run in _runs(at, whole):
                out.seek(offset + int(at[run[0]]) * length)
                out.write(pixels[run].data)
        train = [i for i in whole if at[i] < counted]
        return len(sources), np.stack(
            [np.bincount(pixels[train, channel].ravel(), minlength=256) for channel in range(shape[0])]
        )

    most = max(1, min(CHUNK, CHUNK_BYTES // length, n // (4 * _cores())))  # so that a few images occupy all cores too
    with file.open("r+b") as out:
        said = ProgressCount("images decoded", n)
        for images, counts in _in_threads(decode, _cut(chunks, most)):
            found.counts += counts
            said.add(images)
    return found


def _runs(places: np.ndarray, rows: list[int]) -> list[np.ndarray]:
    """Return the rows in the order of their positions, split at gaps."""
    order = np.asarray(sorted(rows, key=places.__getitem__), dtype=np.int64)
    return [run for run in np.split(order, np.flatnonzero(np.diff(places[order]) != 1) + 1) if len(run)]


def _in_threads(work: Callable[[int, list[Source]], Any], chunks: Iterable[tuple[int, list[Source]]]) -> Iterator[Any]:
    """Do ``work`` on every chunk on all cores, with only as many chunks waiting as keep the cores busy."""
    cores = _cores()
    waiting: deque[tuple[Future[Any], int]] = deque()
    # one more thread than cores, for when one waits for the disk
    with _quiet(), memory.blocks_kept(), ThreadPoolExecutor(cores + 1) as pool:
        try:
            for first, sources in chunks:
                _announce(sources)
                waiting.append((pool.submit(work, first, sources), sum(map(_held, sources))))
                while len(waiting) >= 3 * cores or sum(held for _, held in waiting) > WAITING_BYTES:
                    yield waiting.popleft()[0].result()
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _announce(sources: list[Source]) -> None:
    """Ask the system to read files ahead, if it can, so that no core waits for the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for source in sources:
        if isinstance(source, Path):
            with contextlib.suppress(OSError):  # the reader will report what is wrong
                file = os.open(source, READ)
                try:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(file)


def _quiet() -> warnings.catch_warnings:
    """Silence Pillow's warnings about odd metadata; images that cannot be decoded are reported by name."""
    return warnings.catch_warnings(action="ignore")


def _cut(chunks: Iterable[tuple[int, list[Source]]], most: int) -> Iterator[tuple[int, list[Source]]]:
    """Split chunks at ``most`` images, or at many bytes of encoded ones."""
    for first, sources in chunks:
        start = held = 0
        for i, source in enumerate(sources):
            if i - start == most or (i > start and held + _held(source) > 4 * CHUNK_BYTES):
                yield first + start, sources[start:i]
                start, held = i, 0
            held += _held(source)
        yield first + start, sources[start:]


def _held(source: Source) -> int:
    """Return how many bytes of memory an undecoded image takes."""
    return len(source) if isinstance(source, bytes) else 0


@functools.cache
def _pil(name: str) -> Any:
    return import_extra(f"PIL.{name}", "lab", "images")


def _open(source: Source) -> tuple[Any, Header, bool]:
    """Return an undecoded image, its header, and whether its EXIF data rotate or mirror it."""
    image_module = _pil("Image")
    held = _read(source) if isinstance(source, Path) else source
    try:
        if isinstance(held, bytes):
            formats = next((kind for magic, kind in MAGIC.items() if held.startswith(magic)), None)
            image = image_module.open(io.BytesIO(held), formats=formats)
        else:
            image = image_module.open(held)
    except Exception as error:  # the error of a damaged file depends on the damage and on the format
        raise BrokenImage(_reason(error, source)) from error
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # phones store a second view in a JPEG
        raise BrokenImage(f"it is animated, or has pages: {image.n_frames} frames")
    if image.mode == "F":
        raise BrokenImage("its pixels are floating point, of unknown range")
    width, height = image.size
    turn = _orientation(image, held)
    sides = (height, width) if turn in (5, 6, 7, 8) else (width, height)
    return image, Header(*sides, grey=image.mode in GREY, deep=image.mode.startswith("I")), turn != 1


def _read(path: Path) -> bytes | Path:
    """Return a file's bytes, or the path of a large one; refuse what cannot be opened or is not a regular file."""
    try:
        held = os.open(path, READ)
        try:
            found = os.fstat(held)
            if not stat.S_ISREG(found.st_mode):
                raise BrokenImage("it is no regular file")
            return os.read(held, found.st_size) if found.st_size <= WHOLE else path
        finally:
            os.close(held)
    except FileNotFoundError:
        raise BrokenImage("there is no such file") from None
    except BrokenImage:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise BrokenImage(f"it cannot be opened ({getattr(error, 'strerror', None) or error})") from None


def _orientation(image: Any, held: bytes | Path) -> int:
    """Return an image's EXIF orientation, 1 to 8; 1 is unchanged."""
    if image.format == "TIFF":  # Pillow rotates it while decoding, and its size is that of the rotated image
        return 1
    try:
        if image.format == "PNG":  # Pillow would decode the whole PNG to look for it
            held = held if isinstance(held, bytes) else held.read_bytes()
            if not any(mark in held for mark in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")):
                return 1
        return image.getexif().get(0x0112, 1)
    except Exception:  # unreadable metadata rotate nothing
        return 1


def _pixels(image: Any, source: Source, turned: bool, form: ImageForm) -> np.ndarray:
    """Return (C, H, W): rotated by EXIF, transparency on white, scaled to cover the size, cropped at the centre."""
    ops = _pil("ImageOps")
    size = form.size
    try:
        if image.format == "JPEG":
            image.draft("L" if form.grey else "RGB", (2 * size[0], 2 * size[1]))  # a fraction of its size, if larger
        with memory.room.taken(memory.needed(image)):
            image.load()
            if turned:
                ops.exif_transpose(image, in_place=True)
            image = _in_mode(image, form.grey)
            if image.size != size:
                image = ops.fit(image, size, method=2, bleed=0.0)  # 2: bilinear, over all pixels that contribute
    except BrokenImage:
        raise
    except Exception as error:  # as above
        raise BrokenImage(_reason(error, source)) from error
    pixels = np.asarray(image)
    return pixels[None] if form.grey else pixels.transpose(2, 0, 1)


def _in_mode(image: Any, grey: bool) -> Any:
    """Convert to 8 bits per channel, grey or RGB. 16 bits keep their upper 8; Pillow would clip all above 255."""
    module = _pil("Image")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise BrokenImage(f"its pixels go from {values.min()} to {values.max()}, beyond 16 bits")
        if image.mode == "I" and 0 < values.max(initial=0) < 256:  # the upper 8 of 16 bits would be black
            raise BrokenImage(f"its pixels of 32 bits go up to {values.max()}, of unknown range")
        image = module.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = module.new("RGBA", image.size, (255, 255, 255, 255))
        image = module.alpha_composite(white, image)
    mode = "L" if grey else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _reason(error: BaseException, source: Source) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be opened ({error.strerror})"
    size = None if isinstance(source, Path) else len(source)
    if isinstance(source, Path):
        with contextlib.suppress(OSError):  # it may be gone
            size = source.stat().st_size
    if size == 0:
        return "it is empty" if isinstance(source, Path) else "nothing is in its cell"
    if type(error).__name__ == "UnidentifiedImageError":
        return f"its {size} bytes are no image that can be read"
    return f"it cannot be decoded ({first_line(error, 120)})"
