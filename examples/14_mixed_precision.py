"""Mixed precision: half-precision losses are ranked as they are, and a gradient scaler skips a step with inf or NaN."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import batchtrim  # +
from _data import command_line, digits


def main(epochs: int = 10) -> float:
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.bfloat16)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(device)
    trim = batchtrim.Trimmer(batchtrim.linear(1.0, 0.2), total=epochs)  # +
    for _ in range(epochs):
        for x, y in DataLoader(digits(), 64, shuffle=True):
            x, y = x.to(device), y.to(device)
            with torch.autocast(device, dtype):
                loss = trim(F.cross_entropy(model(x), y, reduction="none"))  # was: F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        trim.step()  # +

    x, y = digits(train=False).tensors
    accuracy = (model(x.to(device)).argmax(1).cpu() == y).float().mean().item()
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    command_line(main)
