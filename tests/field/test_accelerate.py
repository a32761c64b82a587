"""Accelerate: a clock that is never stepped, in loops as people write them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate")

from accelerate import Accelerator

import batchtrim
from batchtrim.integrations.accelerate import log, register


def train(keep: Any, epochs: int, step: str, accumulation: int = 1, prepared_last: bool = False) -> batchtrim.Trimmer:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    torch.manual_seed(0)
    rows = DataLoader(TensorDataset(torch.randn(12, 5), torch.randint(0, 3, (12,))), 4)
    model: Any = nn.Linear(5, 3)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if prepared_last:
        trim = register(accelerator, batchtrim.Trimmer(keep, total=epochs))
    model, optimizer, loader = accelerator.prepare(model, optimizer, rows)
    if not prepared_last:
        trim = register(accelerator, batchtrim.Trimmer(keep, total=epochs * (3 if step == "batch" else 1)))
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(trim(F.cross_entropy(model(x), y, reduction="none")))
                optimizer.step()
                optimizer.zero_grad()
            if step == "batch":
                trim.step()
        log(accelerator, trim)
        if step == "epoch":
            trim.step()
    return trim


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("prepared_last", [False, True])
def test_a_clock_that_is_never_stepped_is_reported_once(accumulation: int, prepared_last: bool) -> None:
    with pytest.warns(UserWarning, match=r"expected trim.step\(\) to be called") as told:
        trim = train(batchtrim.linear(1.0, 0.2), 4, "never", accumulation, prepared_last)
    assert len(told) == 1
    assert trim.keep == 1.0


@pytest.mark.parametrize("call", [register, log])
def test_arguments_in_another_order(call: Any) -> None:
    """An AttributeError of a method that the user does not know."""
    with pytest.raises(TypeError, match=r"expected `accelerator` to be the Accelerator, got Trimmer\(.* The order is"):
        call(batchtrim.Trimmer(0.5), Accelerator(cpu=True))


@pytest.mark.parametrize("step", ["epoch", "batch"])
def test_a_clock_that_is_stepped_is_not_reported(step: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(batchtrim.linear(1.0, 0.2), 4, step).steps == 4 * (3 if step == "batch" else 1)


@pytest.mark.parametrize("divided", [1, 2])
def test_losses_that_add_up_are_not_divided_in_silence(divided: int) -> None:
    """With gradient_accumulation_steps=2 beside batchtrim.accumulate, the gradient was half of what it should be."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=divided)
    trim = register(accelerator, batchtrim.Trimmer(0.5))
    step = batchtrim.TrimmedForward(nn.Linear(5, 3), nn.CrossEntropyLoss(), trim, "exact")
    batches = [(torch.randn(4, 5), torch.zeros(4, dtype=torch.int64))] * 2
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for loss in batchtrim.accumulate(step, batches):
            accelerator.backward(loss)
    assert ["accelerator.backward divides" in str(each.message) for each in told] == [True] * (divided - 1)
    assert all(each.filename == __file__ for each in told)
