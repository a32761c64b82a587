"""The row of a run that ended in an exception, with every field that a finished run has."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from batchtrim.lab.records import SCHEMA
from batchtrim.lab.run.counts import Counts
from batchtrim.lab.run.environment import environment
from batchtrim.lab.run.task_config import AnyConfig
from batchtrim.lab.task.own_code import YourCodeFailed

__all__ = ["CURVES", "error_line", "failed_row"]

LONGEST = 500

CURVES = (
    "epoch", "test_error", "train_error", "keep", "kept_loss", "mean_loss", "lr", "seconds", "samples_backward",
)  # fmt: skip


def error_line(error: BaseException) -> str:
    """Return an error as one line, truncated if too long; an error in the user's code keeps its traceback."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # a user's error whose text raises another error
        text = f"{type(error).__name__} without a text that can be read"
    return (text if isinstance(error, YourCodeFailed) else " ".join(text.split()))[:LONGEST]


def failed_row(config: AnyConfig, error: BaseException) -> dict[str, Any]:
    """Return the row of the failed run; repeating the command retries it."""
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
