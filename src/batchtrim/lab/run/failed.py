"""The row of a run that ended in an exception, with every field that a finished run has."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from batchtrim.lab.records import SCHEMA
from batchtrim.lab.run.counts import Counts
from batchtrim.lab.run.environment import environment
from batchtrim.lab.run.task_config import AnyConfig
from batchtrim.lab.task.code import YourCodeFailed

__all__ = ["CURVES", "error_line", "failed_row"]

LONGEST = 500

CURVES = (
    "epoch", "test_error", "train_error", "keep", "kept_loss", "mean_loss", "lr", "seconds", "samples_backward",
)  # fmt: skip


def error_line(error: BaseException) -> str:
    """Return an error as one line, cut off where it is too long; one in the user's code keeps its traceback."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # an error of the user's own, whose text raises another
        text = f"{type(error).__name__} without a text that can be read"
    return (text if isinstance(error, YourCodeFailed) else " ".join(text.split()))[:LONGEST]


def failed_row(config: AnyConfig, error: BaseException) -> dict[str, Any]:
    """Return the row; the run is tried again when the same command is given again."""
    return {
        "schema": SCHEMA,
        "key": config.key,
        "config": config.to_dict(),
        "status": "failed",
        "error": error_line(error),
        "test_error": None,
        **vars(Counts()),
        "params": None,
        "curve": {name: [] for name in CURVES},
        "environment": environment(config),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
