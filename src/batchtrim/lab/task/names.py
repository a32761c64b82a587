"""Names that the lab knows: data sets, augmentations, networks. No torch here, since the help lists them."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from batchtrim.lab.files import look_up

MOST_ALIKE = 3  # notes on names that look alike
AUGMENTS = ("none", "crop", "flip", "crop+flip")
NORMS = ("batch", "group")
MODELS = (
    *("mlp", "cnn", "vit", "resnet8", "resnet14", "resnet20", "resnet26", "resnet32"),
    *("speed", "speed_lite", "resnet18", "resnet34"),
)
"""The networks built by :mod:`batchtrim.lab.task.models`."""


@dataclass(frozen=True)
class Spec:
    """The source, shape and classes of a data set."""

    name: str
    classes: int
    mode: str  # the Pillow mode to decode to: L is grey, RGB is colour
    augment: str  # the value of `augment="auto"`
    hub: str = ""
    hub_config: str | None = None
    image: str = "image"
    label: str = "label"


SPECS = {
    spec.name: spec
    for spec in (
        Spec("digits", 10, "L", "none"),
        Spec("fashion_mnist", 10, "L", "crop+flip", "zalando-datasets/fashion_mnist"),
        Spec("cifar10", 10, "RGB", "crop+flip", "uoft-cs/cifar10", image="img"),
        Spec("cifar100", 100, "RGB", "crop+flip", "uoft-cs/cifar100", image="img", label="fine_label"),
        Spec("gtsrb", 43, "RGB", "crop"),
        Spec("svhn", 10, "RGB", "crop", "ufldl-stanford/svhn", "cropped_digits"),
    )
}


def find_spec(name: str) -> Spec:
    """Return the data set of that name, or an error that suggests the nearest one."""
    return look_up("dataset", name, SPECS, "a folder of class folders, a .csv or .parquet file, owner/name on the hub")


def known_as(name: str) -> str:
    """Return the name of a data set or network without the folders that it lies in: ``photos``, ``net.py:build``.

    A folder with an architecture becomes ``hf:vit/``, other than the architecture ``hf:vit``.
    """
    kind, _, place = name.partition(":")
    if kind == "hf" and Path(folder := place.partition(":")[0]).is_absolute():
        return f"hf:{Path(folder).name}/{place.removeprefix(folder)}"
    return Path(name).name if Path(name).is_absolute() else name


def similar_names(names: Sequence[str], what: str = "classes") -> list[str]:
    """Return a note on names that probably mean the same class, or the same of something else."""
    found: dict[str | Decimal, list[str]] = {}
    for name in names:
        plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        found.setdefault(_as_number(plain), []).append(name)
    return [
        f"{', '.join(map(ascii, alike))} are {len(alike)} {what}, though their names differ by case, spaces, zeros or "
        "the encoding of letters alone"
        for alike in found.values()
        if len(alike) > 1
    ][:MOST_ALIKE]


def _as_number(text: str) -> str | Decimal:
    """Return the number that a name is, with all its digits, or the name."""
    with contextlib.suppress(InvalidOperation):
        number = Decimal(text)
        if number.is_finite() and "_" not in text:  # Python reads 1_0 as a number
            return number
    return text
