"""The step clock worked out by hand (Lightning#17958): several optimizers, ``max_steps``, and resuming."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("lightning")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

from lightning.pytorch import Callback
from lightning_cases import BATCH, QUIET, Module, data, loader, trainer
from torch.utils.data import DataLoader

import batchtrim
from batchtrim.errors import ChooseLength
from batchtrim.integrations.lightning import TrimmingCallback
from tiers import few

pytestmark = QUIET

# which optimizers step in which batch: (optimizer, batch, number of optimizers) -> bool
MODES: dict[str, Callable[[int, int, int], bool]] = {
    "each": lambda k, n, of: True,
    "in turn": lambda k, n, of: n % of == k,
    "one in every fifth": lambda k, n, of: k == 0 or n % 5 == 4,
    "all in every fourth": lambda k, n, of: n % 4 == 3,
    "one from the third on": lambda k, n, of: k == 0 or n >= 3,
}
BATCHES = 4  # in an epoch


class Stepping(Module):
    """Steps its optimizers as a mode says, by Lightning's manual optimization."""

    automatic_optimization = False

    def __init__(self, mode: str, optimizers: int) -> None:
        super().__init__()
        self.goes, self.number = MODES[mode], optimizers
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(6, 3)) for _ in range(optimizers)])

    def training_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.keeps.append(round(self.trim.keep, 6))
        self.manual_backward(self.trim(F.cross_entropy(x @ sum(self.parts), y, reduction="none")))
        made = self.optimizers()
        done = self.trainer.fit_loop.epoch_loop.total_batch_idx
        for k, optimizer in enumerate(made if isinstance(made, list) else [made]):
            if self.goes(k, done, self.number):
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([part], lr=0.1) for part in self.parts]


def trained(mode: str, optimizers: int, folder: Path, callback: TrimmingCallback | None = None, **limits: Any) -> Any:
    module = Stepping(mode, optimizers)
    trainer(folder, callback or TrimmingCallback(clock="step"), **limits).fit(module, DataLoader(data(), BATCH))
    return module


LIMITS = {
    "steps": {"max_steps": 12, "max_epochs": -1},
    "steps first": {"max_steps": 12, "max_epochs": 20},
    "epochs first": {"max_steps": 100, "max_epochs": 3},
    "epochs": {"max_epochs": 3},
    "short epochs": {"max_epochs": 3, "limit_train_batches": 3, "max_steps": 12},
}


@pytest.mark.parametrize(
    ("mode", "optimizers", "name"),
    few(
        itertools.product(MODES, [1, 2, 3], LIMITS),
        [(mode, 2, name) for mode in MODES for name in LIMITS if mode == next(iter(MODES)) or name == "epochs first"],
    ),
)
def test_the_last_batch_is_at_the_schedules_end(mode: str, optimizers: int, name: str, tmp_path: Path) -> None:
    keeps = trained(mode, optimizers, tmp_path, **LIMITS[name]).keeps
    assert (keeps[0], keeps[-1]) == (1.0, pytest.approx(0.2))
    assert keeps == sorted(keeps, reverse=True)


@pytest.mark.parametrize(
    ("mode", "optimizers", "limits", "batches"),
    [
        ("each", 2, {"max_steps": 20, "max_epochs": -1}, 10),
        ("each", 3, {"max_steps": 20, "max_epochs": -1}, 7),
        ("in turn", 2, {"max_steps": 8, "max_epochs": -1}, 8),
        ("each", 2, {"max_steps": 16, "max_epochs": 5}, 8),
        ("each", 2, {"max_steps": 80, "max_epochs": 2}, 8),
    ],
)
def test_every_batch_is_where_the_schedule_says(
    mode: str, optimizers: int, limits: dict[str, Any], batches: int, tmp_path: Path
) -> None:
    keeps = trained(mode, optimizers, tmp_path, **limits).keeps
    assert keeps == pytest.approx([1.0 - 0.8 * b / (batches - 1) for b in range(batches)], abs=1e-5)


def test_a_window_accumulated_by_hand_is_one_step(tmp_path: Path) -> None:
    keeps = trained("all in every fourth", 2, tmp_path, max_steps=6, max_epochs=-1).keeps
    assert keeps == pytest.approx([1.0] * 4 + [0.6] * 4 + [0.2] * 4)


def test_an_end_that_could_not_be_foreseen_is_reported(tmp_path: Path) -> None:
    """The first five batches make one step each, the last one three."""
    with pytest.warns(UserWarning, match="expected training of 7 steps, which the schedule spans, got 5"):
        trained("one in every fifth", 3, tmp_path, max_steps=7, max_epochs=-1)


def test_epochs_that_max_steps_cuts_short(tmp_path: Path) -> None:
    module = Module()
    trainer(tmp_path, TrimmingCallback(clock="epoch"), max_epochs=10, max_steps=3 * BATCHES).fit(module, loader())
    assert module.keeps[::BATCHES] == pytest.approx([1.0, 0.6, 0.2])
    with pytest.warns(UserWarning, match="expected training of 10 epochs, which the schedule spans, got 2"):
        trained("each", 2, tmp_path, TrimmingCallback(clock="epoch"), max_epochs=10, max_steps=16)


class Saving(Callback):
    """Saves in the middle of an epoch."""

    def __init__(self, after: int, path: Path) -> None:
        self.after, self.path = after, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.after - 1:
            trainer.save_checkpoint(self.path)


def resumed(
    mode: str, folder: Path, limits: dict[str, Any], after: int, longer: dict[str, Any], **options: Any
) -> tuple[list[float], list[float]]:
    """Return the keeps that were to come after a checkpoint, and those of the training that went on from it."""
    whole, fit = Stepping(mode, 2), trainer(folder, TrimmingCallback(clock="step"), **limits)
    fit.callbacks.append(Saving(after, folder / "middle.ckpt"))  # type: ignore[attr-defined]
    fit.fit(whole, loader())
    module = Stepping(mode, 2)
    again = trainer(folder, TrimmingCallback(clock="step", **options), **longer)
    again.fit(module, loader(), ckpt_path=folder / "middle.ckpt", weights_only=True)
    return whole.keeps[after:], module.keeps


@pytest.mark.filterwarnings("ignore:.*resume.*:UserWarning")
@pytest.mark.parametrize(
    ("mode", "epochs", "after"),
    few(itertools.product(MODES, [-1, 6], [1, 6]), list(itertools.product(MODES, [6], [6]))),
)
def test_a_resumed_training_continues_where_it_was(mode: str, epochs: int, after: int, tmp_path: Path) -> None:
    limits = {"max_steps": 20, "max_epochs": epochs}
    whole, again = resumed(mode, tmp_path, limits, after, limits)
    assert again == whole


class Recording(Module):
    """Records into the keep log, and notes what the callbacks left at the end of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.keep_log.record(self.trim.last, ids=torch.arange(BATCH) + BATCH * index)
        return loss

    def on_train_epoch_end(self) -> None:
        self.ends.append(float(self.trainer.callback_metrics["trim/kept"]))


@pytest.mark.filterwarnings("ignore:.*resume.*:UserWarning")
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_checkpoint_after_an_epochs_last_batch(accumulated: int, tmp_path: Path) -> None:
    """Lightning resumes it in the next epoch, without that epoch's start: keep stayed what it was for all of it."""
    logs = [batchtrim.KeepLog(BATCH * BATCHES) for _ in range(2)]
    first, second = (
        trainer(tmp_path, TrimmingCallback(keep_log=log), max_epochs=4, accumulate_grad_batches=accumulated)
        for log in logs
    )
    first.callbacks.append(Saving(2 * BATCHES, tmp_path / "two.ckpt"))  # type: ignore[attr-defined]
    whole, again = Recording(), Recording()
    first.fit(whole, loader())
    second.fit(again, loader(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert again.keeps == whole.keeps[2 * BATCHES :]
    assert again.ends == whole.ends[2:]
    assert logs[0].history == logs[1].history


@pytest.mark.filterwarnings("ignore:.*resume.*:UserWarning")
def test_resuming_with_more_steps(tmp_path: Path) -> None:
    limits, longer = ({"max_steps": steps, "max_epochs": -1} for steps in (12, 16))
    with pytest.raises(ChooseLength, match="with total=15 steps, got one with total=11"):
        resumed("each", tmp_path, limits, 4, longer)
    whole, again = resumed("each", tmp_path, limits, 4, longer, resume_length="saved")
    assert again == [*whole, *[pytest.approx(0.2)] * 2]
    again = resumed("each", tmp_path, limits, 4, longer, resume_length="stretch")[1]
    assert again == pytest.approx([1.0 - 0.8 * b / 7 for b in range(4, 8)], abs=1e-5)
    again = resumed("each", tmp_path, limits, 4, {"max_epochs": 2}, resume_length="stretch")[1]
    assert again == pytest.approx([1.0 - 0.8 * b / 7 for b in range(4, 8)], abs=1e-5), "counting batches"


def test_a_callback_used_twice_continues_from_the_checkpoint(tmp_path: Path) -> None:
    """Its trimmer of the first training took the checkpoint, and the second training's was a new one."""
    callback = TrimmingCallback(0.5, select=batchtrim.uniform(), seed=3)
    first = trainer(tmp_path, callback, max_epochs=1)
    first.fit(Module(), loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    assert callback.trim is not None
    drawn = callback.trim.generator.get_state()

    class Looks(Module):
        def on_train_batch_start(self, batch: Any, index: int) -> None:
            self.seen = getattr(self, "seen", self.trim.generator.get_state())

    module = Looks()
    trainer(tmp_path, callback, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "one.ckpt")
    assert torch.equal(module.seen, drawn)


@pytest.mark.parametrize(("length", "keeps"), [("stretch", [0.466667, 0.2]), ("saved", [0.2, 0.2])])
def test_a_second_fit_continues_the_first(length: str, keeps: list[float], tmp_path: Path) -> None:
    """It began a new schedule at the epoch where training was: keep jumped from 0.2 to 0.47 without a word."""
    module = Module()
    callback = TrimmingCallback(batchtrim.linear(1.0, 0.2), resume_length=length)
    fit = trainer(tmp_path, callback, max_epochs=2)
    fit.fit(module, loader())
    assert callback.trim is not None
    callback.trim.generator.seed()
    drawn = callback.trim.generator.get_state()
    fit.fit_loop.max_epochs = 4
    fit.fit(module, loader())
    assert module.keeps[8::4] == keeps
    assert torch.equal(callback.trim.generator.get_state(), drawn)


def test_a_second_fit_with_more_epochs_asks_for_the_length(tmp_path: Path) -> None:
    fit = trainer(tmp_path, TrimmingCallback(batchtrim.linear(1.0, 0.2)), max_epochs=2)
    fit.fit(Module(), loader())
    fit.fit_loop.max_epochs = 4
    with pytest.raises(ChooseLength, match=r"to continue a training with total=4 epochs, got one with total=2\."):
        fit.fit(Module(), loader())
