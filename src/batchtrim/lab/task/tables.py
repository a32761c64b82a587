"""CSV and Parquet tables with an image and a label per row. Images in Parquet files are read when decoded."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchtrim._checks import describe, in_one_line

__all__ = ["SUFFIXES", "Table", "batches", "check_labels", "column", "content", "read", "rows_at_once"]

SUFFIXES = (".csv", ".parquet")
ROWS, ROWS_BYTES = 256, 2**25  # the most rows of images, and bytes, that are read at a time
IMAGE_COLUMNS = ("image", "img", "path", "file", "file_name", "filename")
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label", "coarse_label")
MISSING = ("", "nan", "null", "na", "n/a", "none")  # what other programs write for a missing number


@dataclass
class Table:
    """The columns that matter.

    Attributes:
        image, label: their names.
        labels: one per row.
        images: of a CSV table; None if they are read when decoded.
        files: paths of images that are beside the table, not in it.
        groups, split: one per row, if asked for and present.
        class_names: those in the hub's files.
    """

    image: str
    label: str
    labels: list[Any]
    images: list[str] | None = None
    files: list[str] = field(default_factory=list)
    groups: list[Any] | None = None
    split: list[Any] | None = None
    class_names: list[str] | None = None


def read(path: Path, columns: dict[str, str | None]) -> Table:
    """Return a table; ``columns`` has the requested names, by "image", "label" and "group".

    Raises:
        ValueError: the file cannot be read, lacks such a column, or has two of one name.
    """
    with _readable(path):
        return (_csv if path.suffix.lower() == ".csv" else _parquet)(path, columns)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the table in any error raised while it is read."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} to be text in UTF-8, got other bytes ({error.reason}).") from error
    except (pyarrow.ArrowException, csv.Error, OSError) as error:
        raise ValueError(f"expected {path} to be a table that can be read, got {in_one_line(error)}.") from error


def _csv(path: Path, columns: dict[str, str | None]) -> Table:
    """Read every cell as text: 007 is a name, and NA a country."""
    import pyarrow.csv

    with path.open(encoding="utf-8-sig", newline="") as file:
        head = next((line for line in file if line.strip()), "")
        delimiter = max(",;\t", key=head.count)
        file.seek(0)
        lines = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
        names = [each.strip() for each in next((line for line in lines if any(line)), [])]
    image, label, group, split = _names(names, columns, path)
    kinds = dict.fromkeys(names, pyarrow.string())
    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=lines.line_num),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=kinds, strings_can_be_null=False),
    )

    def values(name: str | None) -> list[str] | None:
        return None if name is None else table.column(name).to_pylist()

    files = values(image) or []
    return Table(image, label, _classes(values(label) or []), files, files, values(group), values(split))


def _parquet(path: Path, columns: dict[str, str | None]) -> Table:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        schema, counts = file.schema_arrow, file.metadata
    image, label, group, split = _names(schema.names, columns, path)
    wanted = list(dict.fromkeys(each for each in (label, group, split) if each in schema.names))
    table = pyarrow.parquet.read_table(path, columns=wanted)
    beside = _groups_with_paths(schema.field(image).type, counts, image)
    files = [each for cells in batches(path, image, beside) for each in map(content, cells) if isinstance(each, str)]

    def values(name: str | None) -> list[Any] | None:
        return table.column(name).to_pylist() if name in wanted else None

    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = told.get("info", {}).get("features", {}).get(label, {})
    names = feature.get("names") if isinstance(feature, dict) else None
    return Table(image, label, values(label) or [], None, files, values(group), values(split), names)


def _groups_with_paths(kind: Any, counts: Any, image: str) -> list[int]:
    """Return the row groups of a Parquet file in which images are, or may be, paths."""
    import pyarrow

    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        return []
    found = []
    for group in range(counts.num_row_groups):
        columns = [counts.row_group(group).column(i) for i in range(counts.num_columns)]
        held = next((each.statistics for each in columns if each.path_in_schema == f"{image}.bytes"), None)
        if held is None or held.null_count != 0:
            found.append(group)
    return found


def batches(path: Path, image: str, groups: Sequence[int] | None = None) -> Iterator[list[Any]]:
    """Yield the cells of a Parquet file's image column a few rows at a time, so that few are in memory.

    Args:
        groups: read only the row groups with these numbers. The pages of one row group are in memory at once.
    """
    import pyarrow.parquet

    with _readable(path), pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        wanted = range(file.metadata.num_row_groups) if groups is None else groups
        for group in wanted:
            told = file.metadata.row_group(group)
            rows = rows_at_once(told.total_byte_size, told.num_rows)
            for batch in file.iter_batches(rows, row_groups=[group], columns=[image]):
                yield batch.column(0).to_pylist()


def rows_at_once(size: int, rows: int) -> int:
    """Return how many rows of a table to read at a time, if ``rows`` rows have ``size`` bytes."""
    return max(1, min(ROWS, ROWS_BYTES * rows // max(1, size)))


def content(cell: Any) -> Any:
    """Return the bytes in an image's cell, or its path; the hub's mapping has either."""
    return cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell


def _names(there: Sequence[str], columns: dict[str, str | None], path: Path) -> tuple[str, str, str | None, str | None]:
    """Return the names of the columns of images and labels, and of groups and splits if there are any."""
    image, label = (column(there, what, columns[what], path) for what in ("image", "label"))
    split = next((name for name in there if name.casefold() == "split"), None)
    group, split = (
        None if asked is None else column(there, what, asked, path)
        for what, asked in (("group", columns["group"]), ("split", split))
    )
    return image, label, group, split


def column(there: Sequence[str], what: str, asked: str | None, path: Path) -> str:
    """Return the name of a column: the requested one, or the usual one."""
    listed = ", ".join(there) or "none"
    if asked is None:
        usual = IMAGE_COLUMNS if what == "image" else LABEL_COLUMNS
        found = [name for name in usual if name in there]
        if len(found) != 1:
            got = " and ".join(found) or listed
            hint = " Is the first line one of names?" if any("." in Path(each).suffix for each in there) else ""
            if what == "image" and not hint and not found:
                hint = " For texts or numbers write a training function: batchtrim compare --task."
            raise ValueError(
                f"expected one {what} column in {path}, got {got}. Name it with --{what}-column NAME.{hint}"
            )
        asked = found[0]
    elif asked not in there:
        raise ValueError(f"expected `{what}` column {asked!r} in {path}, got {listed}.")
    if list(there).count(asked) > 1:
        raise ValueError(f"expected one {what} column {asked!r} in {path}, got {listed}. Give them different names.")
    return asked


def _classes(values: list[str]) -> list[Any]:
    """Return a CSV column's labels: integers if all are, otherwise names as written.

    Among integers, an empty cell, or what programs write for one, is None.
    """
    numbers = {each: _number(each) for each in set(values) if each.strip().lower() not in MISSING}
    if None in numbers.values():
        return values
    found: dict[str, Any] = {each: each for each in numbers}
    if any(not each.is_integer() for each in numbers.values() if each is not None):
        found = numbers  # check_labels refuses it
    elif all(each.isascii() and each.lstrip("-").isdigit() and each == str(int(each)) for each in numbers):
        found = {each: int(each) for each in numbers}
    return [found.get(each) for each in values]


def _number(text: str) -> float | None:
    try:
        return None if "_" in text else float(text)  # Python reads 1_000 as a number
    except ValueError:
        return None


def check_present(values: Sequence[Any], what: str, name: str, path: Path) -> None:
    """Refuse a column in which cells are missing."""
    missing = [row for row, value in enumerate(values) if value is None or value != value or not str(value).strip()]
    if missing:
        rows = "1 such row" if len(missing) == 1 else f"{len(missing)} such rows"
        raise ValueError(
            f"expected a {what} in every row of {path}, got none in row {missing[0]} of column {name!r} ({rows})."
        )


def check_labels(values: Sequence[Any], name: str, path: Path) -> None:
    """Refuse labels that are missing or are not classes."""
    check_present(values, "label", name, path)
    wrong = next((each for each in values if isinstance(each, float) and not each.is_integer()), None)
    if wrong is not None or not all(isinstance(each, str | int | float) for each in values[:1]):
        raise ValueError(
            f"expected classes in column {name!r} of {path}, got {describe(values[0] if wrong is None else wrong)}. "
            "The lab's own loop classifies; for other targets write a training function: batchtrim compare --task."
        )
