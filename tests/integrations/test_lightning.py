"""The Lightning callback: clock, logs, checkpoint, accumulation, precision, engine, several ranks."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("lightning")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning_cases import BATCH, SAMPLES, Module, data, loader, new_model, trainer

import batchtrim
from batchtrim.integrations.lightning import TrimmingCallback
from launch import run_ranks
from tiers import few

HERE = Path(__file__).parent
pytestmark = [
    # what Lightning says of tiny data sets and of a machine with more cores than workers
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    # and what it does that torch has deprecated
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists and is not empty:UserWarning"),
]


def assert_same(first: nn.Module, second: nn.Module, exactly: bool = True) -> None:
    for name, tensor in first.state_dict().items():
        other = second.state_dict()[name]
        assert torch.equal(tensor, other) if exactly else torch.allclose(tensor, other, rtol=1e-5, atol=1e-7), name


def by_hand(keeps: list[float], accumulation: int = 1, parts: int = 1, bf16: bool = False) -> nn.Module:
    """Plain SGD on the means of the largest losses; of each rank's part, dealt out in turn, where there are several."""
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    xs, ys = data().tensors
    for step, keep in enumerate(keeps):
        rows = torch.arange(BATCH) + step * BATCH
        rows %= SAMPLES
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = F.cross_entropy(model(xs[rows]), ys[rows], reduction="none")
        k = batchtrim.keep_count(keep, BATCH // parts)
        kept = torch.stack([losses[part::parts].topk(k).values.mean() for part in range(parts)])
        (kept.mean() / accumulation).backward()
        if (step + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("options", "clock", "keeps"),
    [
        ({"max_epochs": 3}, None, [1.0] * 4 + [0.6] * 4 + [0.2] * 4),
        ({"max_steps": 5}, None, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"max_epochs": 2, "max_steps": 5}, None, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"max_epochs": 1}, "step", [1.0, 0.733333, 0.466667, 0.2]),
        ({"max_epochs": 1, "accumulate_grad_batches": 2}, "step", [1.0, 1.0, 0.2, 0.2]),
        ({"max_epochs": 1}, None, [1.0] * 4),
    ],
)
def test_keep_and_weights_follow_the_clock(
    options: dict[str, Any], clock: str | None, keeps: list[float], tmp_path: Path
) -> None:
    module = Module()
    trainer(tmp_path, TrimmingCallback(clock=clock), **options).fit(module, loader())
    assert module.keeps == keeps
    assert_same(module.model, by_hand(keeps, options.get("accumulate_grad_batches", 1)), exactly=False)


@pytest.mark.parametrize("engine", few(["exact", "two_pass", "shared"], ["exact", "two_pass"]))
def test_engine_in_the_training_step(engine: str, tmp_path: Path) -> None:
    module = Module(engine)
    trainer(tmp_path, TrimmingCallback(0.5), max_epochs=2).fit(module, loader())
    assert_same(module.model, by_hand([0.5] * 8), exactly=False)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_trains_in_bf16(precision: Any, tmp_path: Path) -> None:
    module = Module()
    callback = TrimmingCallback(0.25)
    fit = trainer(tmp_path, callback, max_epochs=1, precision=precision)
    fit.fit(module, loader())
    assert fit.callback_metrics["trim/kept"] == 2
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    if precision == "bf16-mixed":
        assert_same(module.model, by_hand([0.25] * 4, bf16=True), exactly=False)


def test_a_window_by_manual_optimization(tmp_path: Path) -> None:
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            x, y = batch
            for loss in batchtrim.accumulate(self.step, list(zip(x.split(4), y.split(4), strict=True))):
                self.manual_backward(loss)
            self.optimizers().step()  # type: ignore[union-attr]
            self.optimizers().zero_grad()  # type: ignore[union-attr]

    module = Manual("exact")
    trainer(tmp_path, TrimmingCallback(clock="step"), max_epochs=1).fit(module, loader())
    assert_same(module.model, by_hand([1.0, 0.733333, 0.466667, 0.2]), exactly=False)


def test_logs_are_of_the_batches_since_the_last_line(tmp_path: Path) -> None:
    """Two batches a line: the numbers of these two, and of nothing else."""
    logger = CSVLogger(tmp_path)
    module = Module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    fit = trainer(tmp_path, TrimmingCallback(0.25), max_epochs=1, logger=logger, log_every_n_steps=2)
    fit.fit(module, loader())
    xs, ys = data().tensors
    losses = F.cross_entropy(new_model()(xs), ys, reduction="none").detach().view(-1, BATCH)
    kept = losses.topk(2).values
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        lines = [{name: float(text) for name, text in line.items()} for line in csv.DictReader(file)]
    assert [line.pop("step") for line in lines] == [2, 4]
    for line, part, whole in zip(lines, kept.split(2), losses.split(2), strict=True):
        assert (line["trim/keep"], line["trim/kept"]) == (0.25, 2)
        assert line["trim/threshold"] == pytest.approx(part[:, -1].mean().item(), rel=1e-5)
        assert line["trim/kept_loss"] == pytest.approx(part.mean().item(), rel=1e-5)
        assert line["trim/mean_loss"] == pytest.approx(whole.mean().item(), rel=1e-5)


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("clock", ["epoch", "step"])
def test_resuming_equals_an_uninterrupted_run(clock: str, tmp_path: Path) -> None:
    def run(path: Path | None) -> tuple[Module, TrimmingCallback]:
        module = Module()
        callback = TrimmingCallback(batchtrim.linear(0.9, 0.3), clock=clock, select=batchtrim.percentile())
        fit = trainer(tmp_path, callback, max_epochs=3)
        fit.callbacks.append(SaveAt(6, tmp_path / "middle.ckpt"))  # type: ignore[attr-defined]
        fit.fit(module, loader(), ckpt_path=path)
        return module, callback

    whole, first = run(None)
    resumed, second = run(tmp_path / "middle.ckpt")
    assert len(resumed.keeps) == 6
    assert resumed.keeps == whole.keeps[6:]
    assert_same(whole, resumed)
    assert first.trim is not None
    assert second.trim is not None
    assert torch.equal(first.trim.generator.get_state(), second.trim.generator.get_state())
    assert first.trim.stats.compute() == second.trim.stats.compute() or first.trim.stats.compute()["batches"] == 0


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected `clock` to be one of 'epoch', 'step', got 'batch'"):
        TrimmingCallback(clock="batch")
    with pytest.raises(ValueError, match="A trainer does not know the training accuracy"):
        TrimmingCallback(batchtrim.by_accuracy({0.0: 1.0, 0.8: 0.5}))
    endless = trainer(tmp_path, TrimmingCallback(), max_epochs=-1)
    with pytest.raises(ValueError, match="expected `total`"):
        endless.fit(Module(), loader())
    constant = trainer(tmp_path, TrimmingCallback(0.5), max_epochs=-1, max_time={"milliseconds": 1})
    constant.should_stop = True
    constant.fit(Module(), loader())


def test_several_losses_of_a_sample(tmp_path: Path) -> None:
    """Options reach the trimmer."""

    class Tokens(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.trim(self.model(batch[0]) ** 2)

    callback = TrimmingCallback(0.5, unit="element", scale="batch")
    fit = trainer(tmp_path, callback, max_epochs=1)
    fit.fit(Tokens(), loader())
    assert fit.callback_metrics["trim/kept"] == BATCH * 3 / 2


@pytest.mark.slow
def test_two_ranks_train_as_one_on_the_joined_batch(tmp_path: Path) -> None:
    run_ranks(HERE / "lightning_cases.py", 2, tmp_path, str(tmp_path))
    for case, kept, parts in (("global_None", 2, 1), ("global_two_pass", 2, 1), ("local_None", 1, 2)):
        ranks = [torch.load(tmp_path / f"{case}_{rank}.pt", weights_only=True) for rank in range(2)]
        expected = by_hand([0.3] * 8, parts=parts).state_dict()
        for rank in ranks:
            for name, tensor in expected.items():
                torch.testing.assert_close(rank["weights"][name], tensor, rtol=1e-5, atol=1e-6)
            assert rank["logged"]["trim/kept"] == kept, "of the joined batch of 8, or of 4 each"
        assert ranks[0]["logged"] == ranks[1]["logged"]
