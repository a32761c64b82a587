"""Check the description of a keep log's samples, which a page shows: texts or fields, or images, and their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from batchtrim._checks import describe, plain

__all__ = ["checked_images", "checked_labels", "checked_rows"]


def checked_rows(rows: Sequence[Any]) -> list[str | dict[str, Any]]:
    """Return a text, or a mapping of fields, for each sample."""
    for place, row in enumerate(rows):
        if not isinstance(row, str | Mapping):
            raise TypeError(f"expected `rows` to be texts or mappings of fields, got {describe(row)} in row {place}.")
    return [row if isinstance(row, str) else dict(row) for row in rows]


def checked_images(images: Any) -> np.ndarray:
    """Return images as uint8 (n, C, H, W), C 1 or 3."""
    array = np.asarray(images.cpu() if isinstance(images, Tensor) else images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3):
        hint = ""
        if array.dtype != np.uint8:
            hint = " From 0 to 1: (255 * images).round().to(torch.uint8)."
        elif array.ndim == 4 and array.shape[3] in (1, 3):
            hint = " With the channels last: images.permute(0, 3, 1, 2)."
        elif array.ndim == 3:
            hint = " Of one channel: images.unsqueeze(1)."
        raise ValueError(
            f"expected `images` to be uint8 of shape (n, C, H, W), with 1 or 3 channels C, got {describe(array)}.{hint}"
        )
    return array


def checked_labels(labels: Sequence[Any] | Tensor, classes: Sequence[Any]) -> list[int]:
    """Return the class number of each sample, from 0 to C - 1 for C names."""
    found = []
    for place, label in enumerate(map(plain, labels.tolist() if isinstance(labels, Tensor) else labels)):
        if not isinstance(label, int | float) or label != int(label):
            raise TypeError(
                f"expected `labels` to be whole numbers from 0, got {describe(label)} for sample {place}. Names belong "
                "in `classes`."
            )
        if not 0 <= label < len(classes):
            raise ValueError(
                f"expected `labels` from 0 to {len(classes) - 1}, as `classes` has {len(classes)} names, got "
                f"{label:g} for sample {place}."
            )
        found.append(int(label))
    return found
