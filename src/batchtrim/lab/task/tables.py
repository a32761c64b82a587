"""CSV and Parquet tables with an image and a label in each row. Images of Parquet files are read when decoded."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchtrim._checks import describe

__all__ = ["SUFFIXES", "Table", "check_labels", "column", "read"]

SUFFIXES = (".csv", ".parquet")
IMAGE_COLUMNS = ("image", "img", "path", "file", "file_name", "filename")
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label", "coarse_label")
MISSING = ("", "nan", "null", "na", "n/a", "none")  # what other programs write for a missing number


@dataclass
class Table:
    """The columns that matter.

    Attributes:
        image, label: their names. labels: one a row. images: of a CSV table; None where they are read when decoded.
        groups, split: one a row, where asked for and where there. class_names: those that the hub's files carry.
    """

    image: str
    label: str
    labels: list[Any]
    images: list[str] | None = None
    groups: list[Any] | None = None
    split: list[Any] | None = None
    class_names: list[str] | None = None


def read(path: Path, columns: dict[str, str | None]) -> Table:
    """Return a table; ``columns`` holds the names asked for, by "image", "label" and "group".

    Raises:
        ValueError: the file cannot be read, or has no such columns, or two of one name.
    """
    import pyarrow

    try:
        return (_csv if path.suffix.lower() == ".csv" else _parquet)(path, columns)
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} to be text in UTF-8, got other bytes ({error.reason}).") from error
    except (pyarrow.ArrowException, OSError) as error:
        text = (str(error).splitlines() or [""])[0][:160]
        raise ValueError(
            f"expected {path} to be a table that can be read, got {type(error).__name__}: {text}."
        ) from error


def _csv(path: Path, columns: dict[str, str | None]) -> Table:
    """Read every cell as it is written: 007 is a name, and NA a country."""
    import pyarrow.csv

    with path.open(encoding="utf-8-sig", newline="") as file:
        head = file.readline()
    delimiter = max(",;\t", key=head.count)
    names = [each.strip() for each in next(csv.reader([head], delimiter=delimiter), [])]
    image, label, group = _names(names, columns, path)
    kinds = dict.fromkeys(names, pyarrow.string())
    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=1),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=kinds, strings_can_be_null=False),
    )

    def values(name: str | None) -> list[str] | None:
        return None if name is None else table.column(name).to_pylist()

    split = "split" if "split" in names else None
    return Table(image, label, _classes(values(label) or []), values(image), values(group), values(split))


def _parquet(path: Path, columns: dict[str, str | None]) -> Table:
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(path)
    image, label, group = _names(schema.names, columns, path)
    wanted = list(dict.fromkeys(each for each in (label, group, "split") if each in schema.names))
    table = pyarrow.parquet.read_table(path, columns=wanted)

    def values(name: str | None) -> list[Any] | None:
        return table.column(name).to_pylist() if name in wanted else None

    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = told.get("info", {}).get("features", {}).get(label, {})
    names = feature.get("names") if isinstance(feature, dict) else None
    return Table(image, label, values(label) or [], None, values(group), values("split"), names)


def _names(there: Sequence[str], columns: dict[str, str | None], path: Path) -> tuple[str, str, str | None]:
    """Return the names of the image, label and group columns."""
    image, label = (column(there, what, columns[what], path) for what in ("image", "label"))
    return image, label, None if columns["group"] is None else column(there, "group", columns["group"], path)


def column(there: Sequence[str], what: str, asked: str | None, path: Path) -> str:
    """Return the name of a column: the one asked for, or the usual one."""
    listed = ", ".join(there) or "none"
    if asked is None:
        usual = IMAGE_COLUMNS if what == "image" else LABEL_COLUMNS
        found = [name for name in usual if name in there]
        if len(found) != 1:
            got = " and ".join(found) or listed
            raise ValueError(f"expected one {what} column in {path}, got {got}. Say which: --{what}-column NAME.")
        asked = found[0]
    elif asked not in there:
        raise ValueError(f"expected `{what}` column {asked!r} in {path}, got {listed}.")
    if list(there).count(asked) > 1:
        raise ValueError(f"expected one {what} column {asked!r} in {path}, got {listed}. Name them apart.")
    return asked


def _classes(values: list[str]) -> list[Any]:
    """Return a CSV column's labels: whole numbers where all are, names as they are written otherwise.

    Among numbers, an empty cell, or what programs write for one, is None.
    """
    numbers = {each: _number(each) for each in set(values) if each.strip().lower() not in MISSING}
    if None in numbers.values():
        return values
    found: dict[str, Any] = {each: each for each in numbers}
    if any(not each.is_integer() for each in numbers.values() if each is not None):
        found = numbers  # which check_labels refuses
    elif all(each.isascii() and each.lstrip("-").isdigit() and each == str(int(each)) for each in numbers):
        found = {each: int(each) for each in numbers}
    return [found.get(each) for each in values]


def _number(text: str) -> float | None:
    try:
        return None if "_" in text else float(text)  # which Python reads as 1_000
    except ValueError:
        return None


def check_labels(values: Sequence[Any], name: str, path: Path) -> None:
    """Refuse labels that are missing, or no classes."""
    missing = [
        row for row, value in enumerate(values) if value is None or (isinstance(value, str) and not value.strip())
    ]
    if missing:
        raise ValueError(
            f"expected a label in every row of {path}, got none in row {missing[0]} of column {name!r} "
            f"({len(missing)} such rows)."
        )
    wrong = next((each for each in values if isinstance(each, float) and not each.is_integer()), None)
    if wrong is not None or not all(isinstance(each, str | int | float) for each in values[:1]):
        raise ValueError(
            f"expected classes in column {name!r} of {path}, got {describe(values[0] if wrong is None else wrong)}. "
            "The lab's own loop classifies; for other targets write a training function: batchtrim compare --task."
        )
