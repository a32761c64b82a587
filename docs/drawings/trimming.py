"""One batch over training, its losses sorted, the kept part coloured. Drawn for the documentation's first page.

python docs/drawings/trimming.py

A small network learns scikit-learn's digits with the paper's schedule. After every epoch the same 128 training samples
are scored; the drawing shows them at six epochs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim

EPOCHS, BATCH = 30, 128
SHOWN = (0, 6, 12, 18, 24, 29)
FOLDER = Path(__file__).parent


class Moment(NamedTuple):
    """The batch at the start of an epoch: its losses (B,), falling, and how many of them are kept."""

    epoch: int
    losses: Tensor
    k: int

    @property
    def share(self) -> float:
        """The part of the batch's loss that the kept samples carry."""
        return float(self.losses[: self.k].sum() / self.losses.sum())


def train(epochs: int = EPOCHS) -> list[Moment]:
    """Train a network; return the batch at the start of every epoch."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16.0
    y = torch.tensor(digits.target, dtype=torch.int64)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trim = batchtrim.Trimmer(batchtrim.linear(1.0, 0.2), total=epochs)
    moments = []
    for epoch in range(epochs):
        with torch.no_grad():
            losses = F.cross_entropy(model(x[:BATCH]), y[:BATCH], reduction="none")
        moments.append(Moment(epoch, losses.sort(descending=True).values, batchtrim.keep_count(trim.keep, BATCH)))
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = trim(F.cross_entropy(model(x[rows]), y[rows], reduction="none"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trim.step()
    return moments


def figure(moments: list[Moment], palette: Any, rows: int = 2, size: tuple[float, float] = (9.6, 4.9)) -> Any:
    """Draw rows of panels on one scale."""
    import matplotlib.pyplot as plt

    made, panels = plt.subplots(rows, len(moments) // rows, figsize=size, layout="constrained", sharey=True)
    made.get_layout_engine().set(wspace=0.06, hspace=0.08)
    for axes, moment in zip(panels.flat, moments, strict=True):
        axes.stairs(moment.losses[: moment.k], range(moment.k + 1), fill=True, color=palette.kept, linewidth=0)
        axes.stairs(moment.losses[moment.k :], range(moment.k, BATCH + 1), fill=True, color=palette.dropped)
        axes.set_title(f"epoch {moment.epoch + 1}", loc="left", fontweight="bold", fontsize=12, color=palette.ink)
        note = f"keeps {moment.k} of {BATCH}" + (f"\n{moment.share:.0%} of the loss" if moment.k < BATCH else "")
        axes.text(BATCH * 0.56, 0.97, note, transform=axes.get_xaxis_transform(), va="top", linespacing=1.5)
        axes.set(xlim=(0, BATCH), xticks=[], ylim=(0, 3.4), yticks=[0, 1, 2, 3])
        axes.tick_params(length=0, labelsize=10)
    made.supylabel("loss of each sample", fontsize=11, color=palette.ink)
    made.supxlabel(f"the {BATCH} samples of one batch, hardest first", fontsize=11, color=palette.ink)
    return made


def main(folder: Path = FOLDER, epochs: int = EPOCHS) -> list[Path]:
    from _paper import draw

    moments = train(epochs)
    shown = [moments[epoch] for epoch in SHOWN]
    narrow = draw("trimming-narrow", lambda palette: figure(shown, palette, rows=3, size=(5.4, 6.6)), folder)  # phones
    return [*draw("trimming", lambda palette: figure(shown, palette), folder), *narrow]


if __name__ == "__main__":
    print(*main(), sep="\n")
