"""Losses written by hand, in which nothing shows that inputs and targets have the same number of rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import batchtrim
from batchtrim.errors import EngineRefused
from batchtrim.losses import Losses
from batchtrim.testing import check_engine
from tiers import few


def focal(outputs: Tensor, y: Tensor) -> Tensor:
    logp = outputs.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return -((1 - logp.exp()) ** 2) * logp


def picked(outputs: Tensor, y: Tensor) -> Tensor:
    return -outputs.log_softmax(1)[torch.arange(len(y)), y]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))


def batch(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 8), torch.randint(0, 5, (size,))


@pytest.mark.slow
@pytest.mark.parametrize("loss", few([focal, picked], [focal]))
def test_its_backward_runs_on_the_kept_rows(loss: Callable[..., Tensor]) -> None:
    report = check_engine(network(), batch(16), loss, more=[batch(7)], verbose=False)
    assert (report.verdict, report.engine) == ("right", "shared"), str(report)


@pytest.mark.slow
def test_one_trace_serves_other_batch_sizes() -> None:
    step = batchtrim.TrimmedForward(network(), focal, batchtrim.Trimmer(0.5), "shared")
    for size in (16, 16, 7, 12):
        step(*batch(size)).backward()
    assert step.engine.capture.traces <= 2  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("scale", few(["kept", "batch"], ["batch"]))
def test_weights_with_a_gradient_are_refused(scale: str) -> None:
    """With scale "batch" the loss is divided by the weights of all rows, which then all have a gradient."""

    def weighted(outputs: Tensor, y: Tensor) -> Losses:
        weights = outputs[:, 0].sigmoid()
        return Losses(nn.functional.cross_entropy(outputs, y, reduction="none") * weights, weights=weights)

    step = batchtrim.TrimmedForward(network(), weighted, batchtrim.Trimmer(0.5, scale=scale), "shared")
    with pytest.raises(EngineRefused, match="further vectors with a gradient"):
        step(*batch(16))


class Scaled(nn.Module):
    """A criterion with a parameter of its own; `per_sample` makes a second module with the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction, self.scale = "mean", nn.Parameter(torch.tensor(1.3))

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs * self.scale, y, reduction=self.reduction)


def test_a_criterion_with_a_parameter_is_compared_with_its_trace() -> None:
    """The first step ended with an error: the parameter was counted once, and its gradient twice."""
    gradients = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        model, loss = nn.Linear(8, 5), Scaled()
        step = batchtrim.TrimmedForward(model, loss, batchtrim.Trimmer(0.4), engine)
        step(torch.randn(12, 8), torch.arange(12) % 5).backward()
        gradients.append([model.weight.grad, loss.scale.grad])
        assert step.last.engine == engine
    torch.testing.assert_close(*gradients)
