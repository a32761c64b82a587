"""Make a training set harder: wrong labels, unequal classes, fewer images. Test labels are never changed.

Everything is drawn from the run's seed, so that methods compared at the same seed see the same training set.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from batchtrim._checks import nearest
from batchtrim.lab.task.data import ImageData, PassDataDir, data_folder, read_parquet

HUMAN_COLUMNS = {
    "aggre": "aggre_label",
    "worse": "worse_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
}

# Similar classes, as in the literature on noisy CIFAR-10; for other data a label becomes the next class.
CIFAR10_CONFUSED = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}


def parse_label_noise(text: str) -> tuple[str, str]:
    """Split ``none``, ``symmetric:RATE``, ``asymmetric:RATE`` or ``human:WHICH`` into kind and value, checked."""
    kind, _, value = text.partition(":") if isinstance(text, str) else ("", "", "")
    if kind == "none" and not value:
        return kind, value
    if kind in ("symmetric", "asymmetric"):
        try:
            rate = float(value)
        except ValueError:
            rate = -1.0
        if 0.0 <= rate < 1.0:
            return kind, value
        raise ValueError(f"expected a rate in [0, 1) after '{kind}:', got {value!r}. For example {kind}:0.2.")
    if kind == "human":
        if value in HUMAN_COLUMNS:
            return kind, value
        raise ValueError(f"expected one of {', '.join(HUMAN_COLUMNS)} after 'human:', got {value!r}.")
    raise ValueError(
        f"expected `label_noise` to be none, symmetric:RATE, asymmetric:RATE or human:WHICH, got {text!r}."
        f"{nearest(kind, ('none', 'symmetric', 'asymmetric', 'human'))}"
    )


def apply(
    data: ImageData,
    *,
    label_noise: str = "none",
    imbalance: float = 1.0,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    data_dir: str | Path | None = None,
) -> ImageData:
    """Return the data with label noise, then class imbalance, then fewer images, as asked for.

    Args:
        label_noise: ``none``; ``symmetric:RATE`` (a wrong class, each equally likely); ``asymmetric:RATE`` (one
            similar class); ``human:WHICH`` (human labels of CIFAR-10N, for cifar10 only).
        imbalance: size of the largest class divided by that of the smallest, falling exponentially in between; 1 is
            none.
        train_size: keep this many images, the same fraction of every class; None keeps all.
        test_size: test on this many, the same fraction of every class, whatever the seed; None keeps all.
        data_dir: the folder with ``cifar10n/train_labels.parquet``, for human labels.
    """
    if test_size is not None:
        data = _smaller_test(data, test_size)
    labels = _noisy_labels(data, label_noise, _generator(seed, 1), data_dir)
    rows = torch.arange(len(labels))
    if imbalance != 1.0:
        rows = _imbalanced(labels, data.classes, imbalance, _generator(seed, 2))
    if train_size is not None:
        if train_size > len(rows):
            raise ValueError(f"expected `train_size` of at most {len(rows)}, got {train_size}.")
        rows = rows[_stratified(labels[rows], data.classes, train_size, _generator(seed, 3))]
    if len(rows) == len(labels):
        return data.with_train(data.train_images, labels)
    return data.with_train(data.train_images[rows], labels[rows])


def _smaller_test(data: ImageData, size: int) -> ImageData:
    if size > len(data.test_labels):
        raise ValueError(f"expected `test_size` of at most {len(data.test_labels)}, got {size}.")
    rows = _stratified(data.test_labels, data.classes, size, _generator(0, 4))
    return replace(data, test_images=data.test_images[rows], test_labels=data.test_labels[rows])


def _generator(seed: int, purpose: int) -> Generator:
    return torch.Generator().manual_seed(seed * 8 + purpose)


def _noisy_labels(data: ImageData, label_noise: str, generator: Generator, data_dir: str | Path | None) -> Tensor:
    kind, value = parse_label_noise(label_noise)
    labels = data.train_labels
    if kind == "none":
        return labels
    if kind == "human":
        return _human_labels(data, value, data_dir)
    chosen = torch.rand(len(labels), generator=generator) < float(value)
    if kind == "symmetric":
        shift = torch.randint(1, data.classes, (len(labels),), generator=generator)
        wrong = (labels + shift) % data.classes
    elif data.name == "cifar10":
        wrong = torch.tensor([CIFAR10_CONFUSED.get(label, label) for label in range(10)])[labels]
    else:
        wrong = (labels + 1) % data.classes
    return torch.where(chosen, wrong, labels)


def _human_labels(data: ImageData, which: str, data_dir: str | Path | None) -> Tensor:
    if data.name != "cifar10":
        raise ValueError(f"expected dataset cifar10 for human labels, got {data.name!r}. They are CIFAR-10N's.")
    folder = data_folder(data_dir)
    if folder is None:
        raise PassDataDir(
            "human labels are read from DIR/cifar10n/train_labels.parquet; pass --data-dir DIR or set BATCHTRIM_DATA."
        )
    path = folder / "cifar10n" / "train_labels.parquet"
    table = read_parquet(path, ("clean_label", HUMAN_COLUMNS[which]))
    clean = table.column("clean_label").to_numpy()
    if len(clean) != len(data.train_labels) or not np.array_equal(clean, data.train_labels.numpy()):
        raise ValueError(
            f"expected the clean labels of {path} to equal those of the cifar10 training set, row by row, got others. "
            "The images may be in another order."
        )
    human = torch.from_numpy(table.column(HUMAN_COLUMNS[which]).to_numpy().astype(np.int64))
    if int(human.min()) < 0 or int(human.max()) >= data.classes:
        raise ValueError(f"expected labels in [0, {data.classes}), got some outside in {path}.")
    return human


def _imbalanced(labels: Tensor, classes: int, ratio: float, generator: Generator) -> Tensor:
    """Keep n * ratio^(-c / (classes - 1)) of the n images of class c.

    Raises:
        ValueError: a class would have no image left.
    """
    rows = []
    for label in range(classes):
        members = _shuffled_class(labels, label, generator)
        count = round(len(members) * ratio ** (-label / (classes - 1)))
        if not count:
            raise ValueError(
                f"expected an `imbalance` that leaves every class an image, got {ratio:g}, which leaves none of the "
                f"{len(members)} of class {label}. Take a smaller one."
            )
        rows.append(members[:count])
    return torch.cat(rows).sort().values


def _stratified(labels: Tensor, classes: int, size: int, generator: Generator) -> Tensor:
    """Return ``size`` rows in the classes' proportions, rounded by largest remainders."""
    counts = torch.bincount(labels, minlength=classes)
    exact = counts.double() * size / len(labels)
    shares = exact.floor().long()
    largest_first = (exact - shares).argsort(descending=True, stable=True)
    shares[largest_first[: size - int(shares.sum())]] += 1
    rows = [_shuffled_class(labels, label, generator)[: int(shares[label])] for label in range(classes)]
    return torch.cat(rows).sort().values


def _shuffled_class(labels: Tensor, label: int, generator: Generator) -> Tensor:
    members = (labels == label).nonzero().squeeze(1)
    return members[torch.randperm(len(members), generator=generator)]
