"""Find the user's own images, before decoding: in class folders, in a table, or on the Hugging Face hub.

N images, C classes.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchtrim._checks import describe, first_line, import_extra
from batchtrim.lab.files import expanded, shown
from batchtrim.lab.task import hub, tables
from batchtrim.lab.task.decode import Source
from batchtrim.lab.task.stamps import stamps
from batchtrim.lab.task.walk import check_link, check_readable, images_in, is_hidden

__all__ = ["Listing", "find_images"]

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "valid", "validation", "testing")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass
class Listing:
    """The locations of N images, and their labels.

    Attributes:
        names: of each image, for messages.
        labels: class names, or numbers.
        classes: all names in order, if the source knows them; otherwise the sorted labels.
        split: "train" or "test" for each image, if the source has splits.
        groups: of each, if asked for.
        chunks: yields the images in chunks, each time it is called: the number of the first row, and the images from it
            on.
        stamps: returns, by file name, a stamp that changes when the file does.
        notes: remarks on the images.
    """

    where: str
    names: list[str]
    labels: list[Any]
    chunks: Callable[[], Iterable[tuple[int, list[Source]]]]
    stamps: Callable[[], dict[str, str]]
    classes: list[str] | None = None
    split: list[str] | None = None
    groups: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def find_images(
    dataset: str, *, group: str | None = None, image_column: str | None = None, label_column: str | None = None,
    data_dir: Path | None = None,
) -> Listing:  # fmt: skip
    """Return the images of a folder, a CSV or Parquet file, or a hub name.

    Args:
        dataset: a path, or ``owner/name[:config]`` on the hub, for which ``data_dir`` is searched first.
        group: a column of a table, or a pattern for a folder's file names; images with one value form a group.
        image_column, label_column: of a table; by default the usual names.

    Raises:
        FileNotFoundError, ValueError, OSError: nothing has that name, or there are no images in it.
    """
    _check_text([dataset], "the path of the data set")
    path = expanded(dataset)
    columns = {"image": image_column, "label": label_column, "group": group}
    if path.is_dir():
        return _folder(path, group, columns)
    if path.suffix.lower() in tables.SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"expected a table {path} for `dataset`, got nothing there.")
        return _tables({"": [path]}, str(path), columns)
    if _HUB_NAME.fullmatch(dataset) and not path.exists():
        return _hub(dataset, data_dir, columns)
    raise FileNotFoundError(
        f"expected `dataset` to be a folder of images, a .csv or .parquet file, or owner/name on the hub, got "
        f"{dataset!r}, {'a file of another kind' if path.exists() else 'which does not exist'}."
    )


def _check_no_columns(root: Path, columns: Mapping[str, str | None]) -> None:
    """Refuse the columns of a table beside a folder of class folders."""
    for what in ("image", "label"):
        if columns[what] is not None:
            raise ValueError(
                f"expected no `{what}_column` with the folder {shown(root)}, whose subfolders are the classes, got "
                f"{columns[what]!r}. It is for a table."
            )


def _folder(root: Path, group: str | None, columns: dict[str, str | None]) -> Listing:
    check_readable(root)
    inside = sorted(each for each in root.iterdir() if not is_hidden(each.name))
    if any(each.suffix.lower() == ".parquet" for each in inside) or (
        (root / "data").is_dir() and any((root / "data").glob("*.parquet"))
    ):
        return _hub_folder(root, str(root), columns)
    _check_not_arrow(root)
    _check_no_columns(root, columns)
    folders = {each.name: each for each in inside if each.is_dir()}
    notes: list[str] = []
    splits = _splits(root, folders, notes)
    suffixes = set(import_extra("PIL.Image", "lab", "images").registered_extensions())
    files: list[Path] = []
    names: list[str] = []
    labels: list[str] = []
    split: list[str] = []
    others: list[str] = []
    linked: list[Path] = []
    loose: list[Path] = []
    for name, folder in splits.items():
        loose += _loose(folder, suffixes)
        for kind in sorted(each for each in folder.iterdir() if each.is_dir() and not is_hidden(each.name)):
            check_link(kind, root)
            found = images_in(kind, suffixes)
            here, others, linked = found.images, others + found.others, linked + found.linked
            if not here:
                notes.append(f"class folder without images left out: {shown(kind.relative_to(root))}")
            files += here
            below = len(str(kind)) - len(str(kind.relative_to(root)))
            names += [str(each)[below:] for each in here]
            labels += [kind.name] * len(here)
            split += [name] * len(here)
    if others:
        what = "files left out that are not images, such as" if len(others) > 1 else "file left out that is no image:"
        notes.append(f"{len(others)} {what} {shown(others[0])}")
    if linked:
        what = "folders in class folders left out, such as" if len(linked) > 1 else "folder in a class folder left out:"
        notes.append(f"{len(linked)} linked {what} {shown(linked[0].relative_to(root))}")
    if not files:
        hint = f" Images lie in {shown(loose[0].parent)} itself, in no class: {len(loose)}." if loose else ""
        if others and not loose:
            hint = f" Files there without the suffix of an image: {len(others)}, such as {shown(others[0])}."
        raise ValueError(f"expected images in class folders, as in {shown(root)}/CLASS/image.png, got none.{hint}")
    if loose:
        what = "images in no class folder left out, such as" if len(loose) > 1 else "image in no class folder left out:"
        notes.append(f"{len(loose)} {what} {shown(loose[0].relative_to(root))}")
    _check_text(names, "names of files and folders")
    return Listing(
        where=shown(root),
        names=names,
        labels=labels,
        chunks=lambda: [(0, list(files))],
        stamps=lambda: stamps(zip(names, files, strict=True)),
        split=split if "train" in splits else None,
        groups=None if group is None else _groups_by_name(names, group),
        notes=notes,
    )


def _splits(root: Path, folders: dict[str, Path], notes: list[str]) -> dict[str, Path]:
    """Return the folders of training and test images; the whole tree as "" if it has no splits.

    A folder "train" that contains no folders, and has no test folder beside it, is a class of that name.
    """
    train = next(iter(_named(folders, TRAIN_NAMES)), None)
    tests = _named(folders, TEST_NAMES)
    if train is None or not (tests or _has_folders(train)):
        return {"": root}
    if not tests:
        raise ValueError(
            f"expected a folder 'test' (or {', '.join(TEST_NAMES[1:])}) beside '{train.name}' in {shown(root)}, got "
            f"{shown(', '.join(folders))}. For one tree without splits, give its own path and --test-split."
        )
    test = next(filter(_has_folders, tests), tests[0])
    other = [name for name, folder in folders.items() if folder not in (train, test)]
    if test.name.casefold() != "test":
        notes.append(f"'{test.name}' is tested on")
    if other:
        notes.append(f"left out: {shown(', '.join(other[:5]))}")
    return {"train": train, "test": test}


def _named(folders: dict[str, Path], names: Sequence[str]) -> list[Path]:
    """Return the folders with these names, in this order, in upper or lower case."""
    return [folder for name in names for each, folder in folders.items() if each.casefold() == name]


def _has_folders(folder: Path) -> bool:
    return any(each.is_dir() and not is_hidden(each.name) for each in folder.iterdir())


def _check_text(names: Sequence[str], what: str) -> None:
    """Refuse names that are not text, which file systems allow: records and pages cannot hold them."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"expected {what} in UTF-8, got {os.fsencode(name)!r}. Rename it, or mount the disk with its encoding."
            ) from None


def _loose(folder: Path, suffixes: set[str]) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.suffix.lower() in suffixes and not each.is_dir())


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
    """Return tables of one split each, or of none; a column 'split' names the split if there is one."""
    names: list[str] = []
    labels: list[Any] = []
    split: list[str] = []
    groups: list[str] = []
    spans: list[tuple[int, Path, str, Sequence[Any] | None]] = []
    behind: list[Path] = []
    notes: list[str] = []
    classes = None
    for side, paths in files.items():
        for path in paths:
            table = tables.read(path, columns)
            classes = classes or table.class_names
            tables.check_labels(table.labels, table.label, path)
            tables.check_present(table.groups or (), "group", columns["group"] or "", path)
            groups += [str(each) for each in table.groups or ()]
            split += _split_column(table.split, path, notes) if table.split and not side else [side] * len(table.labels)
            spans.append((len(names), path, table.image, table.images))
            behind += [path, *(path.parent / each for each in table.files if each)]
            names += [f"{path.name} row {row}" for row in range(len(table.labels))]
            labels += table.labels
    if not names:
        raise ValueError(f"expected images in {where}, got a table without rows.")
    return Listing(
        where=where,
        names=names,
        labels=labels,
        chunks=lambda: _table_chunks(spans),
        stamps=lambda: stamps((str(path), path) for path in behind),
        classes=classes,
        split=split if any(split) else None,
        groups=groups or None,
        notes=list(dict.fromkeys(notes)),
    )


def _split_column(values: Sequence[Any], path: Path, notes: list[str]) -> list[str]:
    found = []
    for each in values:
        name = str(each).strip().casefold()
        if name not in (*TRAIN_NAMES, *TEST_NAMES):
            raise ValueError(f"expected train or test in column 'split' of {path}, got {each!r}.")
        found.append("train" if name in TRAIN_NAMES else "test")
        if found[-1] == "test" != name:
            notes.append(f"{each!r} is tested on")
    return found


def _table_chunks(spans: Sequence[tuple[int, Path, str, Sequence[Any] | None]]) -> Iterator[tuple[int, list[Source]]]:
    for first, path, image, values in spans:
        if values is not None:
            yield first, [_source(each, path) for each in values]
            continue
        start = first
        for cells in tables.batches(path, image):
            yield start, [_source(each, path) for each in cells]
            start += len(cells)


def _source(cell: Any, path: Path) -> Source:
    """Return a cell's image: a path relative to the table, bytes, or the hub's mapping of both."""
    cell = tables.content(cell)
    if cell is None or cell == "":
        return b""
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str) or "://" in cell:
        raise ValueError(
            f"expected image files or their bytes in the image column of {path}, got {describe(cell)}. Save each image "
            "as a file first, and give its path."
        )
    return path.parent / cell


def _check_not_arrow(root: Path) -> None:
    """Raise a ValueError with the cure if the folder was written by ``save_to_disk`` of datasets."""
    several = (root / "dataset_dict.json").is_file()
    if several or ((root / "state.json").is_file() and (root / "dataset_info.json").is_file()):
        split = "['train']" if several else ""
        raise ValueError(
            f"expected images in class folders or Parquet files in {shown(root)}, got a data set in Arrow files, as "
            f"save_to_disk writes it. Write it as Parquet: datasets.load_from_disk({shown(root)!r}){split}.to_parquet("
            f"'DIR/train-0.parquet'){', and each other split likewise' if several else ''}. Then pass --dataset DIR."
        )


def _hub_folder(root: Path, where: str, columns: dict[str, str | None]) -> Listing:
    """Find Parquet files in the hub's layout, TRAIN-*.parquet and TEST-*.parquet, in the folder or its folder data."""
    folder = root / "data" if (root / "data").is_dir() else root
    files = {"train": sorted(folder.glob("train*.parquet"))}
    test = next((name for name in TEST_NAMES if any(folder.glob(f"{name}*.parquet"))), None)
    if not files["train"]:
        table = min((each for each in folder.iterdir() if each.suffix.lower() == ".parquet"), default=None)
        hint = f" To use one table: --dataset {shlex.quote(shown(table))}" if table else ""
        there = ", ".join(sorted(each.name for each in folder.iterdir())[:5])
        raise ValueError(f"expected {folder / 'train-*.parquet'}, got {there}.{hint}")
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
    except Exception as error:  # the errors of hub clients vary with their versions
        raise OSError(
            f"could not get {dataset!r} from the Hugging Face hub ({first_line(error)}). Without a connection, pass "
            f"--data-dir DIR (or set BATCHTRIM_DATA) with the hub's files in DIR/{name}."
        ) from error
    return from_splits(splits, dataset, columns)


def from_splits(splits: Any, where: str, columns: dict[str, str | None]) -> Listing:
    """Return the images of a ``datasets.DatasetDict``."""
    if "train" not in splits:
        raise ValueError(f"expected a split 'train' in {where}, got {', '.join(splits)}.")
    test = next((name for name in TEST_NAMES if name in splits), None)
    chosen = {"train": "train"} | ({"test": test} if test else {})
    names: list[str] = []
    labels: list[Any] = []
    split: list[str] = []
    groups: list[str] = []
    held: list[tuple[int, Any]] = []
    classes = None
    for side, name in chosen.items():
        data = splits[name]
        place = Path(f"{where} {name}")
        image, label = (tables.column(data.column_names, what, columns[what], place) for what in ("image", "label"))
        feature = data.features[label]
        classes = classes or getattr(feature, "names", None)
        values = data.data.column(label).to_pylist()
        tables.check_labels(values, label, place)
        if columns["group"] is not None:
            group = tables.column(data.column_names, "group", columns["group"], place)
            groups += [str(each) for each in data.data.column(group).to_pylist()]
        held.append((len(names), data.data.column(image)))
        names += [f"{where} {name} row {row}" for row in range(len(values))]
        labels += values
        split += [side if test else ""] * len(values)

    def chunks() -> Iterator[tuple[int, list[Source]]]:
        for first, column in held:
            rows = tables.rows_at_once(column.nbytes, len(column))
            for start in range(0, len(column), rows):
                cells = column.slice(start, rows).to_pylist()
                yield first + start, [_source(each, Path(where)) for each in cells]

    return Listing(
        where=where,
        names=names,
        labels=labels,
        chunks=chunks,
        stamps=lambda: {name: getattr(splits[name], "_fingerprint", "") for name in chosen.values()},
        classes=classes,
        split=split if any(split) else None,
        groups=groups or None,
    )
