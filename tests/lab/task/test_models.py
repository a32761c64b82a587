"""Networks: published sizes, shapes, widths, norms."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from batchtrim.lab.task import models, names
from batchtrim.lab.task.own_code import YourCodeFailed
from batchtrim.lab.task.own_models import build_own, try_own
from tiers import few

# He et al. 2015, table 6, gives 0.27M and 0.46M for 20 and 32 layers; these are the exact counts of that design with
# padded shortcuts. resnet18 and resnet34 with a 3 x 3 stem: the counts in common use for CIFAR-10.
PUBLISHED = {"resnet20": 269_722, "resnet32": 464_154, "resnet18": 11_173_962, "resnet34": 21_282_122}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_sizes_are_the_published_ones(name: str, count: int) -> None:
    assert models.count_parameters(models.build(name, (3, 32, 32), 10)) == count


SMALL = [name for name in models.MODELS if name not in ("resnet18", "resnet34")]
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]


@pytest.mark.parametrize(
    ("name", "shape"),
    few(itertools.product(SMALL, SHAPES), [(name, SHAPES[at % 3]) for at, name in enumerate(SMALL)]),
)
def test_every_network_takes_every_data_set(name: str, shape: tuple[int, int, int]) -> None:
    model = models.build(name, shape, 7, width=8)
    outputs = model(torch.randn(2, *shape))
    assert outputs.shape == (2, 7)
    outputs.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_registry_holds_the_networks_that_help_lists() -> None:
    assert tuple(models.MODELS) == names.MODELS


def test_layers_are_counted_as_the_name_says() -> None:
    for name, wanted in (("resnet8", 8), ("resnet14", 14), ("resnet26", 26), ("resnet32", 32)):
        model = models.build(name, (3, 32, 32), 10)
        assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == wanted


def test_group_norm_leaves_no_batch_statistics() -> None:
    model = models.build("resnet8", (3, 32, 32), 10, norm="group").train()
    assert not list(model.buffers())
    inputs = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(inputs)[:2], model(inputs[:2]))


def test_names_and_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'resnet20'\?"):
        models.build("resent20", (3, 32, 32), 10)
    with pytest.raises(ValueError, match=r"`norm` to be one of batch, group"):
        models.build("resnet8", (3, 32, 32), 10, norm="layer")
    with pytest.raises(ValueError, match=r"`width` to be a positive int, got 0"):
        models.build("resnet8", (3, 32, 32), 10, width=0)


def test_weights_come_from_the_global_seed() -> None:
    first, again, other = (
        (torch.manual_seed(seed), models.build("cnn", (1, 8, 8), 10))[1].state_dict() for seed in (1, 1, 2)
    )
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["0.weight"].equal(other["0.weight"])


def test_a_network_that_ends_the_process_is_an_error(tmp_path: Path) -> None:
    """The command ended without a word."""
    (tmp_path / "mine.py").write_text("def build(shape, classes):\n    raise SystemExit(2)\n")
    with pytest.raises(YourCodeFailed, match=r"expected mine\.py:build to return a network, got exit\(2\)"):
        build_own(f"{tmp_path / 'mine.py'}:build", (1, 8, 8), 10)


BUILDS = """
import random
import numpy as np
import torch
from torch import nn

def build(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

network = build((1, 8, 8), 10)

def again(shape, classes):
    return network

def head(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), network[1])

def frozen(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, classes))

def seeded(shape, classes):
    torch.manual_seed(7)
    return build(shape, classes)

def otherwise_seeded(shape, classes):
    np.random.seed(7)
    random.seed(7)
    return build(shape, classes)

def drawing(shape, classes):
    np.random.seed(torch.initial_seed() + 1)
    random.random()
    return build(shape, classes)

def soft(shape, classes):
    return nn.Sequential(build(shape, classes), nn.Softmax(1))
"""


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("again", "got weights that it returned before"),
        ("head", "got weights that it returned before"),
        ("network", "to be a function that makes a network, got a network. Each run needs its own"),
        ("seeded", "leave torch's seed as it is, got a call that seeds it with 7: every run would start from the same"),
        ("otherwise_seeded", "leave the seeds .* as they are, got a call that seeds numpy and random: every run would"),
        ("soft", "to give logits, got probabilities, which add up to 1. Leave out the softmax"),
    ],
)
def test_networks_that_would_spoil_a_comparison_are_refused(function: str, says: str, tmp_path: Path) -> None:
    """A run continued from the weights of the one before it, without a word."""
    (tmp_path / "shared.py").write_text(BUILDS)
    with pytest.raises((ValueError, TypeError), match=says):
        try_own(f"{tmp_path / 'shared.py'}:{function}", (1, 8, 8), 10)
    for fine in ("build", "frozen", "drawing"):
        try_own(f"{tmp_path / 'shared.py'}:{fine}", (1, 8, 8), 10)
