"""Names that the lab knows: data sets, augmentations, networks. No torch here, since the help lists them."""

from __future__ import annotations

from dataclasses import dataclass

from batchtrim.lab.files import look_up

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
