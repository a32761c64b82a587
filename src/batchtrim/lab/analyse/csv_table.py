"""Read another program's results as records: a CSV table with a method, a seed and a number in each row."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from batchtrim._checks import describe, nearest
from batchtrim.lab.metric import FRACTIONS, Metric
from batchtrim.lab.records import COSTS, SCHEMA, Row
from batchtrim.lab.task.names import similar_names

__all__ = ["read_csv", "to_records"]

KNOWN = ("method", "seed")
TIMES = ("time", "seconds")
SEPARATOR = re.compile(r"\s*\"?sep=([,;\t])\"?[,;\t ]*\n\s*")
"""A first line that tells Excel how columns are separated."""
MOST_NAMED, LONGEST_NAME = 12, 40  # in a message: the most columns, and characters of each


def read_csv(path: str | Path, metric: str | None = None, higher_is_better: bool | None = None) -> list[Row]:
    """Return the runs of a CSV file with columns method, seed, a number and, if known, time in seconds.

    Args:
        metric: the column to compare; by default the only other one.
        higher_is_better: needed if the column's name does not imply it.

    Raises:
        FileNotFoundError, ValueError, TypeError: there is no such file, or a line cannot be read; the message names it.
    """
    path = Path(path)
    if path.suffix == ".jsonl" or path.is_dir():
        raise ValueError(f"expected a CSV file, got {path}. The report on runs of the lab: batchtrim report FOLDER")
    text = _text(path)
    named = SEPARATOR.match(text)
    begin = named.end() if named else len(text) - len(text.lstrip())
    blank = text.count("\n", 0, begin)
    first = text[begin:].partition("\n")[0]
    delimiter = named[1] if named else max(",;\t", key=first.count)
    lines = io.StringIO(text[begin:], newline="")
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    names = [(name or "").strip() for name in reader.fieldnames or []]
    doubled = [name for name in names if name and names.count(name) > 1]
    if doubled:
        raise ValueError(f"expected columns of different names in {path}, got {doubled[0]!r} twice.")
    if names:
        _check_known(names, str(path))
    reader.fieldnames = names
    rows, places = [], []
    try:
        for row in reader:
            line = reader.line_num + blank
            if None in row or any(value is None for value in row.values()):
                raise ValueError(f"expected {len(names)} columns in line {line} of {path}, got another number.")
            if any(value.strip() for value in row.values()):  # spreadsheets write empty rows at the end
                rows.append({name: value for name, value in row.items() if name})
                places.append(f"line {line}")
    except csv.Error as error:
        at = reader.line_num + blank
        raise ValueError(f"expected {path} to be CSV, got {error} in line {at}.") from error
    return to_records(rows, str(path), metric, higher_is_better, places)


def _text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a mark, which Excel writes as "Unicode text"."""
    try:
        data = path.read_bytes()
        marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"expected a CSV file {path}, got nothing there.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected {path} to be text in UTF-8, got other bytes ({error.reason}). Save it as CSV in UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def to_records(
    rows: Sequence[Mapping[str, Any]],
    where: str,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    places: Sequence[str] | None = None,
) -> list[Row]:
    """Convert the rows of a table to rows of ``runs.jsonl``; see :func:`read_csv`.

    Args:
        where: the table's name, for messages and the title.
        places: of the rows in it, for messages.
    """
    if not rows:
        raise ValueError(f"expected at least one run in {where}, got none.")
    names = list(rows[0])
    name = _metric_column(names, metric, where)
    found_metric = Metric.called(name, higher_is_better)
    time = next((each for each in TIMES if each in names and each != name), None)
    found: dict[tuple[str, int], Row] = {}
    for place, row in zip(places or [f"row {number}" for number in range(1, len(rows) + 1)], rows, strict=True):
        record = _record(row, place, where, found_metric, time)
        at = record["config"]["method"], record["config"]["seed"]
        if at in found:
            raise ValueError(
                f"expected one run of a method and seed in {where}, got {at[0]!r} with seed {at[1]} again in {place}. "
                "If they differ in a setting, give the methods different names; otherwise average the two."
            )
        found[at] = record
    notes = _pooled(rows, [each for each in names if each not in (*KNOWN, *TIMES, name)])
    notes += _of_two_units(found_metric, found.values())
    notes += similar_names(list(dict.fromkeys(method for method, _ in found)), "methods")
    return [{**record, "notes": notes} if notes else record for record in found.values()]


def _pooled(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Return a note on each column of words that tells runs of a method apart, such as a data set, and is not used."""
    found = []
    for column in columns:
        values: dict[str, list[str]] = {}
        for row in rows:
            if isinstance(row.get(column), str) and not _is_number(row[column]):
                values.setdefault(str(row.get("method")), []).append(row[column].strip())
        if any(1 < len(set(each)) < len(each) for each in values.values()):
            several = list(dict.fromkeys(value for each in values.values() for value in each))
            listed = ", ".join(several[:4]) + (", ..." if len(several) > 4 else "")
            found.append(f"the column {column} is not used: runs of {listed} are compared as one")
    return found


def _of_two_units(metric: Metric, records: Iterable[Row]) -> list[str]:
    """Return a note if all runs of some methods are fractions and all runs of others are more than 1, as percent is."""
    largest: dict[str, list[float]] = {}
    for record in records:
        if record[metric.field] is not None:
            largest.setdefault(record["config"]["method"], []).append(record[metric.field])
    fractions = [method for method, values in largest.items() if min(values) > 0.0 and max(values) <= 1.0]
    others = [method for method, values in largest.items() if min(values) > 1.0]
    if metric.name.lower() not in FRACTIONS or not fractions or not others:
        return []
    return [
        f"every {metric.name} of {fractions[0]} is at most 1 and every one of {others[0]} is more: give all of them as "
        "fractions or all in percent"
    ]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text.strip()
    return True


def _check_known(names: Sequence[str], where: str, wanted: Sequence[str] = KNOWN) -> None:
    listed = ", ".join(name[:LONGEST_NAME] for name in names[:MOST_NAMED]) or "none"
    listed += f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    for name in wanted:
        if name not in names:
            hint = "" if name in KNOWN else nearest(name, names)
            if Path(where).name == "report.csv":
                hint = f" Is it a report of batchtrim's own? Its runs: batchtrim report {Path(where).parent}"
            raise ValueError(f"expected a column {name!r} in {where}, got {listed}.{hint}")


def _metric_column(names: Sequence[str], metric: str | None, where: str) -> str:
    _check_known(names, where)
    if metric is not None:
        _check_known(names, where, [metric])
        return metric
    others = [name for name in names if name not in (*KNOWN, *TIMES)]
    if len(others) != 1:
        cure = "metric=NAME" if where == "rows" else "--metric NAME"
        raise ValueError(
            f"expected one column of numbers to compare in {where} besides method, seed and time, got "
            f"{', '.join(others) or 'none'}. Name it with {cure}."
        )
    return others[0]


def _record(row: Mapping[str, Any], place: str, where: str, metric: Metric, time: str | None) -> Row:
    method = str(row["method"] if row.get("method") is not None else "").strip()
    if not method:
        raise ValueError(f"expected a method in {place} of {where}, got nothing.")
    seed = _seed(row.get("seed"), place, where)
    value = _number(metric.name, row.get(metric.name), place, where)
    if value is not None and metric.in_percent and math.isfinite(value) and not 0.0 <= value <= 1.0:
        raise ValueError(
            f"expected `{metric.name}` in [0, 1] in {place} of {where}, got {value:g}. It is a fraction: divide by 100 "
            "if it is in percent, or give the column another name."
        )
    status = "failed" if value is None else "finished" if math.isfinite(value) else "diverged"
    seconds = _number(time, row.get(time), place, where) if time else None
    if seconds is not None and seconds < 0.0:
        raise ValueError(f"expected `{time}` to be at least 0 seconds in {place} of {where}, got {seconds:g}.")
    settings = {"dataset": Path(where).name, "method": method, "seed": seed}
    settings |= {"metric": metric.name, "higher_is_better": metric.higher_is_better}
    return {
        "schema": SCHEMA,
        "key": hashlib.sha256(f"{method}\n{seed}".encode()).hexdigest()[:12],
        "config": settings,
        "status": status,
        metric.field: value if status == "finished" else None,
        **dict.fromkeys(COSTS),
        "seconds": seconds if seconds is None or math.isfinite(seconds) else None,
        "curve": {},
    }


def _seed(value: Any, place: str, where: str) -> int:
    if isinstance(value, numbers.Integral):  # seeds of 64 bits are no floats
        return int(value)
    try:
        number = _float(value)
        if number != int(number):
            raise ValueError
        return int(value) if isinstance(value, str) and value.strip().lstrip("-").isdigit() else int(number)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"expected `seed` to be a whole number in {place} of {where}, got {describe(value)}. It pairs the runs of "
            "the methods: number the runs if there were no seeds."
        ) from None


def _number(name: str | None, value: Any, place: str, where: str) -> float | None:
    """Return a number, or None for an empty cell."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool):
        raise TypeError(f"expected `{name}` to be a number in {place} of {where}, got {value}.")
    try:
        return _float(value)
    except (ValueError, TypeError):
        hint = " Use a decimal point." if isinstance(value, str) and "," in value else ""
        raise ValueError(
            f"expected `{name}` to be a number in {place} of {where}, got {describe(value)}.{hint}"
        ) from None


def _float(value: Any) -> float:
    if isinstance(value, str) and "_" in value:  # Python reads 1_000 as a number
        raise ValueError(value)
    return float(value)
