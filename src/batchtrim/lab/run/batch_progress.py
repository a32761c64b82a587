"""Report progress within an epoch: the first batch at once, then every half second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

# Called after each epoch with the last point of the curves and `epochs`, their total number.
OnEpoch = Callable[[dict[str, Any]], None]

EVERY = 0.5


def batch_progress(tell: OnEpoch, epochs: int) -> Callable[[int, int, int], None]:
    """Return a function to call after every batch with the epoch, the batch and the number of batches in the epoch."""
    told = -EVERY

    def after(epoch: int, batch: int, batches: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= EVERY:
            told = now
            tell({"epoch": epoch, "epochs": epochs, "batch": batch + 1, "batches": batches})

    return after
