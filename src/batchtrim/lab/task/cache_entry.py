"""An entry in the cache of the user's own images: pixels and metadata, checked when read.

n images, of which k were kept; C channels, H and W pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from batchtrim.lab.task.data import ReplaceFile

__all__ = ["ABOUT", "PIXELS", "Entry", "hash_of", "read", "write_about"]

ABOUT, PIXELS = "about.json", "pixels.npy"
REHASHED = 64  # how many images are compared with their hashes when an entry is read


@dataclass(frozen=True)
class Entry:
    """The content of an entry.

    Attributes:
        pixels: uint8 (k, C, H, W), mapped from the file.
        hashes: uint64 (k,), of each image's pixels.
        kept: bool (n,), False for a broken image.
        mean, std: of the training images, per channel.
        notes: remarks on the images.
    """

    pixels: np.ndarray
    hashes: np.ndarray
    kept: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...]


def hash_of(pixels: np.ndarray) -> int:
    """Return the hash of one image's pixels."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8).digest(), "little")


def write_about(
    folder: Path, kept: np.ndarray, hashes: np.ndarray, mean: Sequence[float], std: Sequence[float],
    notes: Sequence[str], source: str,
) -> None:  # fmt: skip
    """Write the metadata beside the pixels."""
    np.save(folder / "kept.npy", kept)
    np.save(folder / "hashes.npy", hashes)
    about = {"mean": mean, "std": std, "notes": notes, "source": source}
    (folder / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def read(folder: Path, n: int) -> Entry:
    """Return the entry of n images in a folder.

    Raises:
        ReplaceFile: it is damaged: files are missing, truncated or of other images, or pixels differ from those
            decoded.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        found = Entry(
            pixels=np.load(folder / PIXELS, mmap_mode="c", allow_pickle=False),  # c: torch requires a writable array
            hashes=np.load(folder / "hashes.npy", allow_pickle=False),
            kept=np.load(folder / "kept.npy", allow_pickle=False),
            mean=tuple(about["mean"]),
            std=tuple(about["std"]),
            notes=tuple(about["notes"]),
        )
        if reason := _damage(found, n):
            raise ValueError(reason)
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise ReplaceFile(
            f"expected decoded images in {folder}, got a damaged cache ({error}). Remove that folder and try again."
        ) from error
    return found


def _damage(found: Entry, n: int) -> str:
    """Return what is wrong with an entry; "" if nothing is."""
    k = int(found.kept.sum())
    if found.kept.shape != (n,) or found.kept.dtype != bool or found.hashes.shape != (k,):
        return f"hashes {found.hashes.shape} and kept {found.kept.shape} of {n} images"
    if found.pixels.ndim != 4 or found.pixels.dtype != np.uint8 or len(found.pixels) != k:
        return f"pixels {found.pixels.shape} of {found.pixels.dtype} for {k} images"
    if not len(found.mean) == len(found.std) == found.pixels.shape[1]:
        return f"{len(found.mean)} means and {len(found.std)} deviations of {found.pixels.shape[1]} channels"
    rows = np.unique(np.linspace(0, k - 1, REHASHED).astype(np.int64)) if k else []
    wrong = sum(hash_of(found.pixels[row]) != int(found.hashes[row]) for row in rows)
    return f"{wrong} of {len(rows)} images compared have other pixels than were decoded" if wrong else ""
