"""Accelerate: the plain loop; register() puts the trimmer in the checkpoint."""

import tempfile

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import batchtrim
from _data import digits
from batchtrim.integrations.accelerate import log, register  # +


def main(epochs: int = 10) -> float:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(digits(), 32, shuffle=True))
    trim = register(accelerator, batchtrim.Trimmer(batchtrim.linear(1.0, 0.2), total=epochs))  # +
    for epoch in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(trim(F.cross_entropy(model(x), y, reduction="none")))  # was: without trim
                optimizer.step()
                optimizer.zero_grad()
        log(accelerator, trim, step=epoch)
        trim.step()  # +
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)  # the trimmer with it

    x, y = digits(train=False).tensors
    accuracy = (model(x.to(accelerator.device)).argmax(1).cpu() == y).float().mean().item()
    accelerator.print(f"test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
