"""Stop at any moment, kill -9 included, start again, and get the weights of an uninterrupted run, bit for bit on a CPU.

python examples/10_resume.py FOLDER

The state is saved after every step, in one file that is replaced atomically: model, optimizer, trimmer (clock,
generator, statistics) and torch's generator, which dropout draws from. The order of the data depends on the epoch only.
"""

import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import batchtrim
from _data import command_line, digits

EPOCHS = 3


def main(folder: Path, pause: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    x, y = digits(rows=640).tensors
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = len(x) // 64
    trim = batchtrim.Trimmer(total=EPOCHS * steps, select=batchtrim.percentile())  # a rule that draws and remembers
    folder.mkdir(parents=True, exist_ok=True)
    done, path = 0, folder / "state.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        trim.load_state_dict(state["trim"])  # +
        torch.set_rng_state(state["generator"])
        done = state["done"]

    for step in range(done, EPOCHS * steps):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(step // steps))
        rows = order[step % steps * 64 :][:64]
        trim(F.cross_entropy(model(x[rows]), y[rows], reduction="none")).backward()
        optimizer.step()
        optimizer.zero_grad()
        trim.step()
        state = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "trim": trim.state_dict(),  # +
            "generator": torch.get_rng_state(), "done": step + 1,
        }  # fmt: skip
        torch.save(state, folder / "state.new")
        os.replace(folder / "state.new", path)
        time.sleep(pause)
    print(f"{EPOCHS * steps} steps, {trim.stats}")
    return model


if __name__ == "__main__":
    command_line(main)
