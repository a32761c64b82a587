"""The user's own training function: what it gets, what is recorded, and what happens if it is wrong."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim.lab import Run, compare, records, run_once, summarize
from batchtrim.lab.methods.driven import driven_methods
from batchtrim.lab.present.caveat_texts import caveat_texts
from batchtrim.lab.task.own_code import Code
from own_tasks import QUICK, calls, data, failing, fit
from tiers import few


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_regression_is_compared_by_rmse() -> None:
    found = compare(fit, ["full", "trim", "random"], 3, **QUICK)
    (group,) = found.groups
    assert [arm.label for arm in group.arms] == ["full", "trim", "random"]
    rows = records.read("here")
    assert len(rows) == 9
    for row in rows:
        assert row["status"] == "finished"
        assert row["test_error"] is None
        assert row["value"] == pytest.approx(row["curve"]["value"][-1], rel=1e-5)
        assert row["curve"]["epoch"] == [0, 1, 2]
        assert row["samples_forward"] == 3 * 96
    kept = {row["config"]["method"]: row["samples_backward"] for row in rows}
    assert kept["full"] == 3 * 96
    assert kept["trim"] == kept["random"] == 6 * (16 + 10 + 3)  # q is 1.0, 0.6, 0.2
    assert Path("here/report.html").stat().st_size > 1000


def test_what_is_recorded_is_not_done_again(capfd: pytest.CaptureFixture[str]) -> None:
    done: list[tuple[str, int]] = []

    def train(run: Run) -> dict[str, float]:
        done.append((run.method, run.seed))
        return calls()(run)

    compare(train, ["full", "trim"], 2, epochs=2, out="here")
    assert len(done) == 4
    compare(train, ["full", "trim"], 3, epochs=2, out="here")
    assert done[4:] == [("full", 2), ("trim", 2)]
    assert "4 of 6 runs are recorded already" in capfd.readouterr().err


def test_a_run_repeats_bit_for_bit_and_by_the_engine() -> None:
    first = run_once(fit, "trim", 3, epochs=3, metric="rmse", threads=1)
    assert first == run_once(fit, "trim", 3, epochs=3, metric="rmse", threads=1)
    assert first != run_once(fit, "trim", 4, epochs=3, metric="rmse", threads=1)
    with_engine = run_once(lambda run: fit(run, engine=True), "trim", 3, epochs=3, metric="rmse", threads=1)
    assert with_engine == pytest.approx(first, rel=1e-4)
    two_pass = run_once(
        lambda run: fit(run, engine=True), "trim", 3, epochs=3, metric="rmse", threads=1, engine="two_pass"
    )
    assert two_pass == pytest.approx(first, rel=1e-3)


DRIVEN = [name for name in driven_methods() if name != "ordered_sgd"]  # which takes the accuracy


@pytest.mark.parametrize("which", few(["each kind", "all"], ["each kind"]))
def test_every_method_a_trimmer_drives_runs(which: str) -> None:
    kinds = ["full", "trim", "random", "small_loss", "two_sided"]
    assert set(kinds) <= set(DRIVEN)
    methods = DRIVEN if which == "all" else kinds
    found = compare(fit, methods, 1, **QUICK)
    assert found.failed == 0

    def with_accuracy(run: Run) -> dict[str, float]:
        run.trim(torch.rand(8))
        run.trim.step(accuracy=0.5)
        return {"error": 0.1}

    assert run_once(with_accuracy, "ordered_sgd") == 0.1


def test_the_process_is_seeded_and_left_as_it_was(tmp_path: Path) -> None:
    drawn: list[tuple[float, float, float]] = []

    def train(run: Run) -> dict[str, float]:
        drawn.append((torch.rand(()).item(), random.random(), float(np.random.rand())))  # noqa: NPY002
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_num_threads(2)
        Path("/").exists()
        import os

        os.chdir("/")
        run.trim(torch.rand(4))
        run.trim.step()
        return {"error": 0.1}

    torch.manual_seed(11)
    expected = torch.rand(())
    torch.manual_seed(11)
    for seed in (0, 1, 0):
        run_once(train, "full", seed)
    assert torch.equal(torch.rand(()), expected)
    assert drawn[0] == drawn[2] != drawn[1]
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == 1
    assert Path.cwd() == tmp_path


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
def test_a_trainer_takes_the_schedule_and_the_rule() -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from torch.utils.data import DataLoader, TensorDataset

    from batchtrim.integrations.lightning import TrimmingCallback

    class Fit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(1, 1)
            self.trim: Any = None

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.trim(F.mse_loss(self.model(batch[0]), batch[1], reduction="none").squeeze(1))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.02)

    def train(run: Run) -> dict[str, float]:
        x, y = data()
        model = Fit()
        trainer = pl.Trainer(
            max_epochs=run.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=run.out,
            callbacks=[TrimmingCallback(run.keep, **run.trim_options)],
        )  # fmt: skip
        trainer.fit(model, DataLoader(TensorDataset(x, y), 16, shuffle=True))
        return {"rmse": F.mse_loss(model.model(x), y).sqrt().item()}

    compare(train, ["full", "trim"], 1, **QUICK)
    kept = {row["config"]["method"]: row["samples_backward"] for row in records.read("here")}
    assert kept["trim"] == 6 * (16 + 10 + 3)
    assert kept["full"] == 3 * 96


def test_curves_of_numbers_that_come_and_go_stay_aligned() -> None:
    def train(run: Run) -> dict[str, float]:
        run.log(error=0.5)
        run.log(loss=2.0)
        run.log(error=0.2, loss=1.0)
        return {"error": 0.2}

    compare(train, ["full"], 1, epochs=3, out="here", quiet=True)
    curve = records.read("here")[0]["curve"]
    assert curve["test_error"] == [0.5, None, 0.2]
    assert curve["loss"] == [None, 2.0, 1.0]
    assert curve["epoch"] == [0, 1, 2]


def test_tensorboard_gets_what_is_logged() -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    compare(fit, ["trim"], 1, **QUICK, tensorboard=True)
    (folder,) = Path("here/tensorboard").iterdir()
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert {"rmse", "keep", "kept_loss", "ratio"} <= set(events.Tags()["scalars"])
    assert [round(each.value, 3) for each in events.Scalars("keep")] == [1.0, 0.625, 0.188], "10 and 3 of 16"


def test_sources_are_distinguished_by_what_they_do(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text("def train(run):\n    return {'error': 0.1}\n")
    first = Code.in_file("task.py:train", "task").source
    path.write_text('"""Doc."""\n\ndef train(run):  # a comment\n    """Doc."""\n    return {\n"error": 0.1}\n')
    assert Code.in_file("task.py:train", "task").source == first
    path.write_text("def train(run):\n    return {'error': 0.2}\n")
    assert Code.in_file("task.py:train", "task").source != first


def test_a_changed_function_does_not_pass_for_the_recorded_one(capfd: pytest.CaptureFixture[str]) -> None:
    def made(error: float) -> Any:
        def train(run: Run) -> dict[str, float]:
            run.trim(torch.rand(8))
            run.trim.step()
            return {"error": error}

        return train

    compare(made(0.1), ["full", "trim"], 2, epochs=2, out="here", quiet=True)
    assert compare(made(0.1), ["full", "trim"], 2, epochs=2, out="here", quiet=True).runs == 4
    with pytest.raises(records.UseAnotherFolder, match=r"expected runs of the present train in here, got those of ano"):
        compare(made(0.2), ["full", "trim"], 2, epochs=2, out="here", quiet=True)
    found = compare(made(0.2), ["full", "trim"], 3, epochs=2, out="here")  # goes on, as after a mended fault
    assert "4 of these runs were made by another version of train. To run one version" in capfd.readouterr().err
    assert any("made by 2 versions of the program" in each for each in caveat_texts(found.groups[0]))


@pytest.mark.slow
def test_closures_are_sent_to_other_processes_or_refused() -> None:
    scale = 0.25

    def train(run: Run) -> dict[str, float]:
        run.trim(torch.rand(4))
        run.trim.step()
        return {"error": scale}

    found = compare(train, ["full"], 2, epochs=1, out="here", quiet=True, workers=2)
    assert [arm.moments.mean for arm in found.groups[0].arms] == [0.25]
    lock = threading.Lock()
    with pytest.raises(TypeError, match="expected a function that can go to another process"):
        compare(lambda run: {"error": float(lock.locked())}, ["full"], 2, out="there", workers=2)


def test_a_keep_log_is_written_with_what_its_samples_are() -> None:
    def train(run: Run) -> dict[str, float]:
        log = run.keep_log(8)
        for _ in range(run.epochs):
            run.trim(torch.arange(8.0))
            log.record(run.trim.last, ids=torch.arange(8))
            log.end_epoch()
            run.trim.step()
        run.show(rows=[{"x": i} for i in range(8)])
        return {"error": 0.1}

    compare(train, ["trim"], 1, epochs=3, out="here", quiet=True)
    (row,) = records.read("here")
    log = batchtrim.KeepLog.from_parquet(Path("here/keep") / f"{row['key']}.parquet")
    assert log.table()["kept"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3]
    assert (Path("here/keep") / f"{row['key']}.json").exists()


def test_summarize_takes_rows_of_records_and_of_a_table() -> None:
    compare(calls(), ["full", "trim"], 3, epochs=2, out="here", quiet=True)
    assert summarize(records.read("here")).runs == 6
    rows = [{"method": m, "seed": s, "error": 0.2 - 0.01 * (m == "trim")} for m in ("full", "trim") for s in range(4)]
    (group,) = summarize(rows).groups
    assert group.arms[1].paired is not None
    assert group.arms[1].paired.moments.mean == pytest.approx(-0.01)


def test_a_rule_in_place_of_the_method_s_is_reported() -> None:
    """It was said that the trimmer was never called."""

    def train(run: Run) -> dict[str, float]:
        run.trim.rule = batchtrim.easiest()
        return calls()(run)

    assert "which makes the run one of 'full', got another in its place: easiest()" in failing(train)


def test_a_rule_that_is_replaced_on_the_way_is_reported_and_one_that_changes_is_counted() -> None:
    """What the other rule chose was not counted, without a word."""

    def train(run: Run, where: str) -> dict[str, float]:
        for epoch in range(run.epochs):
            if epoch == 1:
                getattr(run, where).rule = batchtrim.easiest()
            run.trim(torch.ones(8, requires_grad=True) * torch.arange(8.0)).backward()
            run.trim.step()
        return {"error": 0.5}

    def replaced(run: Run) -> dict[str, float]:
        return train(run, "trim")

    def changed(run: Run) -> dict[str, float]:
        return train(run, "rule")

    assert "in its place: easiest()" in failing(replaced)
    compare(changed, methods=["trim"], seeds=1, epochs=2, out="there", quiet=True)
    assert records.read("there")[0]["samples_forward"] == 16
