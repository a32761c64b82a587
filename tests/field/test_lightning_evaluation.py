"""One step for training, validation and test, as most modules are written: only training is trimmed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("lightning")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

from lightning.pytorch.callbacks import EarlyStopping
from lightning_cases import QUIET, Module, Plain, data, loader, trainer

import batchtrim
from batchtrim.integrations.lightning import TrimmingCallback

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:You defined a `test_step` but:UserWarning")]


class OneStep(Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, float]] = []

    def step_of(self, batch: Any, stage: str) -> Tensor:
        x, y = batch
        losses = F.cross_entropy(self.model(x), y, reduction="none")
        loss = self.trim(losses)
        self.log(f"{stage}_loss", loss)
        if stage != "train":
            self.seen.append((loss.item(), losses.mean().item()))
        return loss

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.step_of(batch, "train")

    def validation_step(self, batch: Any, index: int) -> None:
        self.step_of(batch, "valid")

    def test_step(self, batch: Any, index: int) -> None:
        self.step_of(batch, "test")


# `between` leaves samples out at keep 1, too
@pytest.mark.parametrize("select", [batchtrim.hardest(), batchtrim.between(0.3)])
def test_evaluation_is_not_trimmed(select: Any, tmp_path: Path) -> None:
    """Losses of validation and test were those of the hardest, and counted in the statistics of training.

    A module that was not trained in this process had no trimmer: an AttributeError.
    """
    for stages in (("fit", "validate", "test"), ("test", "validate", "fit")):
        module, callback = OneStep(), TrimmingCallback(0.25, select=select)
        runs = trainer(tmp_path, callback, max_epochs=1)
        for stage in stages:
            getattr(runs, stage)(module, loader(), **({"val_dataloaders": loader()} if stage == "fit" else {}))
            assert (module.trim is callback.trim) == (callback.trim is not None), "the one it trains with is put back"
        assert len(module.seen) >= 12
        assert all(loss == pytest.approx(mean) for loss, mean in module.seen)
        assert runs.callback_metrics
    x, y = data().tensors
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    runs = trainer(tmp_path, TrimmingCallback(0.25), max_epochs=1)
    runs.fit(module, loader(), torch.utils.data.DataLoader([(100.0 * a, b) for a, b in zip(x, y, strict=True)], 8))
    mean = F.cross_entropy(module.model(x), y).item()
    assert runs.callback_metrics["trim/mean_loss"].item() == pytest.approx(mean, rel=1e-5)


def test_what_early_stopping_monitors(tmp_path: Path) -> None:
    """With 4 batches and a log every 3 it was the mean of the last batch, where that of the epoch is documented."""
    module = OneStep()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    stopping = EarlyStopping("trim/mean_loss", check_on_train_epoch_end=True)
    runs = trainer(tmp_path, TrimmingCallback(0.25), max_epochs=2, log_every_n_steps=3)
    runs.callbacks.append(stopping)  # type: ignore[attr-defined]
    runs.fit(module, loader())
    x, y = data().tensors
    losses = F.cross_entropy(module.model(x), y, reduction="none")
    assert stopping.best_score.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    kept = torch.stack([part.topk(2).values for part in losses.split(8)])
    assert runs.callback_metrics["trim/kept_loss"].item() == pytest.approx(kept.mean().item(), rel=1e-5)


def test_a_validation_that_calls_an_intercepted_training_step(tmp_path: Path) -> None:
    class Both(Plain):
        def validation_step(self, batch: Any, index: int) -> None:
            x, y = batch
            loss = self.training_step(batch, index)
            assert loss.item() == pytest.approx(F.cross_entropy(self.model(x), y).item())

    callback = TrimmingCallback(0.25, intercept=True, log=False)
    runs = trainer(tmp_path, callback, max_epochs=1)
    runs.fit(Both(), loader(), loader())
    assert callback.trim is not None
    assert callback.trim.stats.compute()["batches"] == len(loader())
    assert not runs.callback_metrics, "Lightning sets `log` of every callback, and it was logged all the same"


class Early(Plain):
    """It takes the trimmer as soon as there is one."""

    def setup(self, stage: str) -> None:
        self.step = batchtrim.TrimmedForward(self.model, nn.CrossEntropyLoss(), self.trim, "exact")

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.step(*batch)


def test_a_trimmer_taken_before_training(tmp_path: Path) -> None:
    """The warning advised to call self.trim, which this module does."""
    with pytest.warns(UserWarning, match=r"calls the self\.trim of before training .* in on_train_start\."):
        trainer(tmp_path, TrimmingCallback(0.5), max_epochs=1).fit(Early(), loader())
