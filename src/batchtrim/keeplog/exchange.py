"""Exchange the entries of all ranks, so that each rank holds the whole log."""

from __future__ import annotations

import torch
from torch import distributed as dist

from batchtrim.distributed import check_same, gather, meet, world_size
from batchtrim.keeplog.batch import Entries

__all__ = ["gathered", "meeting_device"]

_SAME = ("number of batches recorded since the last epoch", "number of samples, n,", "number of classes")
_CURE = "On every rank, make the log with the same arguments, record every batch (also empty ones), and end the epoch."


def gathered(entries: Entries, batches: int, n: int, classes: int | None, *, wide: bool) -> tuple[Entries, bool]:
    """Return the entries of all ranks, ordered by steps and then by ranks, and whether any rank is ``wide``.

    Args:
        batches: how many were recorded since the last time.
        wide: there are more classes than ``predicted`` has room for.

    Raises:
        RanksDisagree: on every rank, if one recorded another number of batches (such as none) or has another log; and
            if a rank does not arrive before the time limit.
    """
    ranks, device = world_size(), entries.rows.device
    headers = meet("keep log", [batches, n, classes or 0, int(wide), len(entries.rows)], device)
    for position, what in enumerate(_SAME):
        found = [header[position] for header in headers]
        check_same(what, found, found, _CURE)
    sizes = [header[4] for header in headers]
    # gloo and NCCL do not support int16 and bool everywhere; doubles hold every value here exactly
    padded = torch.zeros(len(entries), max(sizes), dtype=torch.float64, device=device)
    padded[:, : sizes[dist.get_rank()]] = torch.stack([part.double() for part in entries])
    parts = torch.cat([part[:, :size] for part, size in zip(gather(padded, ranks, None), sizes, strict=True)], dim=1)
    whole = Entries(*(row.to(part.dtype) for row, part in zip(parts, entries, strict=True)))
    order = torch.argsort(whole.steps, stable=True)
    return Entries(*(part[order] for part in whole)), any(header[3] for header in headers)


def meeting_device(held: torch.device) -> torch.device:
    """Return the device for collectives: ``held``, or this rank's GPU if tensors on the CPU cannot be sent."""
    if held.type == "cpu" and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return held
