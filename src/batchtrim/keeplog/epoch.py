"""The sums of an epoch, which become one line of the history.

Legend: P entries that are added together, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchtrim import noise
from batchtrim.keeplog.batch import Entries

__all__ = ["count", "length", "line", "outside"]

# seen, kept, judged, judged and kept, in doubt, in doubt and kept, out of range; then what noise.stays gives
_COUNTED = 7
_SUMS = _COUNTED + 6


def length(classes: int | None) -> int:
    """Return the number of sums: those over all samples, then seen and kept for each class."""
    return _SUMS + 2 * (classes or 0)


def count(entries: Entries, stays: Tensor, *, n: int, classes: int | None) -> Tensor:
    """Return the sums of the entries; masked entries do not count.

    Args:
        entries: as recorded, rows out of range included.
    """
    rows, labels, predicted = entries.rows, entries.labels, entries.predicted
    here = (rows >= 0) & (rows < n)
    beyond = (rows < 0) | (rows > n)
    if classes:
        beyond = beyond | (here & (labels >= classes))
    kept = entries.kept & here
    judged = here & (predicted >= 0) & (labels >= 0)
    doubt = judged & (predicted != labels) & noise.surest(entries.confidence, judged)
    parts = [here, kept, judged, judged & kept, doubt, doubt & kept, beyond]
    sums = [torch.stack([part.sum() for part in parts]), stays]
    if classes:
        by_class = torch.zeros(2, classes + 1, dtype=torch.int64, device=rows.device)
        slot = torch.where(here & (labels >= 0) & (labels < classes), labels, classes).long()
        by_class[0].index_add_(0, slot, here.long())
        by_class[1].index_add_(0, slot, kept.long())
        sums.append(by_class[:, :-1].flatten())
    return torch.cat(sums)


def outside(sums: list[int]) -> int:
    """Return the number of entries out of range."""
    return sums[_COUNTED - 1]


def line(sums: list[int], steps: int, classes: int | None) -> dict[str, Any]:
    """Return the line of history that :meth:`batchtrim.KeepLog.end_epoch` describes."""
    seen, kept, judged, judged_kept, doubt, doubt_kept, _ = sums[:_COUNTED]
    hard_before, hard_again, easy_before, easy_again, hard, hard_kept = sums[_COUNTED:_SUMS]
    found: dict[str, Any] = {
        "steps": steps,
        "seen": seen,
        "kept": kept,
        "keep": _ratio(kept, seen),
        "doubt": _ratio(doubt, judged),
        "doubt_kept": _ratio(doubt_kept, judged_kept),
        "stay_hard": _ratio(hard_again, hard_before),
        "stay_easy": _ratio(easy_again, easy_before),
        "compared": hard_before,
        "hard_kept": _ratio(hard_kept, hard),
    }
    if classes:
        counts = sums[_SUMS:]
        found |= {"class_seen": counts[:classes], "class_kept": counts[classes:]}
    return found


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
