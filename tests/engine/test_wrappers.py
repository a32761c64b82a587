"""Wrappers that place a model: Lightning Fabric's, and hooks on wrappers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchtrim
from batchtrim.errors import EngineFallback, EngineRefused
from tiers import few

lightning_fabric = pytest.importorskip("lightning_fabric")


def set_up(engine: str, precision: str) -> tuple[Any, Any]:
    """A Fabric, and a step of a small model that it has set up."""
    torch.manual_seed(0)
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1, precision=precision)
    model = fabric.setup(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)))
    return fabric, batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), engine)


def batch(size: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(size)
    return torch.randn(size, 6), torch.randint(0, 4, (size,))


def gradients(engine: str, precision: str) -> list[Tensor]:
    fabric, step = set_up(engine, precision)
    found = []
    for size in (12, 13, 9):
        step.forward.model.zero_grad()
        fabric.backward(step(*batch(size)))
        assert step.last.engine == engine
        assert step.last.outputs.dtype == torch.float32  # Fabric converts them back
        found.append(torch.cat([p.grad.flatten() for p in step.forward.model.parameters()]))
    return found


@pytest.mark.parametrize("precision", few(["32-true", "bf16-mixed", "bf16-true"], default=["bf16-mixed"]))
def test_a_model_set_up_by_fabric_runs_under_shared(precision: str) -> None:
    for plain, cut in zip(gradients("exact", precision), gradients("shared", precision), strict=True):
        torch.testing.assert_close(cut, plain)


@pytest.mark.slow
def test_fabric_still_checks_that_backward_is_its_own() -> None:
    _, step = set_up("shared", "bf16-mixed")
    with pytest.raises(RuntimeError, match=r"requires you to call `fabric.backward\(loss\)`"):
        step(*batch()).backward()


def test_hooks_on_a_wrapper_are_not_passed_by() -> None:
    fabric, step = set_up("shared", "32-true")
    seen: list[Tensor] = []
    hook = step.forward.model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    with pytest.raises(EngineRefused, match=r"hooks on its wrapper \(_FabricModule\)"):
        step(*batch())
    auto = batchtrim.TrimmedForward(step.forward.model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "auto")
    auto.engine._prepare(compiled=True)
    with pytest.warns(EngineFallback, match="hooks on its wrapper"):
        fabric.backward(auto(*batch()))
    assert [outputs.shape for outputs in seen] == [(12, 4)]
    hook.remove()
    step(*batch())
    assert step.last.engine == "shared"
