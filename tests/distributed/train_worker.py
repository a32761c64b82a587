"""One rank of test_training.py: accumulation under DDP, FSDP2, Accelerate, each against the joined batch by hand."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import batchtrim

KEEP = 0.3
SIZES = ((4, 3), (4, 2))  # rows of each rank's two micro-batches


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def windows() -> list[list[tuple[Tensor, Tensor]]]:
    draw = torch.Generator().manual_seed(4)
    return [
        [(torch.randn(n, 5, generator=draw).double(), torch.randint(0, 3, (n,), generator=draw)) for n in sizes]
        for sizes in SIZES
    ]


def gradient(model: nn.Module) -> Tensor:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in found])


def hardest_mean(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    losses = F.cross_entropy(model(x), y, reduction="none")
    return losses.topk(max(1, round(KEEP * len(losses)))).values.mean()


def by_hand(over: str, scope: str) -> Tensor:
    model = new_model()
    ranks = windows()
    if scope == "global":  # ranks side by side
        ranks = [[tuple(map(torch.cat, zip(*column, strict=True))) for column in zip(*ranks, strict=True)]]  # type: ignore[misc]
    loss = torch.zeros((), dtype=torch.float64)
    for window in ranks:
        total = sum(len(y) for _, y in window)
        if over == "window":
            loss = loss + hardest_mean(model, window) / len(ranks)
        else:
            loss = loss + sum(len(y) / total * hardest_mean(model, [(x, y)]) for x, y in window) / len(ranks)
    loss.backward()
    return gradient(model)


def trained(model: nn.Module, rank: int, over: str, scope: str, engine: str) -> Tensor:
    trim = batchtrim.Trimmer(KEEP, scope=scope)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), trim, engine)
    for loss in batchtrim.accumulate(step, windows()[rank], over):
        loss.backward()
    return gradient(model)


class Follows(nn.Module):
    """Reads a buffer that its last batch left; DDP sends that of the first rank to all before a forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3).double()
        self.register_buffer("last", torch.zeros(3).double())

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layer(x) + self.last
        self.last.copy_(9 * outputs.detach()[0])
        return outputs


def buffers_of_the_first_rank(rank: int) -> None:
    """A pass without DDP ran with each rank's own: a window chose by other losses, and `two_pass` was refused."""
    runs = []
    for over, engine in (("micro", "exact"), ("window", "exact"), ("micro", "two_pass"), ("window", "two_pass")):
        model = DistributedDataParallel(Follows())
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(KEEP), engine)
        runs.append([])
        for x, y in windows()[rank] * 2:
            model.zero_grad()
            for loss in batchtrim.accumulate(step, [(x, y)], over):
                loss.backward()
            runs[-1] += [gradient(model), model.module.last.clone()]
        torch.testing.assert_close(runs[-1], runs[0])


def fsdp(mesh: Any) -> nn.Module:
    model = new_model()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fewer_rows_on_one_rank(rank: int, mesh: Any) -> None:
    """The forwards that check `two_pass` ran on the ranks that had four rows, and waited for the others."""
    x, y = windows()[rank][rank]  # four rows, and two
    found = []
    for model, engine in ((DistributedDataParallel(new_model()), "exact"), (fsdp(mesh), "two_pass")):
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(KEEP), engine)
        step(x, y).backward()
        found.append(gradient(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)


def main(rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (ranks,))
    for over in ("window", "micro"):
        for scope in ("local", "global"):
            expected = by_hand(over, scope)
            for engine in ("exact", "two_pass"):
                ddp = DistributedDataParallel(new_model())
                torch.testing.assert_close(trained(ddp, rank, over, scope, engine), expected, rtol=1e-7, atol=1e-9)
            print(over, scope, "fsdp", flush=True)
            torch.testing.assert_close(trained(fsdp(mesh), rank, over, scope, "exact"), expected, rtol=1e-7, atol=1e-9)
    buffers_of_the_first_rank(rank)
    fewer_rows_on_one_rank(rank, mesh)
    with_accelerate(rank)
    dist.barrier()
    dist.destroy_process_group()


def with_accelerate(rank: int) -> None:
    """``accelerator.backward`` divides by the accumulation steps, DDP by the ranks: equal micro-batches are right."""
    from accelerate import Accelerator

    from batchtrim.integrations.accelerate import log, register

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(new_model())
    trim = register(accelerator, batchtrim.Trimmer(KEEP, scope="global"))
    parts = [[(x[:2], y[:2]) for x, y in window] for window in windows()]
    for x, y in parts[rank]:
        with accelerator.accumulate(model):
            accelerator.backward(trim(F.cross_entropy(model(x), y, reduction="none")))
    whole = new_model()
    for column in zip(*parts, strict=True):
        (hardest_mean(whole, list(column)) / 2).backward()
    torch.testing.assert_close(gradient(model), gradient(whole), rtol=1e-7, atol=1e-9)
    local = batchtrim.Trimmer(0.5)
    if rank == 0:
        local(torch.tensor([1.0, 3.0]))
    assert log(accelerator, local)["trim/kept_loss"] == 3.0, "a rank that has seen nothing does not count"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
