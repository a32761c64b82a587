"""A torch release that the engine does not support: refused with the reason, and ``auto`` runs ``exact``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

import batchtrim
from batchtrim.errors import EngineFallback, EngineRefused

X, Y = torch.randn(8, 4), torch.randint(0, 3, (8,))


def stepper(engine: str) -> batchtrim.TrimmedForward:
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
    return batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine=engine)


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1"))


@pytest.mark.usefixtures("older")
def test_shared_names_the_release_it_needs() -> None:
    with pytest.raises(EngineRefused, match=r"capture needs torch 2\.8 or newer, and this is torch 2\.7\.1"):
        stepper("shared")(X, Y)


@pytest.mark.usefixtures("older")
def test_auto_trains_exactly_and_says_why() -> None:
    with pytest.warns(EngineFallback, match=r"needs torch 2\.8 or newer.* Continuing with engine='exact'"):
        step = stepper("auto")
    step(X, Y).backward()
    assert step.last is not None
    assert step.last.engine == "exact"


def test_a_release_that_dropped_something_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.fx.experimental._config.use_duck_shape")
    with pytest.raises(EngineRefused, match="lacks what it captures with"):
        stepper("shared")(X, Y)
