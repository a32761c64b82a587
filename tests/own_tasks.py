"""Tasks that tests of own training functions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchtrim.lab import Run, compare
from batchtrim.lab.run.task_run import TaskMistake
from batchtrim.lab.task.own_code import YourCodeFailed

Function = Callable[[Run], Any]


def data() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-2, 2, 96).unsqueeze(1)
    return x, torch.sin(2 * x) + 0.1 * torch.cos(40 * x)


def fit(run: Run, engine: bool = False) -> dict[str, float]:
    """Fit a regression with a small network; return its rmse."""
    x, y = data()
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    step = run.forward(model, nn.MSELoss()) if engine else None
    for epoch in range(run.epochs):
        for rows in torch.randperm(len(x)).split(16):
            if step is not None:
                loss = step(x[rows], y[rows])
            else:
                loss = run.trim(F.mse_loss(model(x[rows]), y[rows], reduction="none").squeeze(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            rmse = F.mse_loss(model(x), y).sqrt().item()
        run.log(epoch=epoch, rmse=rmse)
        run.trim.step()
    return {"rmse": rmse}


QUICK: dict[str, Any] = {"epochs": 3, "metric": "rmse", "threads": 1, "quiet": True, "out": "here"}


def calls(value: float = 0.5, *, error: str = "error", steps: bool = True, **more: Any) -> Function:
    """Return a task that does the least that is required."""

    def train(run: Run) -> Mapping[str, Any]:
        for _ in range(run.epochs):
            run.trim(torch.rand(8))
            if steps:
                run.trim.step()
        return {error: value + 0.001 * run.seed, **more}

    return train


def failing(function: Function, **settings: Any) -> str:
    with pytest.raises((TaskMistake, YourCodeFailed)) as caught:
        compare(function, ["full", "trim"], 2, **{"epochs": 2, "threads": 1, "quiet": True, "out": "here", **settings})
    return str(caught.value)
