"""Compare with your own training function: a table, a small network, and rmse as the metric.

batchtrim compare --task examples/16_own_regression.py:train --metric rmse --methods full,trim,random --epochs 30
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from _data import command_line
from batchtrim.lab import Run, compare


def table() -> tuple[Tensor, Tensor]:
    """Return 442 patients: ten numbers each, and the progress of their diabetes in a year, in standard deviations."""
    found = load_diabetes()
    x, y = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target, dtype=torch.float32)
    return x / x.std(0), (y - y.mean()) / y.std()


def train(run: Run) -> dict[str, float]:
    x, y = table()
    test = torch.arange(len(y)) % 4 == 0
    learn = (~test).nonzero().squeeze(1)
    model = nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-2)
    log = run.keep_log(len(y))
    for epoch in range(run.epochs):
        for rows in learn[torch.randperm(len(learn))].split(32):
            losses = F.mse_loss(model(x[rows]).squeeze(1), y[rows], reduction="none")
            loss = run.trim(losses)  # was: losses.mean()
            log.record(run.trim.last, ids=rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            rmse = F.mse_loss(model(x[test]).squeeze(1), y[test]).sqrt().item()
        run.log(epoch=epoch, rmse=rmse)  # the curve of the report, and TensorBoard
        log.end_epoch()
        run.trim.step()  # once an epoch
    run.show(rows=[{"patient": i, "progression": f"{value:+.2f}"} for i, value in enumerate(y.tolist())])
    return {"rmse": rmse}


def main(epochs: int = 30, seeds: int = 5, out: str = "runs/own-regression") -> float:
    summary = compare(train, ["full", "trim", "random"], seeds, epochs=epochs, metric="rmse", out=out)
    for arm in summary.groups[0].arms:
        print(f"{arm.label}: rmse {arm.moments.mean:.3f}")
    return float(summary.groups[0].arms[0].moments.mean or 0.0)


if __name__ == "__main__":
    command_line(main)
