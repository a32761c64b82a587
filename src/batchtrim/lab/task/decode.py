"""Decode images of any size and mode on all cores into one array of uint8 pixels.

Decoding runs in threads: Pillow releases the GIL while it decodes and resizes, and threads share one memory. Pixels are
written to the file at their offset, so memory holds only the images at hand.

n images, C channels, H and W pixels.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from batchtrim._checks import import_extra

__all__ = ["BrokenImage", "Header", "Source", "decode_all", "read_headers"]

Source = Path | bytes
"""An image: a file, or its bytes."""
CHUNK = 64  # images that one thread takes at a time
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")


class BrokenImage(ValueError):
    """An image cannot be used; the message says why."""


@dataclass(frozen=True)
class Header:
    """The data in the head of an image file."""

    width: int
    height: int
    grey: bool


@dataclass
class Decoded:
    """The result of decoding: each image's hash, how often each value occurs, broken images with the reason."""

    hashes: np.ndarray
    counts: np.ndarray
    broken: dict[int, str] = field(default_factory=dict)


def read_headers(chunks: Iterable[tuple[int, list[Source]]], n: int) -> tuple[list[Header | None], dict[int, str]]:
    """Return each image's header, and the reasons by row of those that have none."""
    headers: list[Header | None] = [None] * n
    broken: dict[int, str] = {}

    def read(first: int, sources: list[Source]) -> None:
        for row, source in enumerate(sources, first):
            try:
                headers[row] = _header(source)
            except BrokenImage as error:
                broken[row] = str(error)

    _in_threads(read, chunks)
    return headers, broken


def decode_all(
    chunks: Iterable[tuple[int, list[Source]]],
    file: Path,
    places: np.ndarray,
    size: tuple[int, int],
    grey: bool,
    counted: int,
) -> Decoded:
    """Decode n images into ``file``, an .npy array of uint8 (n, C, H, W); broken ones stay black.

    Args:
        chunks: number of the first row, and a few images from there on.
        places: int (n,): where in the array each row goes. Hashes are in that order.
        size: width and height of all. grey: one channel; otherwise three.
        counted: how many places from the first on enter the counts of pixel values.
    """
    n = len(places)
    shape = (n, 1 if grey else 3, size[1], size[0])
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    offset, length = array.offset, int(np.prod(shape[1:]))
    del array
    found = Decoded(np.zeros(n, dtype=np.uint64), np.zeros((shape[1], 256), dtype=np.int64))
    turn = threading.Lock()  # not os.pwrite, which Windows lacks; nor the mapped array, where a full disk kills

    def decode(first: int, sources: list[Source]) -> np.ndarray:
        counts = np.zeros((shape[1], 256), dtype=np.int64)
        for row, source in enumerate(sources, first):
            try:
                pixels = np.ascontiguousarray(_pixels(source, size, grey))
            except BrokenImage as error:
                found.broken[row] = str(error)
                continue
            place, held = int(places[row]), pixels.tobytes()
            found.hashes[place] = int.from_bytes(hashlib.blake2b(held, digest_size=8).digest(), "little")
            if place < counted:
                counts += [np.bincount(channel.ravel(), minlength=256) for channel in pixels]
            with turn:
                out.seek(offset + place * length)
                out.write(held)
        return counts

    with file.open("r+b") as out:
        for counts in _in_threads(decode, chunks):
            found.counts += counts
    return found


def _in_threads(work: Callable[[int, list[Source]], Any], chunks: Iterable[tuple[int, list[Source]]]) -> list[Any]:
    """Do ``work`` on every chunk, on all cores, with no more of them waiting than keep the cores busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: list[Future[Any]] = []
    results = []
    with warnings.catch_warnings(), ThreadPoolExecutor(cores) as pool:
        warnings.simplefilter("ignore")  # what Pillow says of odd metadata; what cannot be decoded is told by name
        for first, sources in _cut(chunks):
            waiting.append(pool.submit(work, first, sources))
            if len(waiting) >= 3 * cores:
                results.append(waiting.pop(0).result())
        results += [each.result() for each in waiting]
    return results


def _cut(chunks: Iterable[tuple[int, list[Source]]]) -> Iterator[tuple[int, list[Source]]]:
    for first, sources in chunks:
        for start in range(0, len(sources), CHUNK):
            yield first + start, sources[start : start + CHUNK]


def _open(source: Source) -> Any:
    image_module = import_extra("PIL.Image", "lab", "images")
    if isinstance(source, Path):
        _check_file(source)
    try:
        image = image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Exception as error:  # what a damaged file raises depends on where it is damaged, and on the format
        raise BrokenImage(_reason(error, source)) from error
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # phones put a second view into a JPEG
        raise BrokenImage(f"it is animated, or has pages: {image.n_frames} frames")
    if image.mode == "F":
        raise BrokenImage("its pixels are floating point, of unknown range")
    return image


def _check_file(path: Path) -> None:
    """Refuse what cannot be opened, and what would wait for a writer for ever, as a pipe does."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise BrokenImage("there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise BrokenImage(f"it cannot be opened ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(mode):
        raise BrokenImage("it is no regular file")


def _header(source: Source) -> Header:
    image = _open(source)
    width, height = image.size
    try:
        turned = _may_be_turned(image, source) and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # metadata that cannot be read turns nothing
        turned = False
    grey = image.mode in GREY
    image.close()
    return Header(height, width, grey) if turned else Header(width, height, grey)


def _may_be_turned(image: Any, source: Source) -> bool:
    """Return False for a PNG without metadata that could say so: Pillow decodes all of a PNG to look for it."""
    if image.format != "PNG":
        return True
    held = source if isinstance(source, bytes) else source.read_bytes()
    return any(mark in held for mark in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp"))


def _pixels(source: Source, size: tuple[int, int], grey: bool) -> np.ndarray:
    """Return (C, H, W), turned by its EXIF, transparency on white, scaled to cover ``size`` and centre-cropped."""
    ops = import_extra("PIL.ImageOps", "lab", "images")
    try:
        image = _open(source)
        if image.format == "JPEG":
            image.draft("L" if grey else "RGB", (2 * size[0], 2 * size[1]))  # decodes at a fraction where it is larger
        image.load()
        ops.exif_transpose(image, in_place=True)
        image = _in_mode(image, grey)
        if image.size != size:
            image = ops.fit(image, size, method=2, bleed=0.0)  # 2: bilinear, over all pixels that go into one
    except BrokenImage:
        raise
    except Exception as error:  # as above
        raise BrokenImage(_reason(error, source)) from error
    pixels = np.asarray(image)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _in_mode(image: Any, grey: bool) -> Any:
    """Convert to 8 bits a channel, grey or RGB. 16 bits keep their upper 8; Pillow would clip all above 255."""
    module = import_extra("PIL.Image", "lab", "images")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise BrokenImage(f"its pixels go from {values.min()} to {values.max()}, beyond 16 bits")
        if image.mode == "I" and 0 < values.max(initial=0) < 256:  # the upper 8 of 16 bits would be black
            raise BrokenImage(f"its pixels of 32 bits go up to {values.max()}, of unknown range")
        image = module.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = module.new("RGBA", image.size, (255, 255, 255, 255))
        image = module.alpha_composite(white, image)
    mode = "L" if grey else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _reason(error: BaseException, source: Source) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be opened ({error.strerror})"
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size == 0:
        return "it is empty"
    if type(error).__name__ == "UnidentifiedImageError":
        return f"its {size} bytes are no image that can be read"
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"it cannot be decoded ({text[:120]})"
