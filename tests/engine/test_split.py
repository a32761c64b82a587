"""Gradients that the kept rows do not determine are computed from all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attacks.base import C, D, Net, backward_of
from torch import Tensor, nn

import batchtrim
from batchtrim.engine import ENGINES
from batchtrim.engine.shared import SharedEngine
from batchtrim.testing import check_engine
from tiers import few

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says about odd models is not the subject

ones = backward_of(torch.ones_like)


def _run(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(ones(x)))


@pytest.mark.slow
def test_a_constant_gradient_of_the_batch_is_that_of_all_rows() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    batch = torch.randn(12, D, requires_grad=True), torch.randint(0, C, (12,))
    report = check_engine(Net(_run, {}), batch, nn.CrossEntropyLoss(), engine="shared", verbose=False)
    assert report.verdict == "right", report


clipped = backward_of(lambda g: g * (0.05 / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1))
raised = backward_of(lambda g: torch.where(g == 0, 0.01, g))


def _clipped_at_the_output(net: Any, x: Tensor) -> Tensor:
    return clipped(net.t(net.a(x).tanh()))


def _raised_and_clipped(net: Any, x: Tensor) -> Tensor:
    """What rows get that are not kept flows into the weights: all rows compute it."""
    return net.t(clipped(raised(net.t2(net.a(x)))).tanh())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "share"), few([(_clipped_at_the_output, 1.0), (_raised_and_clipped, 0.5)], [(_raised_and_clipped, 0.5)])
)
def test_a_gradient_of_rows_that_are_not_kept_is_computed_on_all_rows(run: Any, share: float) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Net(run, {"t2": nn.Linear(8, 8)})
    batch = torch.randn(12, D), torch.randint(0, C, (12,))
    report = check_engine(net, batch, nn.CrossEntropyLoss(), engine="shared", verbose=False)
    assert report.verdict == "right", report
    step = batchtrim.TrimmedForward(net, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    step(*batch).backward()
    found = step.engine.trace.cost(True).share  # type: ignore[union-attr]
    assert found == 1.0 if share == 1.0 else 0.1 < found < 0.9


def _pair(net: Any, x: Tensor) -> Tensor:
    left, right = net.t(net.a(torch.cat([x, 2 * x])).tanh()).chunk(2)
    return left + (left - right).square()


def _three(net: Any, x: Tensor) -> Tensor:
    z = net.a(torch.cat([x, 2 * x, 3 * x])).tanh()
    return net.t(z[len(x) :]).view(2, len(x), C).mean(0) + net.t(z[: len(x)])


def _half(net: Any, x: Tensor) -> Tensor:
    """Half of the batch beside the other half."""
    z = net.a(x)
    return net.t(torch.cat([z[len(x) // 2 :], z[: len(x) // 2]]) + z)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "whole"), few([(_pair, True), (_three, True), (_half, False)], [(_three, True)]))
def test_a_batch_that_holds_all_samples_several_times_runs_on_the_kept_rows(
    run: Any, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[SharedEngine] = []

    class Noted(SharedEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setitem(ENGINES, "shared", Noted)
    torch._dynamo.reset()
    torch.manual_seed(0)
    batch = torch.randn(12, D), torch.randint(0, C, (12,))
    report = check_engine(Net(run, {}), batch, nn.CrossEntropyLoss(), engine="shared", verbose=False)
    assert report.verdict == "right", report
    assert (made[-1].trace.cost(True).share == 1.0) is whole  # type: ignore[union-attr]
