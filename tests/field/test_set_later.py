"""Settings that are assigned after an object was made: they take effect, or are refused; none is ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim import Losses, Trimmer, per_sample

LOSSES = torch.arange(8.0)


def step() -> batchtrim.TrimmedForward:
    return batchtrim.TrimmedForward(nn.Linear(3, 2), nn.CrossEntropyLoss(), Trimmer(0.5), "exact")


def criterion() -> per_sample:
    return per_sample(nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    ("make", "name", "value", "cure"),
    [
        (lambda: Trimmer(0.5), "select", batchtrim.easiest(), r"The rule is trim\.rule"),
        (lambda: Trimmer(0.5), "keep", 0.25, r"Call step\(\)"),
        (lambda: Trimmer(total=5), "total", 10, r"load this one's state_dict\(\)"),
        (step, "trim", Trimmer(0.25), "Make a new TrimmedForward"),
        (step, "engine", "shared", "Make a new TrimmedForward"),
        (step, "model", nn.Linear(3, 2), "Make a new TrimmedForward"),
        (step, "rank_by", F.cross_entropy, "Make a new TrimmedForward"),
        (step, "per_sample_loss", nn.MSELoss(), "Make a new TrimmedForward"),
        (criterion, "reduction", "sum", "change the criterion itself"),
        (criterion, "ignore_index", 255, "change the criterion itself"),
        (lambda: batchtrim.KeepLog(8), "n", 16, "Make a new KeepLog"),
        (lambda: batchtrim.KeepLog(8), "classes", 3, "Make a new KeepLog"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_setting_that_stays(make: Callable[[], Any], name: str, value: Any, cure: str) -> None:
    """The trimmer of a step, its model, its engine and a rule by the name of its argument were taken and ignored."""
    made = make()
    before = getattr(made, name)
    with pytest.raises(AttributeError, match=rf"expected `{name}` of .* to be read only, got an assignment\. .*{cure}"):
        setattr(made, name, value)
    assert getattr(made, name) == before


@pytest.mark.parametrize("name", ["distributed", "warn"])
def test_a_flag_set_to_text_is_refused(name: str) -> None:
    log = batchtrim.KeepLog(8)
    with pytest.raises(TypeError, match=f"`{name}` to be True or False, got 'no'"):
        setattr(log, name, "no")


def test_the_unit_of_a_criterion() -> None:
    """An unknown one left the losses as they were."""
    losses = criterion()
    with pytest.raises(ValueError, match="`unit` to be one of 'sample', 'element', got 'pixel'"):
        losses.unit = "pixel"
    outputs, targets = torch.randn(2, 3, 4), torch.randint(0, 3, (2, 4))
    losses.unit = "element"
    expected = F.cross_entropy(outputs, targets, reduction="none").flatten().topk(4).values.mean()
    torch.testing.assert_close(Trimmer(0.5, unit="element")(losses(outputs, targets)), expected)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("mask", torch.ones(6, dtype=torch.bool), r"`mask` to have the shape of `losses`, \(8,\), got \(6,\)"),
        ("weights", torch.ones(4), r"`weights` to have the shape of `losses`"),
        ("reduction", "summ", r"`reduction` to be one of 'mean', 'sum', got 'summ'"),
    ],
)
def test_a_part_of_losses_that_does_not_fit(name: str, value: Any, says: str) -> None:
    """An unknown reduction was a mean; parts of another shape ended in an error of torch's."""
    losses = Losses(LOSSES.clone().requires_grad_())
    setattr(losses, name, value)
    with pytest.raises((ValueError, TypeError), match=says):
        Trimmer(0.5)(losses)
    with pytest.raises((ValueError, TypeError), match=says):
        Trimmer(0.5)(LOSSES, rank_by=losses)

    def broken(outputs: Tensor, targets: Tensor) -> Losses:
        found = Losses(F.cross_entropy(outputs, targets, reduction="none"))
        setattr(found, name, value)
        return found

    with pytest.raises((ValueError, TypeError), match=says):
        batchtrim.TrimmedForward(nn.Linear(3, 2), broken, Trimmer(0.5), "exact")(
            torch.randn(8, 3), torch.zeros(8, dtype=torch.int64)
        )


def test_a_part_of_losses_that_fits() -> None:
    losses = Losses(LOSSES)
    losses.mask = LOSSES < 4
    assert Trimmer(0.5)(losses).item() == 2.5


@pytest.mark.parametrize("name", ["beta", "history"])
def test_the_settings_of_a_rule_with_a_state(name: str) -> None:
    """It was the only rule whose settings could be changed, to a negative history too."""
    rule = batchtrim.percentile()
    Trimmer(0.5, select=rule)(LOSSES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(rule, name, -4)
