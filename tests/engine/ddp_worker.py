"""One process of the DDP test: train a few steps with each engine and write gradients and buffers to a file."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning_fabric
import pytest
import torch
import torch.distributed as dist
import zoo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchtrim
from batchtrim.engine.auto import AutoEngine
from batchtrim.engine.cost import Forecast
from batchtrim.errors import EngineFallback, EngineRefused


def train(engine: str, scope: str, rank: int, fabric: Any = None) -> torch.Tensor:
    """A few steps of a model with buffers, which DDP with its default settings sends to all ranks; its gradients."""
    torch.manual_seed(0)
    norm = lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True)  # noqa: E731
    model = fabric.setup(zoo.Residual(norm)) if fabric else DistributedDataParallel(zoo.Residual(norm))
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5, scope=scope), engine)
    for number in range(3):
        torch.manual_seed(10 * number + rank)
        model.zero_grad(set_to_none=True)
        loss = step(zoo.images(8), torch.randint(0, 5, (8,)))
        fabric.backward(loss) if fabric else loss.backward()
        assert step.last.engine == engine
    assert isinstance(model.module, zoo.Residual)
    buffers = [buffer.double().flatten() for buffer in model.buffers()] if rank == 0 else []
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return gradients if rank else torch.cat([gradients, 1e-3 * torch.cat(buffers).float()])


class ReadsValues(nn.Module):
    """Has buffers, and cannot be traced on one rank, which reads a value of its batch."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 5))
        self.register_buffer("mean", torch.zeros(64))
        self.reads = reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.layers(x + self.mean)
        if not self.reads or float(x.sum()) < 1e9:
            self.mean += 0.1 * x.mean(0)
        return outputs


def apart(engine: str, ran: tuple[str, str], rank: int) -> torch.Tensor:
    """Train where each rank runs another engine: they must exchange the same tensors in the same order."""
    torch.manual_seed(0)
    model = DistributedDataParallel(ReadsValues(rank == 1))
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.3), engine or ran[rank])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(4):
        torch.manual_seed(10 * number + rank)
        step(torch.randn(32, 64), torch.randint(0, 5, (32,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert step.last.engine == ran[rank]
    return torch.cat([each.detach().flatten() for each in (*model.parameters(), *model.buffers())])


def inside_join() -> None:
    """A rank that has joined answers one forward a step, so no engine may run another."""
    for engine, reason in (("shared", "run a forward again"), ("two_pass", "own forward only")):
        model = DistributedDataParallel(ReadsValues(False))
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.3), engine)
        with model.join(), pytest.raises(EngineRefused, match=reason):
            step(torch.randn(8, 64), torch.randint(0, 5, (8,)))


def main(rank: int, ranks: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    result = {}
    for engine in ("exact", "shared", "two_pass"):
        for scope in ("local", "global"):
            result[f"{engine} {scope}"] = train(engine, scope, rank)
    AutoEngine.forecast = Forecast(1.0, 0.0)
    warnings.simplefilter("ignore", EngineFallback)
    for engine, ran in (("", ("exact", "exact")), ("auto", ("shared", "exact")), ("", ("two_pass", "exact"))):
        result[f"apart {ran[0]}"] = apart(engine, ran, rank)
    inside_join()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "0"}
    fabric = lightning_fabric.Fabric(accelerator="cpu", strategy="ddp", devices=ranks, precision="bf16-mixed")
    fabric.launch()
    for engine in ("exact", "shared"):
        result[f"{engine} fabric"] = train(engine, "local", rank, fabric)
    torch.save(result, Path(out) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
