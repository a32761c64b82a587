"""Image data sets, decoded once and cached as uint8 tensors.

A data set comes from the Hugging Face hub by its usual name, or from a folder in the hub's layout,
``DIR/<name>/{train,test}-*.parquet``, given as ``data_dir`` or in the environment variable BATCHTRIM_DATA.
scikit-learn's handwritten digits need neither. Decoded images are cached in a folder (BATCHTRIM_CACHE, or the
platform's cache), as plain .npy files without pickle, under a key made of the source files' names, sizes and times.

N images, C channels, H and W pixels.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchtrim._checks import first_line, import_extra
from batchtrim.lab.files import expanded, write_whole
from batchtrim.lab.task import hub
from batchtrim.lab.task.cache import CannotKeep, folder_for
from batchtrim.lab.task.names import Spec, find_spec

CACHE_VERSION = 1
SPLITS = ("train", "test")


class PassDataDir(OSError):
    """A data set was not found; the message says how to point to a copy of it."""


class ReplaceFile(OSError):
    """A data file exists but is damaged; the message names it."""


@dataclass(frozen=True)
class ImageData:
    """A data set in memory.

    Args:
        name: its name in ``SPECS``.
        classes: the number of classes.
        train_images: uint8 (N, C, H, W), and ``train_labels`` int64 (N,), each in [0, classes).
        test_images: the same for the test split, with ``test_labels``.
        mean: of the training images, one number per channel in [0, 255]; ``std`` likewise.
        class_names: in the order of the labels, if known.
        notes: remarks on the data, shown before training.
        local_notes: remarks for this machine only, which are not recorded.
        version: a hash of the images, labels and split of the user's own data; "" for those in ``SPECS``.
    """

    name: str
    classes: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    local_notes: tuple[str, ...] = ()
    version: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The channels, height and width of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def with_train(self, images: Tensor, labels: Tensor) -> ImageData:
        """Return the data with another training split; the normalisation is kept, so that runs stay comparable."""
        return replace(self, train_images=images, train_labels=labels)


def load(name: str, data_dir: str | Path | None = None, cache_dir: str | Path | None = None) -> ImageData:
    """Load a data set, from the cache if it was decoded before.

    Args:
        name: one of ``SPECS``.
        data_dir: folder that holds ``<name>/{train,test}-*.parquet``; default: BATCHTRIM_DATA, else the hub.
        cache_dir: the cache of decoded images; default: BATCHTRIM_CACHE, else the platform's cache folder.

    Raises:
        ValueError: for an unknown name, or labels outside [0, classes).
        PassDataDir: when the folder lacks the files, or the hub cannot be reached.
        ReplaceFile: when a file is damaged; the message names it.
    """
    spec = find_spec(name)
    splits: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    local_notes: tuple[str, ...] = ()
    if name == "digits":
        splits = _digits()
    else:
        folder = data_folder(data_dir)
        if not folder and not spec.hub:
            raise PassDataDir(
                f"expected a folder with {name}/{{train,test}}-*.parquet, got none. This data set is not downloaded "
                "from the hub, whose copies have other splits: pass --data-dir DIR, or set BATCHTRIM_DATA."
            )
        source = _Folder(spec, folder) if folder else _Hub(spec)
        for split in SPLITS:
            splits[split], local_notes = _cached(spec, source, split, cache_dir)
    for split, (images, labels) in splits.items():
        _check_labels(spec, split, labels)
        if len(images) != len(labels):
            raise ReplaceFile(
                f"expected as many labels as images in {name} {split}, got {len(labels)} for {len(images)}. "
                "The decoded cache may be damaged: remove it and try again."
            )
    mean, std = _moments(splits["train"][0])
    train, test = (tuple(torch.from_numpy(part) for part in splits[split]) for split in SPLITS)
    return ImageData(name, spec.classes, train[0], train[1], test[0], test[1], mean, std, local_notes=local_notes)


def data_folder(data_dir: str | Path | None) -> Path | None:
    """Return the folder with Parquet files: the argument, else BATCHTRIM_DATA, else None (the hub is used)."""
    found = data_dir or os.environ.get("BATCHTRIM_DATA")
    return expanded(found) if found else None


def parquet_files(folder: Path, split: str) -> list[Path]:
    """Return the Parquet files of one split in order; the error says what was expected and what was found."""
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) if folder.is_dir() else "no such folder"
        raise PassDataDir(
            f"expected {folder / f'{split}-*.parquet'}, got {there or 'an empty folder'}. "
            "--data-dir and BATCHTRIM_DATA name the folder above the data set's own."
        )
    count = files[-1].stem.rpartition("-of-")[2]
    if count.isdigit() and len(files) != int(count):
        names = {path.name for path in files}
        wanted = [f"{split}-{i:05d}-of-{count}.parquet" for i in range(int(count))]
        missing = ", ".join(name for name in wanted if name not in names)
        raise PassDataDir(f"expected {int(count)} files of {split} in {folder}, got {len(files)}. Missing: {missing}.")
    return files


def read_parquet(path: Path, columns: Sequence[str]) -> Any:
    """Return columns of one Parquet file as an Arrow table; an error names the file."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        missing = [column for column in columns if column not in file.schema_arrow.names]
        if missing:
            raise ValueError(
                f"expected {path} to have a column '{missing[0]}', got {', '.join(file.schema_arrow.names)}."
            )
        return file.read(columns=list(columns))
    except (pyarrow.ArrowException, OSError) as error:
        if not path.exists():
            raise PassDataDir(f"expected a file {path}, got nothing there.") from error
        raise ReplaceFile(
            f"expected {path} to be a whole Parquet file, got {path.stat().st_size} bytes that cannot be read "
            f"({first_line(error)}). The download may have been cut short: fetch the file again."
        ) from error


class _Folder:
    """Parquet files on disk."""

    def __init__(self, spec: Spec, data_dir: Path):
        self.spec, self.folder = spec, data_dir / spec.name

    def key(self, split: str) -> list[str]:
        return [_file_key(path) for path in parquet_files(self.folder, split)]

    def tables(self, split: str) -> list[tuple[str, Any, Any]]:
        found = []
        for path in parquet_files(self.folder, split):
            table = read_parquet(path, (self.spec.image, self.spec.label))
            found.append((str(path), table.column(self.spec.image), table.column(self.spec.label)))
        return found


class _Hub:
    """The Hugging Face hub, through the `datasets` library and its own cache of downloads."""

    def __init__(self, spec: Spec):
        self.spec, self.splits = spec, {}

    def _split(self, split: str) -> Any:
        if not self.splits:
            datasets = import_extra("datasets", "lab", f"the data set '{self.spec.name}'")
            try:
                self.splits = hub.load_dataset(datasets, self.spec.hub, self.spec.hub_config)
            except (OSError, ValueError, RuntimeError) as error:  # the errors of hub clients vary with their versions
                raise PassDataDir(
                    f"could not get '{self.spec.hub}' from the Hugging Face hub ({first_line(error)}). Without a "
                    f"connection, pass --data-dir DIR (or set BATCHTRIM_DATA) with DIR/{self.spec.name}/"
                    "{train,test}-*.parquet, the hub's own files."
                ) from error
        return self.splits[split]

    def key(self, split: str) -> list[str]:
        return [_file_key(Path(entry["filename"])) for entry in self._split(split).cache_files]

    def tables(self, split: str) -> list[tuple[str, Any, Any]]:
        table = self._split(split).data
        return [(f"{self.spec.hub} {split}", table.column(self.spec.image), table.column(self.spec.label))]


def _cached(
    spec: Spec, source: _Folder | _Hub, split: str, cache_dir: str | Path | None
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[str, ...]]:
    """Return images and labels of a split, and notes on their cache."""
    parts = [str(CACHE_VERSION), spec.name, spec.mode, split, *source.key(split)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    names = [f"{spec.name}-{split}-{key}-{what}.npy" for what in ("images", "labels")]
    cache, notes = folder_for(names[-1], cache_dir)
    paths = [cache / name for name in names]
    if all(path.exists() for path in paths):
        try:
            images, labels = (np.load(path, allow_pickle=False) for path in paths)
            return (images, labels), notes
        except (ValueError, OSError, EOFError):
            pass  # a damaged cache entry is only a copy: decode again and replace it
    images, labels = _decode(spec, source.tables(split))
    for path, array in zip(paths, (images, labels), strict=True):
        _save_whole(path, array)
    return (images, labels), notes


def _save_whole(path: Path, array: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: np.save(file, array, allow_pickle=False))
    except OSError as error:
        raise CannotKeep(path.parent, error) from error


def _decode(spec: Spec, tables: list[tuple[str, Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image, UnidentifiedImageError

    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for origin, column, numbers in tables:
        for row, image in enumerate(column):
            try:
                pixels = np.asarray(Image.open(io.BytesIO(image["bytes"].as_py())).convert(spec.mode))
            except (UnidentifiedImageError, OSError, TypeError) as error:
                raise ReplaceFile(
                    f"expected an image in row {row} of {origin}, got bytes that cannot be decoded "
                    f"({first_line(error)}). Fetch the file again."
                ) from error
            if images and pixels.shape != images[0].shape:
                raise ValueError(
                    f"expected images of shape {images[0].shape}, got {pixels.shape} in row {row} of {origin}."
                )
            images.append(pixels)
        labels.append(numbers.to_numpy().astype(np.int64))
        _check_labels(spec, origin, labels[-1])
    if not images:
        raise ReplaceFile(f"expected images in {', '.join(origin for origin, _, _ in tables)}, got none.")
    stacked = np.stack(images)
    channels_first = stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(channels_first), np.concatenate(labels)


def _digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return 1,797 digits of 8 x 8 pixels; every third image of each class, in file order, is a test image."""
    digits: Any = import_extra("sklearn.datasets", "lab", "the data set 'digits'").load_digits()
    images = (digits.images * 15).astype(np.uint8)[:, None]  # 0..16 becomes 0..240
    labels = digits.target.astype(np.int64)
    rank = np.empty_like(labels)
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        rank[rows] = np.arange(len(rows))
    test = rank % 3 == 2
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}


def _check_labels(spec: Spec, origin: str, labels: np.ndarray) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= spec.classes))
    if len(wrong):
        raise ValueError(
            f"expected labels of {spec.name} in [0, {spec.classes}), got {labels[wrong[0]]} in row {wrong[0]} of "
            f"{origin} ({len(wrong)} such rows). Is this the split with hidden labels, or another data set?"
        )


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the exact mean and standard deviation per channel, from counts of the 256 values."""
    values = np.arange(256, dtype=np.float64)
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = np.bincount(images[:, channel].ravel(), minlength=256)
        mean = float(counts @ values / counts.sum())
        means.append(mean)
        stds.append(float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum())) or 1.0)
    return tuple(means), tuple(stds)


def _file_key(path: Path) -> str:
    stat = path.stat()
    return f"{path.name} {stat.st_size} {stat.st_mtime_ns}"
