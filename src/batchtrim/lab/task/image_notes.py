"""Notes on the user's own images: what was done to them, and what weakens the test on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from batchtrim.lab.files import shown
from batchtrim.lab.task import data
from batchtrim.lab.task.decode import Header

__all__ = ["check_sides", "deep", "resized", "some"]

DARK = 64  # 16-bit images below this, after their lower 8 bits were dropped, were of 14 bits or fewer


def resized(headers: Sequence[Header], size: tuple[int, int], asked: int | None) -> list[str]:
    """Return a note on the images' own sizes, if they differ from the common one; ``asked`` is --image-size."""
    sizes = {(each.width, each.height) for each in headers}
    if sizes <= {size}:
        return []
    by_area = sorted(sizes, key=lambda each: (each[0] * each[1], each))
    low, high = by_area[0], by_area[-1]
    seen = f"{low[0]} x {low[1]}" + (f" to {high[0]} x {high[1]}" if len(sizes) > 1 else "")
    hint = "" if asked else "; --image-size sets another size"
    return [f"images of {seen} pixels resized to {size[0]} x {size[1]}, centre-cropped{hint}"]


def deep(headers: Sequence[Header], counts: np.ndarray) -> list[str]:
    """Return a note on images of 16 bits, of which 8 are dropped; ``counts`` is of pixel values, (C, 256)."""
    several = sum(each.deep for each in headers)
    if not several:
        return []
    brightest = int(counts.sum(0).nonzero()[0].max(initial=0))
    dark = several == len(headers) and brightest < DARK
    images = "images" if several > 1 else "image"
    left = f", and their brightest pixel is then {brightest} of 255: scale them to 16 bits first" if dark else ""
    return [f"{several} {images} of 16 bits a pixel lost the lower 8{left}"]


def check_sides(found: data.ImageData, names: Sequence[str], hashes: np.ndarray, first_test: int) -> list[str]:
    """Refuse classes that cannot be learnt, and note what weakens the test."""
    train, test = (torch.bincount(part, minlength=found.classes) for part in (found.train_labels, found.test_labels))
    listed = found.class_names
    unlearnt = [listed[i] for i in ((train == 0) & (test > 0)).nonzero().flatten().tolist()]
    if unlearnt:
        raise ValueError(
            f"expected every class to test on among those to train on in {found.name}, got {some(unlearnt)} "
            "to test on only."
        )
    notes = []
    untested = [listed[i] for i in ((test == 0) & (train > 0)).nonzero().flatten().tolist()]
    if untested:
        notes.append(f"no images to test on of {some(untested)}")
    known = dict(zip(hashes[:first_test].tolist(), range(first_test), strict=True))
    again = [
        (row, known[value]) for row, value in enumerate(hashes[first_test:].tolist(), first_test) if value in known
    ]
    if again:
        row, twin = again[0]
        notes.append(
            f"{len(again)} of {len(hashes) - first_test} images to test on are in the training split too, pixel by "
            f"pixel, such as {shown(names[row])} and {shown(names[twin])}: the test error is too low, since these can "
            "be memorised"
        )
    labels, pixels = found.train_labels.numpy(), hashes[:first_test]
    order = np.lexsort((labels, pixels))
    torn = np.flatnonzero((np.diff(pixels[order]) == 0) & (np.diff(labels[order]) != 0))
    if len(torn):
        one, other = (shown(names[row]) for row in sorted(order[torn[0] : torn[0] + 2]))
        several = len(np.unique(pixels[order[torn]]))
        occur = "images occur" if several > 1 else "image occurs"
        notes.append(
            f"{several} training {occur} under several classes, pixel by pixel, "
            f"such as {one} and {other}: no network can learn all of them"
        )
    return notes


def some(names: Sequence[str]) -> str:
    return shown(", ".join(names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
