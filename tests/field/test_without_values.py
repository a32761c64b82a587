"""Tensors of a shape only: on the meta device, or of torch's FakeTensorMode, which estimates memory without data."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import batchtrim
from batchtrim import KeepLog, Losses, Selection, TrimmedForward, Trimmer, errors, loss_mass, uniform
from batchtrim.selection import above

KINDS = pytest.mark.parametrize(("device", "mode"), [("meta", contextlib.nullcontext), ("cpu", FakeTensorMode)])


def errors_of(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square().mean(1)


class OwnCriterion(nn.Module):
    reduction = "mean"

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        losses = errors_of(outputs, y)
        return losses.mean() if self.reduction == "mean" else losses


def first_half(losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
    return Selection(losses.argsort()[: len(losses) // 2], len(losses), len(losses))


@KINDS
@pytest.mark.parametrize("scale", ["kept", "batch"])
@pytest.mark.parametrize(
    "rule",
    [batchtrim.hardest(), batchtrim.easiest(), batchtrim.between(), batchtrim.superquantile(), uniform(), first_half],
    ids=lambda rule: getattr(rule, "__name__", repr(rule)),
)
def test_a_rule_whose_k_follows_from_keep_takes_tensors_without_values(
    device: str, mode: Callable[[], Any], rule: Any, scale: str
) -> None:
    """FakeTensorMode ended in torch's DataDependentOutputException: aten._local_scalar_dense.default."""
    trim = Trimmer(0.3, select=rule, scale=scale)
    with mode():
        losses = torch.rand(8, device=device, requires_grad=True)
        loss = trim(losses)
        loss.backward()
    assert loss.shape == ()
    assert losses.grad is not None
    assert trim.last_selection is not None
    assert trim.last_selection.k == {first_half: 4, batchtrim.superquantile(): 3}.get(rule, 2)
    assert trim.stats.compute()["batches"] == 0
    assert trim(torch.tensor([1.0, 2.0, 3.0, 4.0])).isfinite()  # and real ones afterwards


@KINDS
@pytest.mark.parametrize(
    "call",
    [
        lambda at: Trimmer(0.9, select=loss_mass())(torch.rand(8, device=at)),
        lambda at: Trimmer(0.9, select=uniform(like=loss_mass()))(torch.rand(8, device=at)),
        lambda at: above(0.5)(torch.rand(8, device=at), 1.0),
        lambda at: batchtrim.percentile()(torch.rand(8, device=at), 1.0),
        lambda at: batchtrim.percentile_topk()(torch.rand(8, device=at), 0.5),
        lambda at: Trimmer(0.5)(torch.rand(8, device=at), mask=torch.ones(8, dtype=torch.bool, device=at)),
        lambda at: next(window(at)),
        lambda at: logged(at),
    ],
)
def test_what_reads_values_says_that_there_are_none(device: str, mode: Callable[[], Any], call: Any) -> None:
    wanted = pytest.raises(TypeError, match=r"with values for .*, got a tensor .*(meta device|FakeTensorMode)")
    with warnings.catch_warnings(action="error"), mode(), wanted:
        call(device)


def window(device: str) -> Any:
    step = TrimmedForward(nn.Linear(5, 3, device=device), errors_of, Trimmer(0.5), "exact")
    return batchtrim.accumulate(
        step, [(torch.rand(4, 5, device=device), torch.rand(4, 3, device=device))] * 2, "window"
    )


def logged(device: str) -> None:
    trim = Trimmer(0.5)
    trim(torch.rand(8, device=device))
    KeepLog(8).record(trim.last, ids=torch.arange(8))


@KINDS
def test_losses_and_criteria_take_tensors_without_values(device: str, mode: Callable[[], Any]) -> None:
    with mode():
        outputs, y = torch.rand(8, 3, device=device), torch.rand(8, 3, device=device)
        assert Trimmer(0.5)(batchtrim.per_sample(OwnCriterion())(outputs, y)).shape == ()
        weighted = Losses(outputs, weights=y)
        assert Trimmer(0.5)(Losses(outputs) + weighted).shape == ()


@KINDS
@pytest.mark.parametrize("engine", ["two_pass", "shared", "auto"])
def test_engines_that_check_by_values_refuse_and_auto_runs_exact(
    device: str, mode: Callable[[], Any], engine: str
) -> None:
    with mode():
        model = nn.Sequential(nn.Linear(5, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 3))
        step = TrimmedForward(model.to(device) if device == "meta" else model, errors_of, Trimmer(0.5), engine)
        x, y = torch.rand(64, 5, device=device), torch.rand(64, 3, device=device)
        if engine == "auto":
            with warnings.catch_warnings(action="ignore", category=errors.EngineFallback):
                step(x, y).backward()
            assert step.last is not None
            assert step.last.engine == "exact"
        else:
            with pytest.raises(errors.EngineRefused, match=r"shape only|a mode that sees every operator"):
                step(x, y)
