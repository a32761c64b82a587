"""What only shows after many steps: traces that would run out, and memory that would not be given back."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import batchtrim
from batchtrim.engine import shared

BATCH = 12


def _batch(number: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100 + number)
    return zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))


def _shared(model: nn.Module) -> Any:
    return batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")


def _is_right(step: Any, number: int, state: dict[str, Any]) -> None:
    """Train a step, and compare it with the gradient of the kept rows from the same state of the model."""
    model, (x, y) = step.model, _batch(number)
    vars(model).update(state)
    step(x, y).backward()
    assert step.last.engine == "shared"
    found = [p.grad for p in model.parameters()]
    after = {name: getattr(model, name) for name in state}
    vars(model).update(state)
    model.zero_grad()
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    losses.topk(BATCH // 2).values.mean().backward()
    assert after == {name: getattr(model, name) for name in state}
    for own, p in zip(found, model.parameters(), strict=True):
        assert (own is None) == (p.grad is None)
        assert own is None or torch.allclose(own, p.grad, atol=1e-6)
    model.zero_grad()


class Counting(zoo.Mlp):
    """Counts its calls, and grows with them."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + self.calls / 10)


def test_a_count_that_changes_in_every_step_does_not_run_out_of_traces() -> None:
    torch.manual_seed(0)
    step = _shared(Counting(8))
    step.engine.capture.limit = 1
    for number in range(6):
        _is_right(step, number, {"calls": number})
    assert step.engine.capture.traces == 2


def test_training_in_phases_does_not_run_out_of_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_LASTS", 3)
    torch.manual_seed(0)
    model = zoo.Mlp(8)
    step = _shared(model)
    parameters = list(model.parameters())
    for number in range(4 * len(parameters[:4])):
        for at, parameter in enumerate(parameters):
            parameter.requires_grad_(at >= number // 4)
        step.engine.capture.limit = 1
        _is_right(step, number, {})


def test_a_step_gives_back_its_model() -> None:
    model = zoo.Mlp(8)
    step = _shared(model)
    step(*_batch(0)).backward()
    held = weakref.ref(model)
    del step, model
    gc.collect()
    assert held() is None


def test_backward_runs_after_the_step_is_gone() -> None:
    model = zoo.Mlp(8)
    step = _shared(model)
    loss = step(*_batch(0))
    del step
    gc.collect()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
