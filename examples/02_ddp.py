"""Several processes: choose from the joined batch of all ranks. Start it with

torchrun --nproc-per-node 2 examples/02_ddp.py

scope="global" keeps what one process with the joined batch would keep. With the default, "local", each rank trims its
own part: that needs no communication, but keeps other samples.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import batchtrim  # +
from _data import command_line, digits


def main(epochs: int = 10) -> float:
    if not dist.is_torchelastic_launched():
        raise SystemExit("start it with: torchrun --nproc-per-node 2 examples/02_ddp.py")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    device = torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else torch.device("cpu")
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device))
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

    x, y = digits(train=False).tensors
    accuracy = (model.module(x.to(device)).argmax(1).cpu() == y).float().mean().item()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks: test accuracy {accuracy:.3f}")
    dist.barrier()
    dist.destroy_process_group()
    return accuracy


if __name__ == "__main__":
    command_line(main)
