"""The lab on a GPU: a run trains, repeats, and resumes where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from batchtrim.lab.methods.table import METHODS
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.train import train_run

pytestmark = pytest.mark.filterwarnings("ignore")


def settings(device: torch.device, **more: Any) -> RunConfig:
    return RunConfig(dataset="digits", model="cnn", device=device.type, epochs=2, batch_size=128, **more)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(device: torch.device, method: str) -> None:
    row = train_run(settings(device, method=method))
    assert row["status"] == "finished", row
    assert row["test_error"] < 0.75
    assert row["config"]["device"] == device.type
    json.dumps(row)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_run_finishes_in_every_precision(device: torch.device, precision: str) -> None:
    if device.type != "cuda" and precision == "16-mixed":
        pytest.skip("a GPU's precision")
    row = train_run(settings(device, method="trim", precision=precision))
    assert row["status"] == "finished", row


@pytest.mark.parametrize("engine", ["exact", "two_pass", "shared", "auto"])
def test_a_run_finishes_with_every_engine(device: torch.device, engine: str) -> None:
    row = train_run(settings(device, method="trim", engine=engine, norm="group"))
    assert row["status"] == "finished", row


def test_a_run_continues_from_its_checkpoint(device: torch.device, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    config = settings(device, method="trim", augment="crop")
    whole = train_run(config)
    checkpoint = tmp_path / "run.pt"

    def stop_after_saving(point: dict[str, Any]) -> None:
        if point["epoch"] == 1:
            raise Stop

    with pytest.raises(Stop):
        train_run(config, checkpoint=checkpoint, checkpoint_seconds=0.0, on_epoch=stop_after_saving)
    assert checkpoint.exists()
    resumed = train_run(config, checkpoint=checkpoint, checkpoint_seconds=0.0)
    assert resumed["status"] == "finished"
    assert abs(resumed["test_error"] - whole["test_error"]) < 0.1
