"""The run that a training function gets, if it makes the trimmer itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchtrim import Trimmer
from batchtrim.lab.run.handle import Run
from batchtrim.lab.run.task_config import TaskConfig


@pytest.mark.parametrize("method", ["full", "trim", "random", "loss_mass", "loss_mass_kept", "two_sided", "small_loss"])
def test_a_trimmer_made_from_the_options_computes_what_the_run_s_own_does(method: str, tmp_path: Path) -> None:
    run = Run(TaskConfig(task="mine.py:train", method=method, epochs=3).resolved(), tmp_path)
    own = Trimmer(run.keep, total=run.epochs, **run.trim_options)
    for _ in range(3):
        losses = torch.rand(16) ** 3
        assert own(losses).item() == run.trim(losses).item()
        own.step()
        run.trim.step()


def test_tokens_are_chosen_by_the_users_own_trimmer(tmp_path: Path) -> None:
    run = Run(TaskConfig(task="mine.py:train", method="loss_mass", epochs=3).resolved(), tmp_path)
    trim = Trimmer(run.keep, total=run.epochs, unit="element", **run.trim_options)
    losses = torch.tensor([[9.0, 0.1], [0.2, 0.3]])
    assert trim(losses).item() == pytest.approx(9.0 / 4)
    assert run.rule.kept == 1
