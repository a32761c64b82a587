"""torch.compile: model, loss and trimmer are one graph, and a changing keep fraction does not recompile it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import batchtrim  # +
from _data import command_line, digits


def main(epochs: int = 10, backend: str = "inductor") -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    trim = batchtrim.Trimmer(batchtrim.linear(1.0, 0.2), total=epochs)  # +

    @torch.compile(fullgraph=True, backend=backend)
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return trim(F.cross_entropy(model(x), y, reduction="none"))  # was: F.cross_entropy(model(x), y)

    for _ in range(epochs):
        for x, y in DataLoader(digits(), 64, shuffle=True, drop_last=True):
            loss_of(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        trim.step()  # +

    x, y = digits(train=False).tensors
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    command_line(main)
