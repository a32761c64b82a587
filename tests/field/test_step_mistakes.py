"""A TrimmedForward taken for a module, for its trimmer, or given things in another order; ids without an order."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import batchtrim
from batchtrim import Trimmer


def step() -> batchtrim.TrimmedForward:
    return batchtrim.TrimmedForward(nn.Linear(3, 2), nn.CrossEntropyLoss(), Trimmer(0.5), "exact")


@pytest.mark.parametrize(
    ("name", "owner"), [("parameters", "model"), ("eval", "model"), ("state_dict", "model"), ("step", "trim")]
)
def test_what_its_parts_have(name: str, owner: str) -> None:
    with pytest.raises(AttributeError, match=rf"got \.{name}, which its {owner} has: step\.{owner}\.{name}\."):
        getattr(step(), name)


def test_what_nothing_has() -> None:
    with pytest.raises(AttributeError, match="'TrimmedForward' object has no attribute 'backward'"):
        step().backward  # type: ignore[attr-defined]
    for copied in (copy.deepcopy(step()), pickle.loads(pickle.dumps(step())), copy.copy(step())):
        assert copied.engine.name == "exact"


@pytest.mark.parametrize("given", [(torch.rand(4, 3),), ((torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)),)])
def test_a_step_without_targets_says_so(given: tuple[object, ...]) -> None:
    with pytest.raises(TypeError) as raised:
        step()(*given)
    assert raised.value.__notes__ == ["batchtrim got no targets: step(x, y) gives x to the model, and y to the loss."]


def test_the_loss_before_the_model() -> None:
    with pytest.raises(TypeError, match=r"`model` before the loss, got CrossEntropyLoss\(\)\. Did you mean"):
        batchtrim.TrimmedForward(nn.CrossEntropyLoss(), nn.Linear(3, 2), Trimmer(0.5))  # type: ignore[arg-type]


def test_ids_without_an_order() -> None:
    """A set was taken as it came: losses were counted for other samples."""
    trim, log = Trimmer(0.5), batchtrim.KeepLog(1000)
    trim(torch.arange(3.0))
    for ids in ({700, 5, 300}, frozenset({700, 5, 300})):
        with pytest.raises(TypeError, match=r"`ids` in the order of the losses, got a set, .* Pass a list"):
            log.record(trim.last, ids=ids)
    log.record(trim.last, ids={700: "a", 5: "b", 300: "c"}.keys())
    log.end_epoch()
    assert log.table()["last"][[700, 5, 300]].tolist() == [0.0, 1.0, 2.0]


def test_ids_by_position() -> None:
    trim = Trimmer(0.5)
    trim(torch.arange(3.0))
    with pytest.raises(TypeError, match=r"Name the ids: log\.record\(trim\.last, ids=ids\)"):
        batchtrim.KeepLog(3).record(trim.last, torch.arange(3))
