"""What a trace's guards do not watch: methods, code, the loss, the environment, and on an older torch attributes."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn

import batchtrim
from batchtrim.engine.unguarded import Unguarded


class Schedule:
    def now(self) -> float:
        return 1.0


class Asking(zoo.Part):
    """Asks a plain object, and a variable of the environment."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = Schedule()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.schedule.now() * float(os.getenv("BATCHTRIM_TEST_SCALE", "1"))


UNSEEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "method of a plain object": lambda patch: patch.setattr(Schedule, "now", lambda self: 2.0),
    "method of the loss": lambda patch: patch.setattr(nn.CrossEntropyLoss, "forward", lambda self, out, y: out),
    "method of a tensor": lambda patch: patch.setattr(torch.Tensor, "tanh", torch.sin, raising=False),
    "code": lambda patch: patch.setattr(zoo.Part.squashed, "__code__", zoo.Part.forward.__code__),
    "environment": lambda patch: patch.setenv("BATCHTRIM_TEST_SCALE", "2"),
}


@pytest.mark.parametrize("change", UNSEEN)
def test_a_change_elsewhere_is_noticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unguarded = Unguarded(batchtrim.TrimmedForward(Asking(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5)).forward)
    assert not unguarded.changed()
    UNSEEN[change](monkeypatch)
    named = {"environment": "a variable of os.environ", "code": "the code of one of its functions"}
    assert unguarded.changed() == named.get(change, "a method or attribute of its classes")


def test_a_variable_added_to_the_environment_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looking(zoo.Part):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * (2 if "BATCHTRIM_TEST_EXTRA" in os.environ else 1)

    unguarded = Unguarded(batchtrim.TrimmedForward(Looking(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5)).forward)
    assert not unguarded.changed()
    monkeypatch.setenv("BATCHTRIM_TEST_EXTRA", "1")
    assert unguarded.changed()


def test_an_attribute_that_a_parameter_gains_is_noticed_on_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchtrim.engine.unguarded._WATCHES_TENSORS", False)
    model = nn.Sequential(nn.Linear(6, 8), zoo.Part(), nn.Linear(8, 5))
    unguarded = Unguarded(batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5)).forward)
    next(model.parameters())._dynamo_mark = 1  # type: ignore[attr-defined]
    assert not unguarded.changed()
    next(model.parameters()).scale = 2.0  # type: ignore[attr-defined]
    assert unguarded.changed()


def test_classes_that_come_later_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 8), zoo.Part(), nn.Linear(8, 5))
    unguarded = Unguarded(batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5)).forward)
    model.append(Asking())  # type: ignore[operator]
    unguarded.look()  # as after each new trace
    assert not unguarded.changed()
    monkeypatch.setattr(Schedule, "now", lambda self: 2.0)
    assert unguarded.changed()
