"""Wrappers that place a model: Lightning Fabric's, and hooks on wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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


def gradients(fabric: Any, step: Any, engine: str) -> list[Tensor]:
    found = []
    for size in (12, 13, 9):
        step.forward.model.zero_grad()
        fabric.backward(step(*batch(size)))
        assert step.last.engine == engine
        assert step.last.outputs.dtype == torch.float32  # Fabric converts them back
        found.append(torch.cat([p.grad.flatten() for p in step.forward.model.parameters()]))
    return found


def hooks_are_not_passed_by(fabric: Any, step: Any) -> None:
    """A hook on the wrapper is no part of what is traced, so `shared` refuses and `auto` runs the wrapper."""
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


@pytest.mark.slow
@pytest.mark.parametrize("precision", few(["32-true", "bf16-mixed", "bf16-true"], default=["bf16-mixed"]))
def test_a_model_set_up_by_fabric_runs_under_shared_unless_its_wrapper_has_hooks(precision: str) -> None:
    fabric, step = set_up("shared", precision)
    hooks_are_not_passed_by(fabric, step)
    plain = gradients(*set_up("exact", precision), "exact")
    torch.testing.assert_close(gradients(fabric, step, "shared"), plain)


@pytest.mark.slow
def test_fabric_still_checks_that_backward_is_its_own() -> None:
    _, step = set_up("shared", "bf16-mixed")
    with pytest.raises(RuntimeError, match=r"requires you to call `fabric.backward\(loss\)`"):
        step(*batch()).backward()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    torch._dynamo.reset()
    yield
    dist.destroy_process_group()


class Layers(nn.Sequential):
    """Torch compiles the forward of no class of its own in place."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def compiled_wrapper(way: str, fabric: Any) -> nn.Module:
    torch.manual_seed(0)
    model: Any = Layers(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    if way.startswith("ddp"):
        model = DistributedDataParallel(model)
    if way == "ddp in place":
        model.compile(backend="eager")
        return model
    model = torch.compile(model, backend="eager")
    if way.startswith("fabric"):
        model = fabric.setup(model, _reapply_compile=way == "fabric")
    return model


WAYS = ["ddp", "ddp in place", "fabric", "fabric around it"]


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:Profiler record function", "ignore:The .grad attribute")  # torch's own
@pytest.mark.parametrize("engine", few(["shared", "auto", "two_pass"], ["shared"]))
@pytest.mark.parametrize("way", few(WAYS, ["ddp in place"]))
def test_a_compiled_wrapper_is_passed_by(way: str, engine: str) -> None:
    """`shared` refused a compiled DDP for a call in DDP itself; one compiled in place raised an error of the tracer."""
    runs: dict[str, list[Tensor]] = {}
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    for name in ("exact", engine):
        model = compiled_wrapper(way, fabric)
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), name)
        runs[name] = []
        for size in (12, 12, 9):
            model.zero_grad()
            fabric.backward(step(*batch(size))) if way.startswith("fabric") else step(*batch(size)).backward()
            runs[name].append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert engine == "auto" or step.last.engine == name
    assert engine != "shared" or step.engine.resets == 0, "DDP's class changed, and its sixth step was refused"
    torch.testing.assert_close(runs[engine], runs["exact"])


@pytest.mark.usefixtures("alone")
def test_a_static_graph_is_refused() -> None:
    """It took the check of a trace for its first backward, and averaged no gradient over the ranks."""
    model = DistributedDataParallel(nn.Linear(6, 4), static_graph=True)
    with pytest.raises(EngineRefused, match="static_graph=True"):
        batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "shared")


def test_hooks_on_a_compiled_model_are_not_passed_by() -> None:
    model = torch.compile(nn.Linear(6, 4), backend="eager")
    model.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "shared")  # type: ignore[arg-type]
    with pytest.raises(EngineRefused, match=r"hooks on its wrapper \(OptimizedModule\)"):
        step(*batch())
