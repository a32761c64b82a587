"""Trimming in an existing trainer: Lightning, Hugging Face Trainer, Accelerate. Each needs its own extra.

A trainer knows how long training is, its current epoch or step, and when it logs and saves. The code that all
integrations share is here; it imports no trainer.

A model's ``forward`` or a module's ``training_step`` returns one number. Where its un-reduced losses are found:

1. ``_recorder.py`` records the loss functions that the code calls, ``_contributions.py`` what each call contributes.
2. ``_sample_rows.py`` assigns losses to samples, ``_terms.py`` merges the terms of a sum.
3. ``_loss_finder.py`` puts this together, and checks that the losses add up to the number.

``TrimmedTrainer`` (``transformers.py``) gets its loss from ``_trainer_loss.py``: ``_model_losses.py`` has the losses of
a batch, ``_labels.py`` its labels and weight, ``_row_numbers.py`` its rows for the keep log, ``_trainer_state.py`` the
checkpoint. With an engine, ``_engine_step.py`` runs a micro-batch; the model's loss must then have a standard form
(``_forms.py``, found by ``_form_search.py`` and kept in ``_form_table.py``). ``_lightning_*.py`` are parts of
``lightning.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from batchtrim._checks import check_choice
from batchtrim.clock import LENGTHS
from batchtrim.errors import ChooseLength
from batchtrim.schedules import as_schedule
from batchtrim.trimmer import Trimmer

__all__ = ["log_values"]

CLOCKS = ("epoch", "step")


def build(keep: Callable[[float], float] | float, total: int | None, options: Mapping[str, Any]) -> Trimmer:
    """Return a trimmer whose clock the trainer drives."""
    for name in ("keep", "total"):
        if name in options:
            raise TypeError(
                f"expected options of the trimmer besides `keep` and `total`, got {name!r} among them. The trainer "
                "knows the length of training, and takes `keep` by itself."
            )
    if total is None and getattr(schedule := as_schedule(keep), "needs_total", True):
        raise ValueError(
            f"expected `total`, the length of training, to be known for {schedule!r}, got None (max_epochs=-1, a data "
            "set without a length). Set max_steps and count steps (clock='step'), or pass a constant keep."
        )
    trim = Trimmer(keep, total=total, **options)
    if getattr(trim.schedule, "reads", "progress") == "accuracy":
        raise ValueError(
            f"expected `keep` to be a schedule of progress, got {trim.schedule!r}. A trainer does not know the "
            "training accuracy: "
            "make the Trimmer yourself, call it in your loss and step it with trim.step(accuracy=...)."
        )
    return trim


def total_of(clock: str, epochs: float | None, steps: float | None) -> int | None:
    """Return the total of a trimmer's clock; None if the trainer does not know it."""
    total = {"epoch": epochs, "step": steps}[check_choice("clock", clock, CLOCKS)]
    if total == 0:  # no training, of which any schedule is right
        return 1
    return None if total is None or total < 0 or math.isinf(total) else math.ceil(total)


def check_resume_length(length: Any) -> str | None:
    """Check the argument that says how to resume from a checkpoint of another length, before one is loaded."""
    return None if length is None else check_choice("resume_length", length, LENGTHS)


def follow(trim: Trimmer, now: int) -> None:
    """Set the clock to the trainer's, which the trainer restores in a resumed run."""
    if now > trim.steps:
        trim.step(now - trim.steps)


def put(trim: Trimmer, now: int, total: int) -> None:
    """Set the clock and its total, for a trainer that learns the length of training only during the run."""
    trim._clock.steps, trim._clock.total = now, total
    trim.step(0)


def log_values(trim: Trimmer, mean: Callable[[Tensor], Any] | None = None) -> dict[str, float]:
    """Return the statistics since the last call, for a logger; an empty dict if there was no batch. Syncs the device.

    Args:
        mean: returns the mean of a vector over the ranks. Every rank calls it, whether it has seen batches or not.

    Returns:
        trim/keep: current keep fraction. trim/kept: samples (or tokens) kept, mean over batches. trim/threshold:
        smallest kept loss. trim/kept_loss, trim/mean_loss: mean over kept and over all samples. trim/ratio: of the two.
    """
    found = trim.stats.compute()
    trim.stats.reset()
    values = {"keep": trim.keep, "kept": found["kept"] / max(1, found["batches"])}
    values |= {name: found[name] for name in ("threshold", "kept_loss", "mean_loss", "ratio")}
    row = [1.0, *values.values()] if found["batches"] else [0.0] * (1 + len(values))
    if mean is not None:
        row = mean(torch.tensor(row, dtype=torch.float64, device="cpu")).tolist()
    return {f"trim/{name}": value / row[0] for name, value in zip(values, row[1:], strict=True)} if row[0] else {}


def summed(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of statistics of two parts of training together; arguments as of ``KeepStats.state_dict``."""
    sums = [each["sums"] for each in (one, other) if each["sums"] is not None]
    return {
        **{name: one[name] + other[name] for name in one if name != "sums"},
        "sums": torch.stack(sums).sum(0) if sums else None,
    }


def load_state(trim: Trimmer, state: dict[str, Any], length: str | None, taken_by: str, unit: str) -> None:
    """Continue from ``state``. ``taken_by`` has the argument ``resume_length``; ``unit`` is what the clock counts.

    Raises:
        ChooseLength: the state is from a training of another length, and ``length`` is None.
    """
    try:
        trim.load_state_dict(state, length=length)
    except ChooseLength as error:
        raise ChooseLength(
            f"expected to continue a training with total={trim.total} {unit}s, got one with total={state['total']}. "
            f"Progress would jump. Choose one: {taken_by}(resume_length='stretch') stretches the schedule over "
            "this training, with one jump; resume_length='saved' keeps the saved total and stays at the "
            "schedule's end beyond it."
        ) from error
