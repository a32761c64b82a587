"""The user's own images as a data set: split, decoded once on all cores, and cached as a memory-mapped array.

Remarks on them (resized, left out, the same image on both sides) are in ``ImageData.notes``.

N images, C channels, H and W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchtrim._checks import check_count, check_fraction
from batchtrim.lab.files import absolute, expanded, shown
from batchtrim.lab.task import cache_entry, data, tables
from batchtrim.lab.task.cache import CannotKeep, filled, folder_for
from batchtrim.lab.task.decode import Contradicted, Decoded, Header, ImageForm, decode_all, first_header
from batchtrim.lab.task.image_notes import check_sides, deep, resized, some
from batchtrim.lab.task.listing import Listing, find_images
from batchtrim.lab.task.names import SPECS, known_as, similar_names
from batchtrim.lab.task.split import split_rows

__all__ = ["ImageOptions", "is_own", "load"]

VERSION = 3
SMALL = 128  # images that share one size are not resized up to this many pixels a side
SIZE = 64  # default side of all others
MOST_NAMED = 3


@dataclass(frozen=True)
class ImageOptions:
    """Options for reading a user's own data set.

    Args:
        image_size: side in pixels to resize every image to; None keeps images that share one small size unchanged.
        test_split: fraction of the images to test on, if the source has no test split.
        split_seed: of the split.
        group: a column, or a pattern of file names; images with the same value stay on one side of the split.
        image_column, label_column: of a table.
        skip_broken: continue without images that cannot be decoded.
    """

    image_size: int | None = None
    test_split: float | None = None
    split_seed: int = 0
    group: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    skip_broken: bool = False


def is_own(dataset: str) -> bool:
    """True if ``dataset`` is a path or a hub name, and not a data set that the lab knows by name."""
    if dataset in SPECS:
        return False
    return "/" in dataset or "\\" in dataset or expanded(dataset).exists() or dataset.lower().endswith(tables.SUFFIXES)


def one_spelling(dataset: str) -> str:
    """Return a path from the root, so that all its spellings are one data set; other names stay."""
    if dataset in SPECS or not expanded(dataset).exists():  # it comes with the lab, or from the hub
        return dataset
    return str(absolute(dataset))


def options_of(config: Any) -> ImageOptions:
    """Return these options from the settings of a run."""
    return ImageOptions(**{name: getattr(config, name) for name in ImageOptions.__dataclass_fields__})


def check_options(config: Any) -> None:
    """Refuse options for own data with a data set that the lab knows by name, and values out of range."""
    options = options_of(config)
    if options.image_size is not None:
        check_count("image_size", options.image_size)
    if options.test_split is not None and check_fraction("test_split", options.test_split) == 0.0:
        raise ValueError("expected `test_split` in (0, 1), got 0. It is the part of the images to test on.")
    check_count("split_seed", options.split_seed, minimum=0)
    given = next((name for name, value in asdict(options).items() if value != getattr(ImageOptions(), name)), None)
    if given is not None and not is_own(config.dataset):
        raise ValueError(
            f"expected no `{given}` with the data set {config.dataset!r}, which has its own, got "
            f"{getattr(options, given)!r}. It is for a folder, a table or a hub name."
        )
    if config.data_version and not is_own(config.dataset):
        raise ValueError(
            f"expected no `data_version` with the data set {config.dataset!r}, got {config.data_version!r}. It is a "
            "hash of your own images; the program computes it."
        )


def load(
    dataset: str,
    options: ImageOptions,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> data.ImageData:
    """Load the user's own images, from the cache if they were decoded before.

    Args:
        dataset: a folder of class folders (with train/ and test/, or with ``test_split``), a CSV or Parquet file
            with an image and a label column, or a hub name ``owner/name[:config]``.
        data_dir, cache_dir: as for :func:`batchtrim.lab.task.data.load`.

    Raises:
        ValueError, OSError: there is nothing to train on, or an image is broken; the message names it.
    """
    listing = find_images(
        dataset, group=options.group, image_column=options.image_column, label_column=options.label_column,
        data_dir=data.data_folder(data_dir),
    )  # fmt: skip
    classes, labels = _classes(listing)
    train, test = _sides(listing, labels, options)
    order = np.concatenate([train, test])
    stamps = listing.stamps()
    key = _key(listing, stamps, order, options)
    cache, local_notes = folder_for(f"images/{key}", cache_dir)
    folder = cache / "images" / key
    if not (folder / cache_entry.ABOUT).exists():
        _decode(listing, stamps, order, len(train), folder, options)
    held = cache_entry.read(folder, len(order))
    left = order[held.kept]
    classes, numbers, gone = _only_those_left(listing, classes, labels[left])
    first_test = int(held.kept[: len(train)].sum())
    kept_labels, images = torch.from_numpy(numbers), torch.from_numpy(held.pixels)
    found = data.ImageData(
        dataset, len(classes), images[:first_test], kept_labels[:first_test], images[first_test:],
        kept_labels[first_test:], held.mean, held.std, tuple(classes),
    )  # fmt: skip
    sides = check_sides(found, [listing.names[row] for row in left], held.hashes, first_test)
    notes = [*listing.notes, *similar_names(classes), *held.notes, *gone, *sides]
    version = _version(found, held.hashes)
    told = tuple(f"{shown(known_as(dataset))}: {note}" for note in notes)
    return replace(found, notes=told, local_notes=local_notes, version=version)


def _version(found: data.ImageData, hashes: np.ndarray) -> str:
    """Hash the pixels, labels and split, independently of file names, locations and dates."""
    labels = torch.cat([found.train_labels, found.test_labels]).numpy()
    told = json.dumps([found.shape, len(found.train_labels), found.class_names])
    digest = hashlib.sha256(told.encode())
    for part in (hashes.astype("<u8"), labels.astype("<i8")):
        digest.update(part.tobytes())
    return digest.hexdigest()[:12]


def _classes(listing: Listing) -> tuple[list[str], np.ndarray]:
    """Return the class names in order, and each image's class number."""
    labels = listing.labels
    if listing.classes is not None and all(isinstance(each, int) for each in labels):
        wrong = next((each for each in labels if not 0 <= each < len(listing.classes)), None)
        if wrong is not None:
            raise ValueError(
                f"expected labels of {listing.where} in [0, {len(listing.classes)}), got {wrong}. Is this the "
                "split with hidden labels?"
            )
        if len(set(labels)) < 2:
            raise ValueError(f"expected at least two classes in {listing.where}, got one.")
        return list(map(str, listing.classes)), np.asarray(labels, dtype=np.int64)
    numbers = all(isinstance(each, int | float) for each in labels)
    values = sorted(set(labels)) if numbers else sorted({str(each) for each in labels})
    number = {value: place for place, value in enumerate(values)}
    if len(values) < 2:
        hint = _deeper(listing)
        raise ValueError(
            f"expected at least two classes in {listing.where}, got {len(values)}: {shown(values[0])}.{hint}"
        )
    found = np.asarray([number[each if numbers else str(each)] for each in labels], dtype=np.int64)
    return [f"{each:g}" if isinstance(each, float) else str(each) for each in values], found


def _deeper(listing: Listing) -> str:
    """Return a hint if the images of the only class lie in folders of their own, as in an archive's ``DIR/DIR``."""
    folders = {os.path.dirname(name) for name in listing.names}
    common = os.path.commonpath(folders) if len(folders) > 1 else ""
    there = f"{listing.where}/{shown(common)}"
    return f" If the classes are the folders in {there}, pass --dataset {shlex.quote(there)}" if common else ""


def _only_those_left(
    listing: Listing, classes: list[str], labels: np.ndarray
) -> tuple[list[str], np.ndarray, list[str]]:
    """Return classes, labels and a note, without classes whose images are all broken unless the source names all."""
    left = np.unique(labels)
    if listing.classes is not None or len(left) == len(classes):
        return classes, labels, []
    gone = some([name for number, name in enumerate(classes) if number not in left])
    if len(left) < 2:
        raise ValueError(
            f"expected at least two classes in {listing.where}, got {len(left)} with images that can be decoded, none "
            f"of {gone}."
        )
    note = f"classes left out, since all their images are broken: {gone}"
    return [classes[each] for each in left], np.searchsorted(left, labels), [note]


def _sides(listing: Listing, labels: np.ndarray, options: ImageOptions) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and the rows to test on."""
    if listing.split is not None:
        if options.test_split is not None:
            raise ValueError(
                f"expected no `test_split`, since {listing.where} has a test split, got {options.test_split:g}."
            )
        if options.group is not None:
            raise ValueError(f"expected no `group`, since {listing.where} is split already, got {options.group!r}.")
        split = np.asarray(listing.split)
        sides = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
        for side, name in zip(sides, ("train", "test"), strict=True):
            if not len(side):
                raise ValueError(f"expected images to {name} on in {listing.where}, got none.")
        return sides
    if options.test_split is None:
        raise ValueError(
            f"expected a test split in {listing.where}, got images without one. Set some aside: --test-split 0.2, "
            "and --group if images belong together."
        )
    sides = split_rows(labels, options.test_split, options.split_seed, listing.groups)
    groups = "" if listing.groups is None else f", in {len(set(listing.groups))} groups that stay whole"
    listing.notes.append(f"{len(sides[1])} of {len(labels)} images set aside for testing{groups}")
    return sides


def _key(listing: Listing, stamps: dict[str, str], order: np.ndarray, options: ImageOptions) -> str:
    told = json.dumps({name: asdict(options)[name] for name in ("image_size", "skip_broken")})
    digest = hashlib.sha256(
        "\n".join([str(VERSION), listing.where, told, *map(" ".join, stamps.items())]).encode(
            "utf-8", "surrogateescape"
        )
    )
    digest.update(order.tobytes())
    return digest.hexdigest()[:16]


def _decode(
    listing: Listing, stamps: dict[str, str], order: np.ndarray, train: int, folder: Path, options: ImageOptions
) -> None:
    """Fill the cache: decode into a temporary folder, which is renamed when it is complete."""
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    try:
        with filled(folder) as part:
            decoded, form = _decode_all(listing, stamps, part / cache_entry.PIXELS, places, train, options)
            headers = [each for each in decoded.headers if each is not None]
            notes = [*resized(headers, form.size, options.image_size), *deep(headers, decoded.counts)]
            kept = np.ones(len(order), dtype=bool)
            if decoded.broken:
                notes.append(_named(listing, decoded.broken, "broken {} left out"))
                kept[places[list(decoded.broken)]] = False
                _only(part / cache_entry.PIXELS, np.flatnonzero(kept))
            cache_entry.write_about(part, kept, decoded.hashes[kept], *_moments(decoded.counts), notes, listing.where)
    except data.ReplaceFile:
        raise
    except OSError as error:
        raise CannotKeep(folder.parent, error) from error


def _decode_all(
    listing: Listing, stamps: dict[str, str], file: Path, places: np.ndarray, train: int, options: ImageOptions
) -> tuple[Decoded, ImageForm]:
    """Decode into ``file`` in the form of the first image; if a later one differs, start over with a wider form."""
    header = first_header(listing.chunks())
    form = _form(header or Header(SIZE, SIZE, grey=False), options)
    while True:
        try:
            decoded = decode_all(listing.chunks(), file, places, form, train)
        except Contradicted as found:
            form = _widened(form, found.header)
            continue
        if decoded.broken:
            _check_still_there(listing, stamps)
        broken = _named(listing, decoded.broken, "that cannot")
        if len(decoded.broken) == len(places):
            table = listing.where.lower().endswith(tables.SUFFIXES)
            gone = table and set(decoded.broken.values()) == {"there is no such file"}
            hint = " Paths are relative to the table's folder, with / between folders." if gone else ""
            raise data.ReplaceFile(f"expected images that can be decoded in {listing.where}, got none: {broken}.{hint}")
        if decoded.broken and not options.skip_broken:
            raise data.ReplaceFile(
                f"expected images that can be decoded in {listing.where}, got {broken}. Repair or remove them, or pass "
                "--skip-broken to continue without them."
            )
        return decoded, form


def _check_still_there(listing: Listing, stamps: dict[str, str]) -> None:
    """Raise an error, rather than call images broken, if a disk was removed or files are still being written."""
    after = listing.stamps()
    changed = [name for name, stamp in stamps.items() if after.get(name) != stamp]
    if changed:
        raise data.ReplaceFile(
            f"expected {listing.where} to stay as it is while its images are decoded, got "
            f"{len(changed)} {'file' if len(changed) == 1 else 'files'} that vanished or changed, such as "
            f"{shown(changed[0])}. Is the disk still there, and has everything been copied? Then try again."
        )


def _only(file: Path, places: np.ndarray) -> None:
    """Rewrite the array in ``file`` with these positions alone."""
    pixels = np.load(file, mmap_mode="r", allow_pickle=False)
    left = file.with_suffix(".left")
    out = np.lib.format.open_memmap(left, mode="w+", dtype=np.uint8, shape=(len(places), *pixels.shape[1:]))
    for start in range(0, len(places), 1024):
        out[start : start + 1024] = pixels[places[start : start + 1024]]
    out.flush()
    left.replace(file)


def _form(header: Header, options: ImageOptions) -> ImageForm:
    """Return the form of all images, assuming that all are like the first."""
    if options.image_size is not None:
        return ImageForm((options.image_size, options.image_size), header.grey, uniform=False)
    if max(header.width, header.height) <= SMALL:
        return ImageForm((header.width, header.height), header.grey, uniform=True)
    return ImageForm((SIZE, SIZE), header.grey, uniform=False)


def _widened(form: ImageForm, header: Header) -> ImageForm:
    """Return a form that also fits an image of another kind; it never gets narrower."""
    as_is = form.uniform and form.size == (header.width, header.height)
    return ImageForm(form.size if as_is or not form.uniform else (SIZE, SIZE), form.grey and header.grey, as_is)


def _named(listing: Listing, broken: dict[int, str], what: str) -> str:
    named = "; ".join(f"{shown(listing.names[row])}: {broken[row]}" for row in sorted(broken)[:MOST_NAMED])
    count = what.format("image" if len(broken) == 1 else "images")
    return f"{len(broken)} {count} ({named}{'; ...' if len(broken) > MOST_NAMED else ''})"


def _moments(counts: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel from the counts of the 256 values."""
    values = np.arange(256, dtype=np.float64)
    mean = counts @ values / counts.sum(1)
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1))
    return mean.tolist(), [each or 1.0 for each in std.tolist()]
