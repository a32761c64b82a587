"""The run that a training function gets, if it makes the trimmer itself."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchtrim import Trimmer
from batchtrim.lab.run.task_config import TaskConfig
from batchtrim.lab.run.task_run import Run


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
    assert run.rule.counts.kept == 1


@pytest.mark.parametrize("method", ["loss_mass", "data_dropout", "data_dropout_matched"])
def test_what_was_kept_is_logged_and_not_what_the_schedule_says(method: str, tmp_path: Path) -> None:
    """The chart of samples kept showed 90 % for loss_mass, and 50 % for data_dropout, whatever they kept."""
    run = Run(TaskConfig(task="mine.py:train", method=method, epochs=3).resolved(), tmp_path)
    run.trim(torch.tensor([9.0, 0.1, 0.2, 0.3]))
    run.log(epoch=0)
    assert run.curve["keep"] == [0.25]


def test_a_second_pass_is_counted(tmp_path: Path) -> None:
    run = Run(TaskConfig(task="mine.py:train", method="trim", epochs=2, engine="two_pass").resolved(), tmp_path)
    step = run.forward(nn.Linear(2, 1), nn.MSELoss())
    for _ in range(2):
        step(torch.rand(10, 2), torch.rand(10, 1)).backward()
        run.trim.step()
    assert (run.rule.counts.seen, run.rule.counts.kept, run.rule.counts.repeated) == (20, 12, 2)


def test_steps_that_were_compiled_leave_no_count(tmp_path: Path) -> None:
    """Those of the others alone were recorded."""
    run = Run(TaskConfig(task="mine.py:train", method="trim", epochs=2).resolved(), tmp_path)
    run.trim(torch.rand(4))
    assert run.rule.counts.counted
    assert run.rule.compiled_mask is not None  # what a compiled step reads
    run.log(epoch=0)
    assert not run.rule.counts.counted
    assert "samples_backward" not in run.curve


def test_validation_and_what_a_checkpoint_repeats_are_no_training(tmp_path: Path) -> None:
    """They were counted as samples that went backward."""
    run = Run(TaskConfig(task="mine.py:train", method="trim", epochs=2).resolved(), tmp_path)
    model = nn.Linear(2, 1)
    checkpoint(lambda x: run.trim(model(x).squeeze(1) ** 2), torch.rand(10, 2), use_reentrant=False).backward()
    with torch.no_grad():
        run.trim(torch.rand(50))
    assert (run.rule.counts.calls, run.rule.counts.seen, run.rule.counts.kept) == (1, 10, 10)


@pytest.mark.parametrize("method", ["trim", "random", "loss_mass", "small_loss"])
def test_copies_of_the_trimmer_count(method: str, tmp_path: Path) -> None:
    """A run that chose with a deep copy was refused, as one that never called its trimmer."""
    run = Run(TaskConfig(task="mine.py:train", method=method, epochs=2).resolved(), tmp_path)
    copies = [
        copy.deepcopy(run.trim),
        copy.copy(run.trim),
        Trimmer(run.keep, total=2, **copy.deepcopy(run.trim_options)),
    ]
    for each in copies:
        each.step()
        each(torch.rand(10))
    assert (run.rule.counts.calls, run.rule.counts.seen) == (3, 30)
    assert run.rule.counts.used


def test_a_copy_in_another_process_is_not_counted(tmp_path: Path) -> None:
    run = Run(TaskConfig(task="mine.py:train", epochs=2).resolved(), tmp_path)
    there = pickle.loads(pickle.dumps(run.trim))
    assert torch.equal(there(torch.arange(10.0)), run.trim(torch.arange(10.0)))
    assert run.rule.counts.sent
    assert run.rule.counts.calls == 1
