"""A training function of one's own: what it is given, what is recorded, and what happens when it does wrong."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim.integrations.lightning import TrimmingCallback
from batchtrim.lab import Run, compare, headline, records, run_once, summarize
from batchtrim.lab.methods.driven import driven_methods
from batchtrim.lab.run.handle import TaskMistake
from batchtrim.lab.task.code import Code, YourCodeFailed

Function = Callable[[Run], Any]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def data() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-2, 2, 96).unsqueeze(1)
    return x, torch.sin(2 * x) + 0.1 * torch.cos(40 * x)


def fit(run: Run, engine: bool = False) -> dict[str, float]:
    """A regression with a small network: rmse."""
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
    """A task that does the least that is asked of it."""

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


def test_every_method_a_trimmer_drives_runs() -> None:
    methods = [name for name in driven_methods() if name != "ordered_sgd"]
    assert {"full", "trim", "random", "small_loss", "two_sided"} <= set(methods)
    found = compare(fit, methods, 1, **QUICK)
    assert found.failed == 0

    def with_accuracy(run: Run) -> dict[str, float]:
        run.trim(torch.rand(8))
        run.trim.step(accuracy=0.5)
        return {"error": 0.1}

    assert run_once(with_accuracy, "ordered_sgd") == 0.1


@pytest.mark.parametrize("method", ["infobatch", "rho_loss", "focal", "superloss", "full_equal_compute"])
def test_a_method_no_trimmer_drives_is_refused_before_the_first_run(method: str) -> None:
    with pytest.raises(ValueError, match=f"expected a method that a Trimmer drives.*got '{method}'"):
        compare(calls(), ["full", method], 1, out="here")
    assert not Path("here").exists()


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


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (None, 'expected the task to return {"error": ...}, got None'),
        ("0.3", "got '0.3'"),
        (0.3, "got 0.3"),
        ([0.3], "got [0.3]"),
        ({}, "got nothing in it"),
        ({"accuracy": 0.3}, "got accuracy. --metric says which number is compared"),
        ({"error": "low"}, "expected `error` to be a number, got 'low'"),
        ({"error": True}, "expected `error` to be a number, got True"),
        ({"error": None}, "expected `error` to be a number, got None"),
        ({"error": 12.5}, "expected `error` in [0, 1], a fraction of the test samples, got 12.5"),
        ({"error": -0.1}, "expected `error` in [0, 1]"),
        ({"error": torch.rand(3)}, "expected `error` to be a number, got a tensor of shape (3,)"),
    ],
)
def test_what_is_no_result_stops_the_comparison(returned: Any, says: str) -> None:
    done = []

    def train(run: Run) -> Any:
        done.append(run)
        calls()(run)
        return returned

    text = failing(train)
    assert says in text
    assert "\n" not in text
    assert len(done) == 1, "the other runs would end the same way"


@pytest.mark.parametrize("value", [torch.tensor(0.25), np.float64(0.25), np.array(0.25), torch.tensor([0.25]), 0.25])
def test_numbers_of_every_kind_are_results(value: Any) -> None:
    def train(run: Run) -> dict[str, Any]:
        run.trim(torch.rand(4))
        run.trim.step()
        return {"error": value, "rmse": np.float32(2.0), "words": "ignored"}

    compare(train, ["full"], 1, epochs=1, out="here", quiet=True)
    (row,) = records.read("here")
    assert row["test_error"] == 0.25
    assert row["also"] == {"rmse": 2.0}


def test_nan_is_a_run_that_diverged() -> None:
    found = compare(calls(math.nan), ["full", "trim"], 2, epochs=2, quiet=True, out="here")
    assert found.diverged == 4
    assert "every run diverged" in headline(found)


def test_another_metric_each_time_keeps_what_finished() -> None:
    def train(run: Run) -> dict[str, float]:
        calls()(run)
        return {"error": 0.1} if run.method == "full" else {"accuracy": 0.9}

    assert "got accuracy" in failing(train)
    assert [row["status"] for row in records.read("here")] == ["finished", "failed"]


def test_a_task_that_raises_is_told_by_its_own_lines(capfd: pytest.CaptureFixture[str]) -> None:
    def inner(run: Run) -> None:
        raise KeyError("column")

    def train(run: Run) -> dict[str, float]:
        if run.method == "trim":
            inner(run)
        return calls()(run)

    found = compare(train, ["full", "trim"], 2, epochs=2, quiet=True, out="here")
    assert found.failed == 2
    told = capfd.readouterr().err
    assert told.count("Traceback") == 1, "the same for both seeds"
    assert "in inner" in told
    assert "KeyError: 'column'" in told
    assert "perform.py" not in told
    assert "own.py" not in told.replace("test_own.py", "")
    assert "every run failed" in failing(lambda run: inner(run), out="there")


def test_our_own_lines_are_left_out_below_theirs_too() -> None:
    def train(run: Run) -> dict[str, float]:
        run.trim(torch.rand(3).mean())
        return {"error": 0.0}

    told = failing(train)
    assert "Did the loss function average already?" in told
    assert "in train" in told
    assert "trimmer.py" not in told
    assert "_checks.py" not in told


def test_exit_fails_one_run() -> None:
    def train(run: Run) -> dict[str, float]:
        if run.seed == 1 and run.method == "trim":
            raise SystemExit(3)
        return calls()(run)

    found = compare(train, ["full", "trim"], 3, epochs=2, quiet=True, out="here")
    assert (found.runs, found.failed) == (6, 1)
    assert next(row for row in records.read("here") if row["status"] == "failed")["error"].startswith(
        "the task called exit(3)"
    )


def test_a_task_that_forgets_its_trimmer_is_told() -> None:
    text = failing(lambda run: {"error": 0.1})
    assert "got a run of 'trim' in which it was never called: it would be plain training by another name" in text
    assert [row["config"]["method"] for row in records.read("here") if row["status"] == "finished"] == ["full"]


def test_a_task_that_forgets_the_clock_is_told() -> None:
    assert "to call run.trim.step() once an epoch" in failing(calls(steps=False))


def test_a_schedule_that_did_not_get_to_its_end_is_noted(capfd: pytest.CaptureFixture[str]) -> None:
    def train(run: Run) -> dict[str, float]:
        for _ in range(2):
            run.trim(torch.rand(8))
            run.trim.step()
        return {"error": 0.1}

    compare(train, ["trim"], 1, epochs=10, out="here")
    assert (
        "run.trim.step() was called 2 times in 10 epochs, so the schedule ended at keep 0.82" in capfd.readouterr().err
    )


def test_a_compiled_step_counts_as_used() -> None:
    def train(run: Run) -> dict[str, float]:
        @torch.compile(fullgraph=True, backend="aot_eager")
        def loss_of(losses: Tensor) -> Tensor:
            return run.trim(losses)

        for _ in range(run.epochs):
            loss_of(torch.rand(8))
            run.trim.step()
        return {"error": 0.1}

    assert run_once(train, "trim", epochs=2) == 0.1


def test_threads_that_are_left_behind_are_noted(capfd: pytest.CaptureFixture[str]) -> None:
    stop = threading.Event()

    def train(run: Run) -> dict[str, float]:
        threading.Thread(target=stop.wait, name="loader", daemon=True).start()
        return calls()(run)

    try:
        compare(train, ["full"], 1, epochs=2, out="here")
    finally:
        stop.set()
    assert "the task left 1 thread running (loader)" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
def test_a_trainer_takes_the_schedule_and_the_rule() -> None:
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

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


def test_log_refuses_what_is_no_number_or_a_second_time() -> None:
    def words(run: Run) -> dict[str, float]:
        run.log(error="low")  # type: ignore[arg-type]
        return {"error": 0.1}

    assert "expected `error` to be a number, got 'low'" in failing(words)

    def twice(run: Run) -> dict[str, float]:
        run.log(epoch=0, error=0.2)
        run.log(epoch=0, error=0.1)
        return {"error": 0.1}

    assert "expected `epoch` after 0, got 0" in failing(twice, out="there")


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
    assert {"value", "keep", "kept_loss", "ratio"} <= set(events.Tags()["scalars"])
    assert [round(each.value, 3) for each in events.Scalars("keep")] == [1.0, 0.6, 0.2]


def test_settings_that_are_wrong_are_refused() -> None:
    for settings, says in (
        ({"lr": 0.1}, "expected settings of a task"),
        ({"epochs": 0}, "expected `epochs` to be at least 1"),
        ({"keep_end": 20}, "It is a fraction of the batch"),
        ({"metric": "score"}, "expected `higher_is_better` for the metric 'score'"),
        ({"metric": "rmse", "higher_is_better": True}, "expected lower to be better for the metric 'rmse'"),
        ({"metric": ""}, "expected `metric` to be a name"),
        ({"schedule": "steep"}, "expected `schedule` to be one of"),
    ):
        with pytest.raises((ValueError, TypeError), match=says.replace("(", r"\(")):
            compare(calls(), **settings)
    with pytest.raises(TypeError, match=r"expected a function or 'FILE.py:NAME', got 3"):
        compare(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"to take one argument, the run"):
        compare(lambda: None, out="here")  # type: ignore[arg-type, misc]


def test_the_source_is_told_apart_by_what_it_does(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text("def train(run):\n    return {'error': 0.1}\n")
    first = Code.in_file("task.py:train", "task").source
    path.write_text('"""Doc."""\n\ndef train(run):  # a comment\n    """Doc."""\n    return {\n"error": 0.1}\n')
    assert Code.in_file("task.py:train", "task").source == first
    path.write_text("def train(run):\n    return {'error': 0.2}\n")
    assert Code.in_file("task.py:train", "task").source != first


def test_a_closure_goes_to_other_processes_and_what_cannot_is_said() -> None:
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


def test_importing_the_lab_brings_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, batchtrim, batchtrim.lab\n"
        "assert not {'scipy', 'typer', 'rich', 'pyarrow', 'PIL', 'lightning_fabric'} & set(sys.modules)\n"
        "batchtrim.lab.compare"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
