"""Sharded parameters (FSDP2): otherwise the same as DDP. Start it with

torchrun --nproc-per-node 2 examples/03_fsdp2.py
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import batchtrim  # +
from _data import command_line, digits


def main(epochs: int = 10) -> float:
    if not dist.is_torchelastic_launched():
        raise SystemExit("start it with: torchrun --nproc-per-node 2 examples/03_fsdp2.py")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    device = torch.device(kind, dist.get_rank() if kind == "cuda" else 0)
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    trim = batchtrim.Trimmer(batchtrim.linear(1.0, 0.2), total=epochs, scope="global")  # +
    sampler: DistributedSampler = DistributedSampler(digits())
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(digits(), 32, sampler=sampler):
            x, y = x.to(device), y.to(device)
            loss = trim(F.cross_entropy(model(x), y, reduction="none"))  # was: F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trim.step()  # +

    with torch.no_grad():
        x, y = digits(train=False).tensors
        accuracy = (model(x.to(device)).argmax(1).cpu() == y).float().mean().item()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks: test accuracy {accuracy:.3f}")
    dist.barrier()
    dist.destroy_process_group()
    return accuracy


if __name__ == "__main__":
    command_line(main)
