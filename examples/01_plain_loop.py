"""Your own training loop: one line makes the trimmer, one line changes, and one steps the trimmer's clock."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import batchtrim  # +
from _data import command_line, digits


def main(epochs: int = 20) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    trim = batchtrim.Trimmer(batchtrim.linear(1.0, 0.2), total=epochs)  # +
    for _ in range(epochs):
        for x, y in DataLoader(digits(), 64, shuffle=True):
            loss = trim(F.cross_entropy(model(x), y, reduction="none"))  # was: F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trim.step()  # +

    x, y = digits(train=False).tensors
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    print(f"{trim}: test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    command_line(main)
