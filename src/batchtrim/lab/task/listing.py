"""The user's own images, found but not yet decoded: in class folders, in a table, or on the Hugging Face hub.

N images, C classes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchtrim._checks import describe, import_extra
from batchtrim.lab.task import hub
from batchtrim.lab.task.decode import Source
from batchtrim.lab.task.walk import check_link, images_in

__all__ = ["Listing", "find_images"]

TABLES = (".csv", ".parquet")
TEST_NAMES = ("test", "val", "valid", "validation")
IMAGE_COLUMNS = ("image", "img", "path", "file", "file_name", "filename")
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label", "coarse_label")
BATCH = 256  # rows of a table that are read at a time
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass
class Listing:
    """The places of N images, and what they show.

    Attributes:
        names: of each image, to name it by. ``labels``: class names, or numbers. ``classes``: all names in order, where
            the source knows them; otherwise the sorted labels.
        split: "train" or "test" of each, where the source has splits. ``groups``: of each, where asked for.
        chunks: reads the images again and again: number of the first row, and a few images from there on.
        key: what changes when the source does. ``notes``: what is to be said.
    """

    where: str
    names: list[str]
    labels: list[Any]
    chunks: Callable[[], Iterable[tuple[int, list[Source]]]]
    key: list[str]
    classes: list[str] | None = None
    split: list[str] | None = None
    groups: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def find_images(
    dataset: str, *, group: str | None = None, image_column: str | None = None, label_column: str | None = None,
    data_dir: Path | None = None,
) -> Listing:  # fmt: skip
    """Return what a folder, a CSV or Parquet file, or a hub name holds.

    Args:
        dataset: a path, or ``owner/name[:config]`` on the hub, which is looked for under ``data_dir`` first.
        group: a column of a table, or a pattern of a folder's file names, whose value images of one group share.
        image_column, label_column: of a table; by default the usual names.

    Raises:
        FileNotFoundError, ValueError, OSError: there is nothing of that name, or no images in it.
    """
    _check_text([dataset], "the path of the data set")
    path = Path(dataset).expanduser()
    columns = {"image": image_column, "label": label_column, "group": group}
    if path.is_dir():
        return _folder(path, group, columns)
    if path.suffix.lower() in TABLES:
        if not path.is_file():
            raise FileNotFoundError(f"expected a table {path} for `dataset`, got nothing there.")
        return _tables({"": [path]}, str(path), columns)
    if _HUB_NAME.fullmatch(dataset) and not path.exists():
        return _hub(dataset, data_dir, columns)
    raise FileNotFoundError(
        f"expected `dataset` to be a folder of images, a .csv or .parquet file, or owner/name on the hub, got "
        f"{dataset!r}, {'a file of another kind' if path.exists() else 'which does not exist'}."
    )


def _folder(root: Path, group: str | None, columns: dict[str, str | None]) -> Listing:
    inside = sorted(each for each in root.iterdir() if not each.name.startswith("."))
    if any(each.suffix == ".parquet" for each in inside) or (
        (root / "data").is_dir() and any((root / "data").glob("*.parquet"))
    ):
        return _hub_folder(root, str(root), columns)
    folders = {each.name: each for each in inside if each.is_dir()}
    notes: list[str] = []
    splits = {"": root}
    if "train" in folders:
        tests = [name for name in TEST_NAMES if name in folders]
        if not tests:
            raise ValueError(
                f"expected a folder 'test' (or {', '.join(TEST_NAMES[1:])}) beside 'train' in {root}, got "
                f"{', '.join(folders)}. For one tree without splits, give its own path and --test-split."
            )
        splits = {"train": folders["train"], "test": folders[tests[0]]}
        other = [name for name in folders if name not in ("train", tests[0])]
        if tests[0] != "test":
            notes.append(f"'{tests[0]}' is tested on")
        if other:
            notes.append(f"left out: {', '.join(other[:5])}")
    suffixes = set(import_extra("PIL.Image", "lab", "images").registered_extensions())
    files: list[Path] = []
    labels: list[str] = []
    split: list[str] = []
    others: list[str] = []
    linked: list[Path] = []
    for name, folder in splits.items():
        for kind in sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")):
            check_link(kind, root)
            found = images_in(kind, suffixes)
            here, others, linked = found.images, others + found.others, linked + found.linked
            if not here:
                notes.append(f"class folder without images left out: {kind.relative_to(root)}")
            files += here
            labels += [kind.name] * len(here)
            split += [name] * len(here)
    if others:
        notes.append(f"{len(others)} files that are no images left out, such as {others[0]}")
    if linked:
        notes.append(f"{len(linked)} linked folders in class folders left out, such as {linked[0].relative_to(root)}")
    if not files:
        raise ValueError(
            f"expected images in class folders, as in {root}/CLASS/image.png, got none.{_loose(root, suffixes)}"
        )
    names = [str(each.relative_to(root)) for each in files]
    _check_text(names, "names of files and folders")
    return Listing(
        where=str(root),
        names=names,
        labels=labels,
        chunks=lambda: [(0, list(files))],
        key=[f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in zip(names, map(_stat, files), strict=True)],
        split=split if "train" in splits else None,
        groups=None if group is None else _groups_by_name(names, group),
        notes=notes,
    )


def _stat(path: Path) -> os.stat_result:
    return path.stat() if path.exists() else path.lstat()  # a link that leads nowhere


def _check_text(names: Sequence[str], what: str) -> None:
    """Refuse names that are no text, which file systems allow: records and pages could not hold them."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"expected {what} in UTF-8, got {os.fsencode(name)!r}. Rename it, or mount the disk with its encoding."
            ) from None


def _loose(root: Path, suffixes: set[str]) -> str:
    loose = [each for each in root.iterdir() if each.is_file() and each.suffix.lower() in suffixes]
    return f" {len(loose)} images lie in {root} itself, in no class." if loose else ""


def _groups_by_name(names: Sequence[str], pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            rf"expected `group` to be a pattern such as 'clip(\d+)_', got {pattern!r}: {error}."
        ) from error
    found = []
    for name in names:
        match = compiled.search(name)
        if match is None:
            raise ValueError(f"expected `group` {pattern!r} to match every file name, got {name!r}.")
        found.append("/".join(part or "" for part in match.groups()) if compiled.groups else match[0])
    return found


def _tables(files: dict[str, list[Path]], where: str, columns: dict[str, str | None]) -> Listing:
    """Return tables of one split each, or of none; a column 'split' names it if there is one."""
    names: list[str] = []
    labels: list[Any] = []
    split: list[str] = []
    groups: list[str] = []
    spans: list[tuple[int, Path, str, Sequence[Any] | None]] = []
    classes = None
    for side, paths in files.items():
        for path in paths:
            table = _read_table(path, columns)
            image, label = (
                _column(table, "image", columns["image"], path),
                _column(table, "label", columns["label"], path),
            )
            classes = classes or _class_names(table, label)
            values = table.column(label).to_pylist()
            _check_labels(values, label, path)
            if columns["group"] is not None:
                groups += [
                    str(each) for each in table.column(_column(table, "group", columns["group"], path)).to_pylist()
                ]
            split += _split_column(table, path) if "split" in table.column_names and not side else [side] * len(values)
            spans.append(
                (len(names), path, image, None if path.suffix == ".parquet" else table.column(image).to_pylist())
            )
            names += [f"{path.name} row {row}" for row in range(len(values))]
            labels += values
    if not names:
        raise ValueError(f"expected images in {where}, got a table without rows.")
    stats = [(path, path.stat()) for paths in files.values() for path in paths]
    return Listing(
        where=where,
        names=names,
        labels=labels,
        chunks=lambda: _table_chunks(spans),
        key=[f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats],
        classes=classes,
        split=split if any(split) else None,
        groups=groups or None,
    )


def _read_table(path: Path, columns: dict[str, str | None]) -> Any:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix.lower() == ".csv":
            return pyarrow.csv.read_csv(path)
        schema = pyarrow.parquet.read_schema(path)
        image = _column(schema, "image", columns["image"], path)
        wanted = [name for name in schema.names if name != image]
        table = pyarrow.parquet.read_table(path, columns=wanted)
        missing = pyarrow.nulls(table.num_rows)  # images are read when they are decoded
        return table.append_column(image, missing)
    except (pyarrow.ArrowException, OSError) as error:
        text = (str(error).splitlines() or [""])[0][:160]
        raise ValueError(
            f"expected {path} to be a table that can be read, got {type(error).__name__}: {text}."
        ) from error


def _column(table: Any, what: str, asked: str | None, path: Path) -> str:
    there = list(getattr(table, "column_names", None) or table.names)
    if asked is not None:
        if asked not in there:
            raise ValueError(f"expected `{what}` column {asked!r} in {path}, got {', '.join(there)}.")
        return asked
    usual = IMAGE_COLUMNS if what == "image" else LABEL_COLUMNS
    found = [name for name in usual if name in there]
    if len(found) != 1:
        got = f"{' and '.join(found)}" if found else ", ".join(there)
        raise ValueError(f"expected one {what} column in {path}, got {got}. Say which: --{what}-column NAME.")
    return found[0]


def _class_names(table: Any, label: str) -> list[str] | None:
    """Return the names that the hub's own files carry for their numbered labels."""
    metadata = (table.schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    feature = json.loads(metadata).get("info", {}).get("features", {}).get(label, {})
    return feature.get("names") if isinstance(feature, dict) else None


def _check_labels(values: Sequence[Any], column: str, path: Path) -> None:
    missing = [row for row, value in enumerate(values) if value is None or value == ""]
    if missing:
        raise ValueError(
            f"expected a label in every row of {path}, got none in row {missing[0]} of column {column!r} "
            f"({len(missing)} such rows)."
        )
    wrong = next((each for each in values if isinstance(each, float) and not each.is_integer()), None)
    if wrong is not None or not all(isinstance(each, str | int | float) for each in values[:1]):
        raise ValueError(
            f"expected classes in column {column!r} of {path}, got {describe(values[0] if wrong is None else wrong)}. "
            "The lab's own loop classifies; for other targets write a training function: batchtrim compare --task."
        )


def _split_column(table: Any, path: Path) -> list[str]:
    values = [str(each) for each in table.column("split").to_pylist()]
    renamed = ["test" if each in TEST_NAMES else each for each in values]
    wrong = next((each for each in renamed if each not in ("train", "test")), None)
    if wrong is not None:
        raise ValueError(f"expected train or test in column 'split' of {path}, got {wrong!r}.")
    return renamed


def _table_chunks(spans: Sequence[tuple[int, Path, str, Sequence[Any] | None]]) -> Iterator[tuple[int, list[Source]]]:
    import pyarrow.parquet

    for first, path, image, values in spans:
        if values is not None:
            yield first, [_source(each, path) for each in values]
            continue
        start = first
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, columns=[image]):
                cells = batch.column(0).to_pylist()
                yield start, [_source(each, path) for each in cells]
                start += len(cells)


def _source(cell: Any, path: Path) -> Source:
    """Return a cell: a path beside the table, bytes, or the hub's mapping of both."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    return path.parent / str(cell) if cell else b""


def _hub_folder(root: Path, where: str, columns: dict[str, str | None]) -> Listing:
    """Find Parquet files in the hub's layout, TRAIN-*.parquet and TEST-*.parquet, in the folder or its folder data."""
    folder = root / "data" if (root / "data").is_dir() else root
    files = {"train": sorted(folder.glob("train*.parquet"))}
    test = next((name for name in TEST_NAMES if any(folder.glob(f"{name}*.parquet"))), None)
    if not files["train"]:
        raise ValueError(
            f"expected {folder / 'train-*.parquet'}, got {', '.join(sorted(p.name for p in folder.iterdir())[:5])}."
        )
    if test is not None:
        files["test"] = sorted(folder.glob(f"{test}*.parquet"))
        return _tables(files, where, columns)
    return _tables({"": files["train"]}, where, columns)


def _hub(dataset: str, data_dir: Path | None, columns: dict[str, str | None]) -> Listing:
    name, _, config = dataset.partition(":")
    if data_dir is not None:
        for folder in (data_dir / name / config, data_dir / name.rpartition("/")[2] / config):
            if folder.is_dir():
                return _hub_folder(folder, dataset, columns)
        raise FileNotFoundError(
            f"expected {data_dir / name / config} with the hub's files of {dataset!r}, got nothing there, "
            f"and no folder {dataset!r} here. Without --data-dir and BATCHTRIM_DATA the hub itself is asked."
        )
    datasets = import_extra("datasets", "lab", f"the data set '{dataset}'")
    try:
        splits = hub.load_dataset(datasets, name, config or None)
    except Exception as error:  # what hub clients raise varies with their versions
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise OSError(
            f"could not get {dataset!r} from the Hugging Face hub ({text}). Without a connection, pass --data-dir DIR "
            f"(or set BATCHTRIM_DATA) with the hub's files in DIR/{name}."
        ) from error
    return from_splits(splits, dataset, columns)


def from_splits(splits: Any, where: str, columns: dict[str, str | None]) -> Listing:
    """Return what a ``datasets.DatasetDict`` holds."""
    if "train" not in splits:
        raise ValueError(f"expected a split 'train' in {where}, got {', '.join(splits)}.")
    test = next((name for name in TEST_NAMES if name in splits), None)
    chosen = {"train": "train"} | ({"test": test} if test else {})
    names: list[str] = []
    labels: list[Any] = []
    split: list[str] = []
    groups: list[str] = []
    tables: list[tuple[int, Any]] = []
    classes = None
    for side, name in chosen.items():
        data = splits[name]
        place = Path(f"{where} {name}")
        image, label = _column(data, "image", columns["image"], place), _column(data, "label", columns["label"], place)
        feature = data.features[label]
        classes = classes or getattr(feature, "names", None)
        values = data.data.column(label).to_pylist()
        _check_labels(values, label, place)
        if columns["group"] is not None:
            groups += [
                str(each) for each in data.data.column(_column(data, "group", columns["group"], place)).to_pylist()
            ]
        tables.append((len(names), data.data.column(image)))
        names += [f"{where} {name} row {row}" for row in range(len(values))]
        labels += values
        split += [side if test else ""] * len(values)

    def chunks() -> Iterator[tuple[int, list[Source]]]:
        for first, column in tables:
            for start in range(0, len(column), BATCH):
                cells = column.slice(start, BATCH).to_pylist()
                yield first + start, [_source(each, Path(where)) for each in cells]

    return Listing(
        where=where,
        names=names,
        labels=labels,
        chunks=chunks,
        key=[f"{name} {getattr(splits[name], '_fingerprint', '')}" for name in chosen.values()],
        classes=classes,
        split=split if any(split) else None,
        groups=groups or None,
    )
