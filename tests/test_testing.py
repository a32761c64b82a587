"""The public check tells a right engine from a wrong one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from batchtrim import Losses, Selection, TrimmedForward, Trimmer
from batchtrim.engine import shared
from batchtrim.testing import check_engine


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, 6), torch.randint(0, 3, (16,))


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


@pytest.mark.parametrize("engine", ["shared", "auto", "exact"])
def test_right_engines_pass(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    network = model()
    data = batch()
    before = torch.get_rng_state()
    report = check_engine(network, data, nn.CrossEntropyLoss(), engine=engine, keep=0.4)
    assert torch.equal(before, torch.get_rng_state())
    assert report.ok
    assert report.gradient_error < 1e-6
    assert "against 'exact', 6 steps: ok" in capsys.readouterr().out
    assert all(parameter.grad is None for parameter in network.parameters())


def test_two_pass_with_dropout_is_told_apart() -> None:
    report = check_engine(model(), batch(), nn.CrossEntropyLoss(), engine="two_pass", keep=0.4, verbose=False)
    assert not report.ok
    assert "NOT THE SAME" in str(report)


def test_a_broken_engine_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(kept: Losses, selection: Selection, trim: Trimmer) -> torch.Tensor:
        return kept.values.sum() / selection.size

    monkeypatch.setattr(shared, "kept_loss", wrong)
    report = check_engine(model(), batch(), nn.CrossEntropyLoss(), keep=0.5, verbose=False)
    assert not report.ok
    assert report.gradient_error == pytest.approx(0.5, rel=1e-4)  # half of the samples kept, divided by all


def test_one_that_breaks_later_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    kept_loss, calls = shared.kept_loss, []

    def later_nan(*given: Any) -> torch.Tensor:
        calls.append(given)
        return kept_loss(*given) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(shared, "kept_loss", later_nan)
    report = check_engine(model(), batch(), nn.CrossEntropyLoss(), verbose=False)
    assert len(calls) == report.steps
    assert not report.ok
    assert math.isnan(report.gradient_error)
    with pytest.raises(ValueError, match="expected `steps` to be at least 1, got 0"):
        check_engine(model(), batch(), nn.CrossEntropyLoss(), steps=0)


def test_refusal_is_reported() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.b(torch.tanh(x - x.mean(0)))

    report = check_engine(Mixing(), batch(), nn.CrossEntropyLoss(), verbose=False)
    assert not report.ok
    assert "depends on the other samples" in str(report)


def test_batch_norm_is_judged_by_its_direction() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    report = check_engine(network, batch(), nn.CrossEntropyLoss(), keep=0.6, verbose=False)
    assert report.batch_norm
    assert report.ok
    assert "BatchNorm couples samples" in str(report)


def test_arguments_the_other_way_round() -> None:
    batch = torch.randn(8, 3), torch.randint(2, (8,))
    with pytest.raises(TypeError, match=r"expected `batch` to be \(x, y\), got CrossEntropyLoss\(\)"):
        check_engine(nn.Linear(3, 2), nn.CrossEntropyLoss(), batch)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"callable, got a tuple of a tensor of shape \(8, 3\) and dtype"):
        TrimmedForward(nn.Linear(3, 2), batch, Trimmer(0.5))  # type: ignore[arg-type]
