"""Accelerate: the trimmer in the checkpoint, and its numbers in the trackers. The loop itself is plain.

::

    trim = register(accelerator, batchtrim.Trimmer(batchtrim.linear(1.0, 0.2), total=epochs))
    ...
    with accelerator.accumulate(model):
        loss = trim(F.cross_entropy(model(x), y, reduction="none"))
        accelerator.backward(loss)

``accelerator.backward`` divides by the accumulation steps and DDP averages over ranks: each micro-batch is trimmed
by itself. To trim a whole window, leave ``gradient_accumulation_steps`` at 1 and use :func:`batchtrim.accumulate`. With
``even_batches``, Accelerate's default, the last batch of an epoch is filled up with samples from the first.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

from batchtrim._checks import describe, import_extra
from batchtrim.integrations import log_values
from batchtrim.trimmer import Trimmer

import_extra("accelerate", "accelerate", "the Accelerate integration")

from accelerate import Accelerator  # noqa: E402

__all__ = ["log", "register"]

_TOLD: WeakSet[Trimmer] = WeakSet()  # trimmers whose user was told that the clock stands still


def register(accelerator: Accelerator, trim: Trimmer) -> Trimmer:
    """Save and restore ``trim`` with ``accelerator.save_state`` and ``load_state``; return it.

    The state saved is that of the main process.
    """
    _check_arguments(accelerator, trim)
    accelerator.register_for_checkpointing(trim)
    trim.divided_by = accelerator.gradient_accumulation_steps
    return trim


def log(accelerator: Accelerator, trim: Trimmer, step: int | None = None) -> dict[str, float]:
    """Log what was kept since the last call, averaged over ranks, with ``accelerator.log``. Every rank must call it.

    Returns:
        What was logged; see :func:`batchtrim.integrations.log_values`.

    Warns:
        UserWarning: once, if a prepared loader has run two epochs and ``trim`` was never stepped.
    """
    _check_arguments(accelerator, trim)
    _check_clock(accelerator, trim)
    values = log_values(trim, lambda numbers: accelerator.reduce(numbers.to(accelerator.device), reduction="mean"))
    accelerator.log(values, step=step)
    return values


def _check_arguments(accelerator: Any, trim: Any) -> None:
    for name, value, kind in (("accelerator", accelerator, Accelerator), ("trim", trim, Trimmer)):
        if not isinstance(value, kind):
            raise TypeError(
                f"expected `{name}` to be the {kind.__name__}, got {describe(value)}. The order is (accelerator, trim)."
            )


def _check_clock(accelerator: Accelerator, trim: Trimmer) -> None:
    # a prepared loader counts its epochs
    epochs = max((getattr(loader, "iteration", 0) for loader in accelerator._dataloaders), default=0)
    if trim.total is None or trim.steps or epochs < 2 or trim in _TOLD:
        return
    _TOLD.add(trim)
    warnings.warn(
        f"expected trim.step() to be called, once an epoch or a batch as total={trim.total} counts, got no call in "
        f"{epochs} epochs. The keep fraction is still {trim.keep:.4g}.",
        stacklevel=3,
    )
