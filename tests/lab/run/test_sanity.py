"""Sanity checks before the first run, and whether a run learnt anything."""

from __future__ import annotations

import functools
import re
import types

import pytest
import torch

from batchtrim.lab.run import loading, sanity, train
from batchtrim.lab.run.config import RunConfig


@pytest.mark.parametrize(
    ("model", "width", "words"), [("vit", 7, "another --width"), ("mlp", 10**7, "GB"), ("resnet8", 10**6, "GB")]
)
def test_a_width_that_does_not_fit_is_found_before_the_first_run(model: str, width: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loading.prepare(RunConfig(model=model, width=width).resolved(), None, None)


@pytest.mark.parametrize("model", ["mlp", "cnn", "vit", "speed", "speed_lite", "resnet8", "resnet18"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_registry_fits(model: str, norm: str) -> None:
    assert loading.prepare(RunConfig(model=model, norm=norm).resolved(), None, None) == ()


def test_a_batch_larger_than_the_data_is_reported() -> None:
    (note,) = loading.prepare(RunConfig(batch_size=300, train_size=200).resolved(), None, None)
    assert "batch_size 300 is more than the 200 training images" in note


def test_a_run_no_better_than_chance_did_not_learn() -> None:
    labels = torch.arange(10).repeat(100)
    assert sanity.no_better_than_chance(0.9, labels)
    assert sanity.no_better_than_chance(0.89, labels)
    assert not sanity.no_better_than_chance(0.8, labels)
    assert not sanity.no_better_than_chance(0.0, labels[:2])  # of two test images, both are right
    assert sanity.no_better_than_chance(0.5, labels[:2])
    row = train.train_run(RunConfig(lr=1e9, epochs=1, train_size=200))
    assert row["status"] == "diverged" or row["did_not_learn"]
    assert "did_not_learn" not in train.train_run(RunConfig(lr=1e-2, epochs=3, train_size=400))


def test_the_test_set_can_be_smaller_and_is_the_same_for_every_seed() -> None:
    first, second = (loading.load_images(RunConfig(seed=seed, test_size=50)) for seed in (0, 1))
    assert len(first.test_labels) == 50
    assert first.test_labels.unique().tolist() == list(range(10))
    assert torch.equal(first.test_images, second.test_images)
    assert RunConfig().resolved().key != RunConfig(test_size=50).resolved().key
    with pytest.raises(ValueError, match="test_size"):
        loading.load_images(RunConfig(test_size=10**6))


def test_signs_of_life_come_from_the_first_batch_on() -> None:
    told: list[dict[str, int]] = []
    row = train.train_run(RunConfig(epochs=1, train_size=300, batch_size=100).resolved(), on_batch=told.append)
    assert told[0] == {"epoch": 0, "epochs": 1, "batch": 1, "batches": 3}
    assert row["seconds_total"] >= row["seconds"] + row["seconds_eval"]


def test_classes_that_were_not_learnt_are_named() -> None:
    """One class of ten was lost, which costs 8 points, and only the error told."""
    row = train.train_run(RunConfig(method="loss_mass", method_params={"skip": 0.6}, epochs=3, seed=0))
    (note,) = row["notes"]
    assert re.match(r"6 of 10 classes were not learnt \(.*\): 0, 1, 2, 3, 4 and 1 more$", note)
    images = types.SimpleNamespace(
        classes=3, test_labels=torch.tensor([0] * 40 + [1] * 40 + [2] * 10), class_names=("cat", "dog", "owl")
    )
    notes = functools.partial(sanity.notes_on_result, images=images)
    assert notes(True, [40.0, 1.0, 0.0]) == [
        "1 of 3 classes was not learnt (less than 5 % of the test images right): dog"
    ]
    assert notes(True, [40.0, 2.0, 0.0]) == notes(True, []) == []
    assert notes(False, [40.0, 1.0, 0.0]) == [sanity.DID_NOT_LEARN]
