"""Gradient accumulation: trim all micro-batches of a step as one large batch, here with a gradient scaler."""

import torch
from torch import nn
from torch.utils.data import DataLoader

import batchtrim  # +
from _data import command_line, digits


def main(epochs: int = 10) -> float:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(device)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(total=epochs), "two_pass")  # +
    for _ in range(epochs):
        batches = [(x.to(device), y.to(device)) for x, y in DataLoader(digits(), 16, shuffle=True)]
        for start in range(0, len(batches), 4):
            # over="micro" trims each by itself and needs no second pass; either way there is nothing to divide by 4
            for loss in batchtrim.accumulate(step, batches[start : start + 4], over="window"):  # was: for x, y in
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        step.trim.step()  # +

    x, y = digits(train=False).tensors
    accuracy = (model(x.to(device)).argmax(1).cpu() == y).float().mean().item()
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    command_line(main)
