"""Engines with the rule `loss_mass`, whose k follows from the losses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim import TrimmedForward, Trimmer, loss_mass
from batchtrim.selection import above
from tiers import few


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Return each parameter's gradient, which is then removed from it."""
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("engine", "scale"),
    few(
        itertools.product(["exact", "two_pass", "shared", "auto"], ["kept", "batch"]),
        [("exact", "kept"), ("exact", "batch"), ("two_pass", "kept"), ("shared", "batch")],
    ),
)
def test_engines_read_k_from_the_selection(engine: str, scale: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    trim = Trimmer(0.5, select=loss_mass(), scale=scale)
    plain = Trimmer(0.5, select=loss_mass(), scale=scale)
    step = TrimmedForward(model, nn.CrossEntropyLoss(), trim, engine)
    for _ in range(3):
        x, y = torch.randn(32, 6), torch.randint(3, (32,))
        own = gradients(model, step(x, y))
        expected = gradients(model, plain(F.cross_entropy(model(x), y, reduction="none")))
        torch.testing.assert_close(expected, own)
        assert step.last is not None
        assert step.last.selection.k == plain.last_selection.k  # type: ignore[union-attr]


@pytest.mark.parametrize("engine", ["two_pass", "shared"])
@pytest.mark.parametrize(
    "rule",
    [lambda: above(1.0), batchtrim.percentile, lambda: batchtrim.uniform(like=above(1.0))],
    ids=["above", "percentile", "uniform"],
)
def test_engines_drop_rows_at_keep_1_for_rules_that_do_not_read_it(rule: Any, engine: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    exact, step = (
        TrimmedForward(model, nn.CrossEntropyLoss(), Trimmer(1.0, select=rule()), name) for name in ("exact", engine)
    )
    for _ in range(3):
        x, y = torch.randn(32, 6), torch.randint(3, (32,))
        own = gradients(model, step(x, y))
        torch.testing.assert_close(gradients(model, exact(x, y)), own)
        assert step.last is not None
        assert step.last.engine == engine
        assert step.last.selection.k < 32


def test_auto_saves_where_few_hold_the_mass_and_stays_plain_where_k_is_near_b(monkeypatch: pytest.MonkeyPatch) -> None:
    trim = Trimmer(0.9, select=loss_mass(), scale="batch")
    step = TrimmedForward(nn.Linear(6, 3), nn.CrossEntropyLoss(), trim, "auto")
    auto: Any = step.engine
    monkeypatch.setattr(auto.saving, "pays", lambda x, y: True)  # whatever the model's size
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    assert not auto.pays(x, y), "nothing known: keep is 0.9"
    trim(torch.rand(64) + 5.0)
    assert not auto.pays(x, y), "losses are alike: nearly all are kept"
    trim(torch.where(torch.arange(64) < 4, 5.0, 0.001))
    assert auto.pays(x, y), "4 of 64 hold it"


def test_a_window_is_one_batch() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(24, 4), torch.randint(3, (24,))
    step = TrimmedForward(model, nn.CrossEntropyLoss(), Trimmer(0.6, select=loss_mass(), scale="batch"), "exact")
    for loss in batchtrim.accumulate(step, [(x[:7], y[:7]), (x[7:], y[7:])]):
        loss.backward()
    found = model.weight.grad.clone()  # type: ignore[union-attr]
    model.zero_grad()
    Trimmer(0.6, select=loss_mass(), scale="batch")(F.cross_entropy(model(x), y, reduction="none")).backward()
    torch.testing.assert_close(model.weight.grad, found)
