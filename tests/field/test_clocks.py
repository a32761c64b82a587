"""Clocks and resuming, as people use them: each test names the public report, or the habit, it comes from."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch

import batchtrim
from batchtrim import Trimmer, by_accuracy, constant, cosine, linear, piecewise
from batchtrim.errors import ChooseLength, ClockPastTotal
from batchtrim.schedules import join


def saved(keep: Any, total: int | None, steps: int) -> dict[str, Any]:
    """The state of a run that stopped after ``steps`` steps, through a file."""
    trim = Trimmer(keep, total=total)
    trim.step(steps, accuracy=0.85)
    file = io.BytesIO()
    torch.save(trim.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_total_in_epochs_and_step_in_the_batch_loop() -> None:
    """A habit from learning-rate schedulers that are stepped once a batch (OneCycleLR)."""
    epochs, batches = 5, 20
    trim = Trimmer(linear(1.0, 0.2), total=epochs)

    def train() -> None:
        for _ in range(epochs * batches):
            trim(torch.rand(8))
            trim.step()

    with pytest.warns(
        ClockPastTotal, match=r"at most total=5 calls of step\(\), got 6\. .* 0\.2 of each batch"
    ) as told:
        train()
    assert len(told) == 1, "once, not every batch"
    assert told[0].filename == __file__, "it points at the caller's loop"


@pytest.mark.parametrize(
    "trim",
    [
        Trimmer(cosine(), total=3),
        Trimmer(join([constant(1.0), linear(1.0, 0.2)], at=[0.5]), total=3),
        Trimmer(lambda progress: 1.0 - 0.5 * progress, total=3),
    ],
    ids=["cosine", "join", "callable"],
)
def test_every_schedule_of_progress_warns(trim: Trimmer) -> None:
    with pytest.warns(ClockPastTotal):
        trim.step(40)


@pytest.mark.parametrize(
    "trim",
    [
        Trimmer(linear(1.0, 0.2), total=4),
        Trimmer(0.5, total=2),
        Trimmer(linear(0.5, 0.5), total=2),
        Trimmer(by_accuracy(), total=2),
        Trimmer(linear(1.0, 0.2), total=1),
        Trimmer(0.5),
    ],
    ids=["exactly total", "constant", "level", "by_accuracy", "one epoch", "no total"],
)
def test_no_warning_if_the_total_is_not_exceeded(trim: Trimmer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            trim.step(accuracy=0.9)
        copy.deepcopy(trim)


@pytest.mark.parametrize("keep", [0.5, constant(0.3), linear(0.4, 0.4), by_accuracy(), lambda progress: 0.5])
@pytest.mark.parametrize("total", [5, 20])
def test_more_epochs_at_a_keep_that_cannot_jump(keep: Any, total: int) -> None:
    """transformers#7198, flair#1824, composer#56: resume and train for longer (or shorter)."""
    trim = Trimmer(keep, total=total)
    trim.load_state_dict(saved(keep, 10, 7))
    assert (trim.steps, trim.total) == (7, total)
    assert trim.keep == saved_keep(keep, 10, 7)


def saved_keep(keep: Any, total: int, steps: int) -> float:
    trim = Trimmer(keep, total=total)
    trim.step(steps, accuracy=0.85)
    return trim.keep


@pytest.mark.parametrize("keep", [linear(1.0, 0.2), cosine(), piecewise({0.0: 1.0, 0.5: 0.4}), lambda p: 1 - p / 2])
def test_more_epochs_under_a_schedule_is_the_users_choice(keep: Any) -> None:
    state = saved(keep, 11, 5)
    trim = Trimmer(keep, total=21)
    with pytest.raises(
        ChooseLength, match=r"total=21, got total=11\. Progress would jump from 0\.5 to 0\.25.*'stretch'.*'saved'"
    ):
        trim.load_state_dict(state)
    assert (trim.steps, trim.total, trim.keep) == (0, 21, 1.0), "as before"

    trim.load_state_dict(state, length="stretch")
    assert (trim.progress, trim.total) == (0.25, 21)
    assert trim.keep == saved_keep(keep, 21, 5)

    trim = Trimmer(keep, total=21)
    trim.load_state_dict(state, length="saved")
    assert trim.keep == saved_keep(keep, 11, 5), "nothing jumps"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said beforehand that training goes on beyond the saved total
        trim.step(16)
    assert trim.keep == saved_keep(keep, 11, 10), "and stays at its end"
    again = Trimmer(keep, total=11)
    again.load_state_dict(trim.state_dict())


def test_a_finished_run_can_continue() -> None:
    """flair#1824: train for ten epochs, look, train for ten more."""
    state = saved(linear(1.0, 0.2), 10, 10)
    trim = Trimmer(total=20)
    trim.load_state_dict(state, length="saved")
    assert trim.keep == 0.2
    trim = Trimmer(total=20)
    trim.load_state_dict(state, length="stretch")
    assert trim.keep == pytest.approx(1.0 - 0.8 * 10 / 19)


def test_batches_are_not_stretched_over_epochs() -> None:
    """The saved run counted batches, this one counts epochs: no stretch makes sense of that."""
    trim = Trimmer(total=10)
    with pytest.raises(ValueError, match=r"at most total=10 steps.*got 500 steps.*Does one .* count batches"):
        trim.load_state_dict(saved(linear(1.0, 0.2), 1000, 500), length="stretch")
    with pytest.raises(ValueError, match="expected `length` to be one of 'stretch', 'saved', got 'keep'"):
        trim.load_state_dict(saved(linear(1.0, 0.2), 1000, 500), length="keep")


def test_a_state_without_a_total_under_a_schedule_with_one() -> None:
    """Saved at a constant keep and no total, resumed under the paper's schedule."""
    state = saved(0.5, None, 3)
    trim = Trimmer(total=7)
    with pytest.raises(ChooseLength, match="total=7, got total=None"):
        trim.load_state_dict(state)
    with pytest.raises(ChooseLength):
        trim.load_state_dict(state, length="saved")
    trim.load_state_dict(state, length="stretch")
    assert trim.progress == 0.5


def test_the_same_length_asks_nothing() -> None:
    for length in (None, "stretch", "saved"):
        trim = batchtrim.Trimmer(total=10)
        trim.load_state_dict(saved(linear(1.0, 0.2), 10, 4), length=length)
        assert (trim.steps, trim.total) == (4, 10)
        with pytest.warns(ClockPastTotal):
            trim.step(7)


def test_warnings_name_the_line_of_the_caller() -> None:
    """A deprecation that names a file of the library is not shown by default."""
    log = batchtrim.KeepLog(4)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trim = Trimmer(linear(1.0, 0.2), total=2, log=log)
        trim(torch.arange(4.0), ids=torch.arange(4))
        trim.step(3)
        log.record(torch.arange(4), torch.arange(4.0), trim.last_selection)  # type: ignore[arg-type]
        single = Trimmer(0.5)
        for _ in range(3):
            single(torch.ones(1))
        single((torch.zeros(3, 1, requires_grad=True) - torch.ones(3)).abs())
    assert len(found) == 6
    assert {each.filename for each in found} == {__file__}


def test_a_step_as_the_handler_of_an_event() -> None:
    """ignite's engine.add_event_handler(Events.EPOCH_COMPLETED, trim.step) calls it with the engine."""
    trim = Trimmer(total=5)
    with pytest.raises(TypeError, match=r"`n` to be an int, got <object .*As an event handler"):
        trim.step(object())  # type: ignore[arg-type]
    assert trim.steps == 0
