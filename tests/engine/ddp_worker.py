"""One process of the DDP test: train a few steps with each engine and write gradients and buffers to a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning_fabric
import torch
import torch.distributed as dist
import zoo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchtrim


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


def main(rank: int, ranks: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    result = {}
    for engine in ("exact", "shared", "two_pass"):
        for scope in ("local", "global"):
            result[f"{engine} {scope}"] = train(engine, scope, rank)
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
