"""The state of a log, for a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchtrim._checks import check_count, check_state, describe
from batchtrim.keeplog.batch import Entries
from batchtrim.keeplog.columns import COLUMNS, INT16_CLASSES

if TYPE_CHECKING:
    from batchtrim.keeplog.log import KeepLog

__all__ = ["STATE_VERSION", "load", "save"]

STATE_VERSION = 2
_SAVED = {"predicted": torch.int32}  # room for any number of classes


def save(log: KeepLog) -> dict[str, Any]:
    """Return the whole state: tensors, numbers and strings only.

    Of one size, every state has the same entries of the same shapes: what varies is in tuples, which
    torch.distributed.checkpoint stores whole.
    """
    columns = log._columns.items()
    return {
        "version": STATE_VERSION,
        "n": log.n,
        "classes": log.classes,
        "steps": log.steps,
        "columns": {name: column.to("cpu", _SAVED.get(name, column.dtype), copy=True) for name, column in columns},
        "pending": tuple(tuple(part.cpu() for part in batch) for batch in log._pending),
        "epoch": log._epoch.to("cpu", copy=True),
        "history": tuple(dict(line) for line in log.history),
        "warned": log._warned,
    }


def load(log: KeepLog, state: Any) -> None:
    """Load a state that :func:`save` returned into a log of the same size."""
    check_state(state, ("version",), "a KeepLog")
    if state["version"] != STATE_VERSION:
        raise ValueError(
            f"expected `state` of version {STATE_VERSION}, got {state['version']}. Another batchtrim saved it."
        )
    names = ("n", "classes", "steps", "columns", "pending", "epoch", "history", "warned")
    check_state(state, names, "a KeepLog")
    check_state(state["columns"], COLUMNS, "a KeepLog's columns")
    for name in ("n", "classes"):
        if state[name] != getattr(log, name):
            raise ValueError(
                f"expected `state` of a log with {name}={getattr(log, name)}, got {name}={state[name]}. "
                "Make the log with the saved number."
            )
    _check_shapes(log, {**{name: state["columns"][name] for name in COLUMNS}, "epoch": state["epoch"]})
    try:
        pending = [Entries(*batch) for batch in state["pending"]]
        sizes = [{len(part) for part in batch} for batch in pending]
        history = [dict(line) for line in state["history"]]
        if any(len(each) != 1 for each in sizes):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            "expected `state` to hold batches and a history of a KeepLog, got something else. It is damaged."
        ) from None
    log.steps = check_count("state['steps']", state["steps"], minimum=0)
    log._pending, log.history = pending, history
    log._entries = sum(len(batch.rows) for batch in pending)
    predicted = [state["columns"]["predicted"], *(batch.predicted for batch in pending)]
    log._wide = any(len(each) > 0 and int(each.max()) >= INT16_CLASSES for each in predicted)
    log._columns = {name: state["columns"][name].clone() for name in COLUMNS}
    if not log._wide:
        log._columns["predicted"] = log._columns["predicted"].to(COLUMNS["predicted"][0])
    log._epoch = state["epoch"].clone()
    log._warned = bool(state["warned"])


def _check_shapes(log: KeepLog, found: dict[str, Any]) -> None:
    expected = {**log._columns, "epoch": log._epoch}
    for name, value in found.items():
        wanted = expected[name]
        known = (wanted.dtype, torch.int32) if name == "predicted" else (wanted.dtype,)  # int32: many classes
        if not isinstance(value, Tensor) or value.shape != wanted.shape or value.dtype not in known:
            raise ValueError(
                f"expected `state` to hold '{name}' of shape {tuple(wanted.shape)} and dtype {wanted.dtype}, got "
                f"{describe(value)}. It was saved by something else, or is damaged."
            )
