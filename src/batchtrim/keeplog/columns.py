"""The numbers of every sample, as columns of n + 1 rows; the last row receives the entries that a mask leaves out.

Legend: n samples in the data set, P entries that are added together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from batchtrim import noise
from batchtrim._machine import memory
from batchtrim.keeplog.batch import Entries

__all__ = ["COLUMNS", "INT16_CLASSES", "empty", "enter", "merged", "read", "unread", "widened"]

# name: dtype, and value for a sample never seen; 32 bytes in all
COLUMNS: dict[str, tuple[torch.dtype, float]] = {
    "seen": (torch.int32, 0),
    "kept": (torch.int32, 0),
    "first": (torch.float32, float("nan")),
    "last": (torch.float32, float("nan")),
    "mean": (torch.float32, 0.0),
    "m2": (torch.float32, 0.0),
    "last_dropped": (torch.int32, -1),
    "predicted": (torch.int16, -1),
    "confidence": (torch.float16, float("nan")),
}
INT16_CLASSES = 2**15  # with more classes, ``predicted`` is int32, and a sample takes 34 bytes

_BYTES = sum(dtype.itemsize for dtype, _ in COLUMNS.values())

Columns = dict[str, Tensor]


def empty(n: int) -> Columns:
    """Return columns for n samples, none seen yet."""
    beyond = ValueError(f"expected `n` samples of 32 bytes each to fit in memory, got {n}.")
    if n * _BYTES > memory():  # Linux would allocate it, and kill the process while it is filled
        raise beyond
    try:
        return {name: torch.full((n + 1,), fill, dtype=dtype, device="cpu") for name, (dtype, fill) in COLUMNS.items()}
    except (RuntimeError, MemoryError, TypeError, OverflowError):  # torch has no specific error for this
        raise beyond from None


def widened(columns: Columns) -> Columns:
    """Return the columns with room for more than 32,768 classes."""
    return {**columns, "predicted": columns["predicted"].to(torch.int32)}


def enter(columns: Columns, entries: Entries) -> Tensor:
    """Add entries in place. No shape depends on the data, so nothing waits for the device.

    Args:
        entries: rows from 0 to n, in the order recorded.

    Returns:
        What :func:`batchtrim.noise.stays` counts of them.
    """
    # Sort by sample, in the order recorded: the entries of a sample stand from `start` to `end`.
    rows, order = torch.sort(entries.rows, stable=True)
    start = torch.searchsorted(rows, rows)
    end = torch.searchsorted(rows, rows, right=True) - 1
    losses, kept, steps, predicted, confidence = (part[order] for part in entries[1:6])

    def total(values: Tensor) -> Tensor:
        """Return the sum over the entries of each sample, repeated for each entry."""
        return torch.zeros_like(values).index_add_(0, start, values)[start]

    def largest(values: Tensor) -> Tensor:
        """Return the largest over the entries of each sample, at least -1, repeated for each entry."""
        return torch.full_like(values, -1).scatter_reduce_(0, start, values, "amax")[start]

    count = (end - start + 1).to(torch.int32)
    mean = total(losses) / count
    m2 = total((losses - mean) ** 2)
    place = torch.arange(len(rows), device=rows.device)
    judged = largest(torch.where(predicted >= 0, place, -1))
    dropped = largest(torch.where(kept, -1, steps))
    mine = {name: column[rows] for name, column in columns.items()}
    compared = (mine["seen"] > 0) & (rows < len(columns["seen"]) - 1)
    stays = noise.stays(mine["last"], losses, compared, kept)
    mean, m2 = _combine(mine, count, mean, m2)
    new = {
        "seen": mine["seen"] + count,
        "kept": mine["kept"] + total(kept.to(torch.int32)),
        "first": torch.where(mine["seen"] > 0, mine["first"], losses[start]),
        "last": losses[end],
        "mean": mean,
        "m2": m2,
        "last_dropped": torch.maximum(mine["last_dropped"], dropped),
        "predicted": torch.where(judged >= 0, predicted[judged], mine["predicted"]),
        "confidence": torch.where(judged >= 0, confidence[judged], mine["confidence"]),
    }
    for name, values in new.items():  # entries of one sample write the same value
        columns[name][rows] = values.to(columns[name].dtype)
    return stays


def merged(mine: Columns, theirs: Columns, steps: int) -> Columns:
    """Return the columns as if ``theirs`` had been entered after ``mine``, ``steps`` batches after its start."""
    there = theirs["seen"] > 0
    mean, m2 = _combine(mine, theirs["seen"], theirs["mean"], theirs["m2"])
    return {
        "seen": mine["seen"] + theirs["seen"],
        "kept": mine["kept"] + theirs["kept"],
        "first": torch.where(mine["seen"] > 0, mine["first"], theirs["first"]),
        "last": torch.where(there, theirs["last"], mine["last"]),
        "mean": torch.where(there, mean, mine["mean"]),
        "m2": torch.where(there, m2, mine["m2"]),
        "last_dropped": torch.where(theirs["last_dropped"] >= 0, theirs["last_dropped"] + steps, mine["last_dropped"]),
        "predicted": torch.where(theirs["predicted"] >= 0, theirs["predicted"], mine["predicted"]),
        "confidence": torch.where(theirs["predicted"] >= 0, theirs["confidence"], mine["confidence"]),
    }


def read(columns: Columns) -> Columns:
    """Return the table: n rows on the CPU, with keep rate and variance."""
    found = {name: column[:-1].to("cpu", copy=True) for name, column in columns.items()}  # later batches change these
    seen = found["seen"]
    never = torch.where(seen > 0, 0.0, float("nan"))
    found["keep_rate"] = found["kept"] / seen  # 0 / 0 is NaN
    found["mean"] = found["mean"] + never
    found["variance"] = found.pop("m2").double() / seen
    return found


def unread(table: Mapping[str, Tensor], columns: Columns) -> Columns:
    """Return columns filled from a table; the inverse of :func:`read`."""
    known = table["seen"] > 0
    found = {name: table[name] for name in COLUMNS.keys() - {"m2"}}
    found["m2"] = torch.where(known, table["variance"] * table["seen"], 0.0)
    found["mean"] = torch.where(known, table["mean"], 0.0)
    if found["predicted"].dtype == torch.int32:
        columns = widened(columns)
    for name, column in columns.items():
        column[:-1] = found[name].to(column.dtype)
    return columns


def _combine(mine: Columns, count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations of two sets of losses (Chan, Golub and LeVeque 1979)."""
    both = (mine["seen"] + count).clamp(min=1)
    apart = mean - mine["mean"]
    share = count / both
    return mine["mean"] + apart * share, mine["m2"] + m2 + (apart * mine["seen"] * share) * apart
