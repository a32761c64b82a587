"""Sanity checks: the network fits the images and the memory, the batch fits the data, and a run beats chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from batchtrim._checks import first_line
from batchtrim._machine import memory
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.task import models
from batchtrim.lab.task.data import ImageData
from batchtrim.lab.task.names import known_as
from batchtrim.lab.task.own_models import is_own_model

DID_NOT_LEARN = "nothing was learnt: the error is no better than that of always predicting the most common class"
LOST = 0.05  # a class of which fewer of the test images are classified right was not learnt
FEWEST = 20  # test images of a class; fewer say too little
SHOWN = 5  # names in a note
BYTES_A_PARAMETER = 16  # bytes per parameter: weight, gradient and two moments, in float32


def check_network(config: RunConfig, images: ImageData) -> None:
    """Raise a ValueError if the network cannot be built for these images, or does not fit into memory.

    It is built and called on the meta device, so even an absurd width costs nothing. The user's networks are tried
    elsewhere.
    """
    if is_own_model(config.model):
        return
    named = f"`{config.model}` of `width` {config.width} to fit images of {' x '.join(map(str, images.shape))}"
    try:
        with torch.device("meta"):
            model = models.build(config.model, images.shape, images.classes, config.width, config.norm)
            model.eval()(torch.empty(2, *images.shape))
    except (AssertionError, RuntimeError, ZeroDivisionError, TypeError) as error:
        first = first_line(error).rstrip(".")
        raise ValueError(f"expected {named}, got an error: {first}. Pass another --width or --model.") from error
    needed, there = BYTES_A_PARAMETER * models.count_parameters(model), memory()
    if config.device == "cpu" and needed > there:
        raise ValueError(
            f"expected {named} and {there / 1e9:.0f} GB of memory, got one that needs {needed / 1e9:,.0f} GB. "
            "Pass a smaller --width."
        )


def notes_on(config: RunConfig, images: ImageData) -> list[str]:
    """Return notes on settings that do not suit the data."""
    size = len(images.train_labels)
    if config.batch_size <= size:
        return []
    return [
        f"batch_size {config.batch_size} is more than the {size:,} training images of {known_as(config.dataset)}: "
        "every epoch is a single step"
    ]


def no_better_than_chance(error: float, labels: Tensor) -> bool:
    """Return True if a test error is within two standard errors of always predicting the most common class.

    Of so few images that this would hold for an error of 0, it has to be at least as high.
    """
    chance = 1.0 - float(torch.bincount(labels).max()) / len(labels)
    limit = chance - 2.0 * math.sqrt(chance * (1.0 - chance) / len(labels))
    return error >= (limit if limit > 0.0 else chance)


def notes_on_result(learnt: bool, right: Sequence[float], images: ImageData) -> list[str]:
    """Return notes on what a finished run did not learn.

    Args:
        learnt: False if its error is no better than chance.
        right: test images of each class that it classified right, (classes,); empty if unknown.
    """
    if not learnt:
        return [DID_NOT_LEARN]
    sizes = torch.bincount(images.test_labels, minlength=images.classes).tolist()
    lost = [number for number, hits in enumerate(right) if sizes[number] >= FEWEST and hits < LOST * sizes[number]]
    if not lost:
        return []
    named = ", ".join(str(images.class_names[each] if images.class_names else each) for each in lost[:SHOWN])
    more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    return [
        f"{len(lost)} of {images.classes} classes {'was' if len(lost) == 1 else 'were'} not learnt (less than "
        f"{100 * LOST:g} % of the test images right): {named}{more}"
    ]
