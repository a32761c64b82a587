"""Classes that a network loses if the hardest samples are left out, from the first step or later: tasks for the lab.

    batchtrim compare --task studies/lost_classes.py:train records/2026-11-27-lost-classes/config.toml --out runs/lost
    batchtrim compare --task studies/lost_classes.py:train_late records/2026-11-27-lost-classes/late.toml \\
        --out runs/lost-late

10,000 images of CIFAR-10 with the labels that people gave (17 % wrong), the ``speed_lite`` network of width 16. A class
is lost if fewer than one in twenty of its test images are recognised. ``train_late`` leaves nothing out in the first
quarter of training. ``BATCHTRIM_DATA`` names the folder that holds cifar10 and cifar10n.
"""

from __future__ import annotations

import os
from functools import cache

import pandas  # noqa: F401  # so that the time of the first run is without it
import torch
import torch.nn.functional as F
from torch import Tensor

import batchtrim
from batchtrim.lab import Run
from batchtrim.lab.task import conditions, data, models
from batchtrim.lab.task.augment import Batches

BATCH, RATE, LATE, LOST = 256, 0.5, 0.25, 0.05


@cache
def images() -> data.ImageData:
    folder = os.environ["BATCHTRIM_DATA"]
    return conditions.apply(
        data.load("cifar10", folder), label_noise="human:random1", train_size=10_000, test_size=5_000, data_dir=folder
    )


def train(run: Run) -> dict[str, float]:
    """Train with the method's rule from the first step on."""
    return _train(run, start=0.0)


def train_late(run: Run) -> dict[str, float]:
    """Train with the method's rule, but leave out no hardest samples in the first quarter of training."""
    return _train(run, start=LATE)


def _train(run: Run, start: float) -> dict[str, float]:
    found = images()
    shape = tuple(found.train_images.shape[1:])
    model = models.build("speed_lite", shape, found.classes, 16)  # type: ignore[arg-type]
    model.prepare(found.train_images, found.mean, found.std)  # type: ignore[operator]
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = Batches(found.train_images, found.mean, found.std, "crop+flip", run.seed)
    steps = run.epochs * -(-len(found.train_labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    rule = run.rule.rule
    for epoch in range(run.epochs):
        run.rule.rule = rule if epoch >= start * run.epochs else _without_skip(rule)
        for rows in torch.randperm(len(found.train_labels)).split(BATCH):
            losses = F.cross_entropy(model(batches(rows)), found.train_labels[rows], reduction="none")
            loss = run.trim(losses)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        run.log(epoch=epoch)
        run.trim.step()
    recognised = _recognised(model, found)
    return {"error": 1.0 - float(recognised.mean()), "lost": int((recognised < LOST).sum())}


def _without_skip(rule: object) -> object:
    if isinstance(rule, batchtrim.loss_mass):
        return batchtrim.loss_mass()
    return batchtrim.hardest() if isinstance(rule, batchtrim.between) else rule


def _recognised(model: torch.nn.Module, found: data.ImageData) -> Tensor:
    """Return the share of each class's test images that is classified right, (classes,)."""
    model.eval()
    batches = Batches(found.test_images, found.mean, found.std)
    with torch.no_grad():
        outputs = torch.cat([model(batches(rows)) for rows in torch.arange(len(found.test_labels)).split(1000)])
    right = (outputs.argmax(1) == found.test_labels).float()
    return torch.stack([right[found.test_labels == each].mean() for each in range(found.classes)])
