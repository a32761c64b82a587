"""Dropout inside a fused kernel: its backward runs on all rows, the operators around it on the kept ones."""

from __future__ import annotations

import itertools

import fused
import pytest
import torch
from torch import nn

import batchtrim
from batchtrim.engine import graphs
from batchtrim.testing import check_engine
from tiers import few


@pytest.fixture(autouse=True)
def of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU's version of the kernel for torch's: an operator of another library has no rule by its name."""
    monkeypatch.setattr(graphs, "_OF_TORCH", (*graphs._OF_TORCH, "batchtrim_tests"))


def batch(rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return torch.randn(rows, 6, 8), torch.randint(0, 5, (rows,))


@pytest.mark.parametrize(
    ("p", "engine"), few(itertools.product([0.0, 0.3], ["shared", "auto", "exact"]), [(0.0, "exact")])
)
def test_the_gradient_is_that_of_all_rows(p: float, engine: str) -> None:
    first = batch()
    report = check_engine(fused.Attending(p), first, nn.CrossEntropyLoss(), engine=engine, verbose=False)
    assert report.verdict == "right", report


@pytest.mark.slow
@pytest.mark.parametrize(("p", "rows"), few([(0.0, 3), (0.3, 12)], [(0.3, 12)]))
def test_only_the_kernel_with_dropout_runs_on_all_rows(p: float, rows: int) -> None:
    x, y = batch()
    step = batchtrim.TrimmedForward(fused.Attending(p), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.25), "shared")
    for _ in range(2):
        fused.ran_on.clear()
        step(x, y).backward()
    assert fused.ran_on == [rows, rows]
    upper = step.engine.trace.slices(True).upper  # type: ignore[union-attr]
    assert sum("mm" in str(node.target) for node in upper.graph.graph.nodes) > 4  # every layer's, down to the first
    share = step.engine.trace.cost(True).share  # type: ignore[union-attr]
    assert 0.1 < share < 1.0 if p else share == 1.0, "its work counts as work on all rows"


@pytest.mark.slow
def test_a_second_backward_gives_the_same_again() -> None:
    x, y = batch()
    model = fused.Attending(0.3)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.25), "shared")
    step(x, y).backward()
    loss, found = step(x, y), []
    for again in (True, False):
        model.zero_grad()
        loss.backward(retain_graph=again)
        found.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
    assert all(torch.equal(*each) and each[0].any() for each in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_compiled_model_too(p: float) -> None:
    first = batch()
    model = fused.Attending(p)
    model.compile()
    report = check_engine(model, first, nn.CrossEntropyLoss(), engine="shared", verbose=False)
    assert report.verdict == "right", report
    fused.ran_on.clear()
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.25), "shared")
    for _ in range(3):
        step(*first).backward()
    assert fused.ran_on[-1] == (12 if p else 3)
