"""Accelerate in one process: the checkpoint, the log, a scaler. Several ranks are in tests/distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

import batchtrim
from batchtrim.integrations.accelerate import log, register


class Memory(GeneralTracker):
    name = "memory"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.lines.append({**values, "step": step})


def batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=draw), torch.randint(0, 3, (8,), generator=draw)


def train(accelerator: Accelerator, model: nn.Module, trim: batchtrim.Trimmer, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        x, y = batch(step)
        accelerator.backward(trim(F.cross_entropy(model(x), y, reduction="none")))
        optimizer.step()
        optimizer.zero_grad()
        trim.step()


def setting() -> tuple[Accelerator, nn.Module, batchtrim.Trimmer]:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = accelerator.prepare(nn.Linear(5, 3))
    return accelerator, model, register(accelerator, batchtrim.Trimmer(total=8, select=batchtrim.percentile()))


def test_resuming_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    accelerator, model, trim = setting()
    train(accelerator, model, trim, range(4))
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, trim, range(4, 8))
    accelerator, resumed, other = setting()
    accelerator.load_state(str(tmp_path))
    assert other.steps == 4
    train(accelerator, resumed, other, range(4, 8))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_log_writes_the_statistics_to_the_trackers() -> None:
    tracker = Memory()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("test")
    trim = batchtrim.Trimmer(0.5)
    trim(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    found = log(accelerator, trim, step=7)
    assert found == {
        "trim/keep": 0.5, "trim/kept": 2.0, "trim/threshold": 3.0, "trim/kept_loss": 3.5, "trim/mean_loss": 2.5,
        "trim/ratio": 1.4,
    }  # fmt: skip
    assert tracker.lines == [{**found, "step": 7}]
    assert log(accelerator, trim) == {}, "nothing seen since"


def test_a_nan_loss_is_a_skipped_step_under_a_scaler() -> None:
    """Plain PyTorch's scaler: a NaN loss is kept, so its step is seen and skipped, and the next one is not."""
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trim = batchtrim.Trimmer(0.25)
    before = model.weight.detach().clone()
    for step, spoil in enumerate((True, False)):
        x, y = batch(step)
        losses = F.cross_entropy(model(x), y, reduction="none")
        if spoil:
            losses = losses * torch.tensor([1.0] * 7 + [float("nan")])
        scaler.scale(trim(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(model.weight, before) == spoil
    assert scaler.get_scale() == 2.0
