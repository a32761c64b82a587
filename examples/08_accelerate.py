"""Accelerate: the plain loop, with register() to put the trimmer into the checkpoint."""

import tempfile

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import batchtrim.integrations.accelerate  # +
from _data import command_line, digits


def main(epochs: int = 10) -> float:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(digits(), 32, shuffle=True))
    trim = batchtrim.integrations.accelerate.register(accelerator, batchtrim.Trimmer(total=epochs))  # +
    for epoch in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = trim(F.cross_entropy(model(x), y, reduction="none"))  # was: F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        batchtrim.integrations.accelerate.log(accelerator, trim, step=epoch)  # what was kept, to the trackers
        trim.step()  # +
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)  # the trimmer with it

    x, y = digits(train=False).tensors
    accuracy = (model(x.to(accelerator.device)).argmax(1).cpu() == y).float().mean().item()
    accelerator.print(f"test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    command_line(main)
