"""Write, read and check a line of runs.jsonl; a damaged one is an error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batchtrim._checks import describe, is_finite
from batchtrim.lab.metric import Metric

SCHEMA = 1
DONE = ("finished", "diverged")
STATUSES = (*DONE, "failed")
COSTS = ("seconds", "seconds_eval", "samples_forward", "samples_backward", "steps")
# Keys name files (checkpoints, keep logs), so a key from an untrusted file must not point outside the folder.
_KEY = re.compile(r"[0-9A-Za-z_-]{1,64}")

Row = dict[str, Any]


class ReplaceRecords(ValueError):
    """A line of the record file is damaged; the message names the line."""


def line_of(row: Mapping[str, Any]) -> bytes:
    """Return the line of a run, with its newline; curves are rounded to six significant digits."""
    short = {**row, "curve": _six_figures(row["curve"])} if "curve" in row else row
    return (json.dumps(_for_json(short), allow_nan=False, separators=(",", ":")) + "\n").encode()


def parse_row(line: bytes, path: Path, number: int) -> Row:
    """Return the run on a line; ``path`` and ``number`` name the line in an error."""
    try:
        row = json.loads(line)
        schema, _ = row["schema"], (row["config"]["method"], row["status"])
        if not _KEY.fullmatch(row["key"]):
            raise ValueError("no key that this package makes")
    except (ValueError, KeyError, TypeError) as error:
        start = line[:60].decode(errors="replace")
        raise ReplaceRecords(
            f"expected a run on each line of {path}, got {start!r} on line {number}. The file was edited by hand or is "
            "damaged: remove that line, and its run is repeated."
        ) from error
    if schema != SCHEMA:
        raise ReplaceRecords(
            f"expected rows of schema {SCHEMA} in {path}, line {number}, got {schema}. "
            "Another release of batchtrim made it."
        )
    return row


def whole_lines(text: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield each line with its number from 1, but for blank ones, which editors leave.

    The last counts without a newline too, if a whole run stands there.
    """
    *ended, rest = text.split(b"\n")
    yield from ((number, line) for number, line in enumerate(ended, 1) if line.strip())
    if rest and is_whole(rest):
        yield len(ended) + 1, rest


def is_whole(rest: bytes) -> bool:
    """True if the bytes are a run that only lacks its newline."""
    try:
        return isinstance(json.loads(rest), dict)
    except ValueError:
        return False


def check_result(row: Mapping[str, Any], place: str) -> None:
    """Refuse a row that lacks a field that a comparison needs; ``place`` names the row in the error."""
    config = row.get("config")
    finished = row.get("status") == "finished"
    wrong = None
    if not isinstance(config, Mapping) or not isinstance(config.get("method"), str):
        wrong = "config.method", "a name", None
    elif not isinstance(row.get("key"), str):
        wrong = "key", "a name", row.get("key")
    elif not isinstance(config.get("seed"), int) or isinstance(config["seed"], bool):
        wrong = "config.seed", "a whole number", config.get("seed")
    elif row.get("status") not in STATUSES:
        wrong = "status", f"one of {', '.join(STATUSES)}", row.get("status")
    elif finished:
        wrong = _wrong_number(row, config)
    for name in ("curve", "environment"):
        if wrong is None and not isinstance(row.get(name) or {}, Mapping):
            wrong = name, "a table", row[name]
    notes = row.get("notes") or []
    if wrong is None and not (isinstance(notes, list) and all(isinstance(each, str) for each in notes)):
        wrong = "notes", "a list of texts", notes
    if wrong is not None:
        name, needed, got = wrong
        raise ReplaceRecords(
            f"expected the records to be as batchtrim writes them, with `{name}` {needed}, "
            f"got {describe(got) if got is not None else 'none'} in {place}. "
            "Remove that line, and the command that made it repeats its run."
        )


def _wrong_number(row: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    """Return the field that a finished run lacks, and what it has to be; other programs' costs may be unknown."""
    metric = Metric.of(config)
    value = row.get(metric.field)
    if metric.in_percent and not (is_finite(value) and 0 <= value <= 1):
        return metric.field, "a number in [0, 1]", value
    if not is_finite(value):
        return metric.field, "a number", value
    named = {name: row.get(name) for name in COSTS if "metric" not in config or row.get(name) is not None}
    return next(((name, "a number", cost) for name, cost in named.items() if not is_finite(cost)), None)


def _for_json(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _for_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(each) for each in value]
    return value


def _six_figures(value: Any) -> Any:
    """Round to six significant digits: a long run is mostly curves, which need no more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _six_figures(each) for name, each in value.items()}
    return [_six_figures(each) for each in value] if isinstance(value, list | tuple) else value
