"""Write a log as a Parquet file, and read it: the table, with the history as metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchtrim._checks import check_count, describe, import_extra
from batchtrim.keeplog.columns import COLUMNS, unread
from batchtrim.keeplog.state import STATE_VERSION

if TYPE_CHECKING:
    from batchtrim.keeplog.log import KeepLog

__all__ = ["read", "write"]

_READ = {*COLUMNS, "variance"} - {"m2"}


def write(log: KeepLog, path: str | Path, columns: dict[str, Any]) -> None:
    """Write the log's table, more ``columns`` of n values, and its history."""
    arrow = import_extra("pyarrow", "lab", "KeepLog.to_parquet")
    parquet = import_extra("pyarrow.parquet", "lab", "KeepLog.to_parquet")
    table = {"id": torch.arange(log.n, device="cpu"), **log.table()}
    arrays = {name: column.numpy() for name, column in table.items()}
    for name, values in columns.items():
        if name in table:
            raise ValueError(f"expected `columns` of other names than the log's own, got {name!r}.")
        if not hasattr(values, "__len__") or len(values) != log.n or getattr(values, "ndim", 1) != 1:
            raise ValueError(f"expected column {name!r} of {log.n} values, one per sample, got {describe(values)}.")
        arrays[name] = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    known = {"version": STATE_VERSION, "classes": log.classes, "steps": log.steps, "history": log.history}
    known["epoch"] = log._epoch.tolist()  # those of the unfinished epoch
    built = arrow.table(arrays)
    parquet.write_table(built.replace_schema_metadata({"batchtrim": json.dumps(known)}), path)


def read(kind: type[KeepLog], path: str | Path) -> KeepLog:
    """Read what :func:`write` wrote, except for added columns."""
    parquet = import_extra("pyarrow.parquet", "lab", "KeepLog.from_parquet")
    try:
        found = parquet.read_table(path)
        known = json.loads(found.schema.metadata[b"batchtrim"])
        log = kind(found.num_rows, classes=known["classes"])
        log.steps = check_count("steps", known["steps"], minimum=0)
        log.history = [dict(line) for line in known["history"]]
        log._epoch = log._epoch.new_tensor(known.get("epoch", log._epoch.tolist())).reshape(log._epoch.shape)
        table = {name: torch.from_numpy(found[name].to_numpy().copy()) for name in _READ}
        log._columns = unread(table, log._columns)
    except FileNotFoundError:
        raise
    except Exception as error:  # the error of a damaged file depends on where it is damaged
        raise ValueError(
            f"expected a file that KeepLog.to_parquet wrote, got {str(path)!r} ({type(error).__name__}: {error})."
        ) from error
    return log
