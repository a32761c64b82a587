"""The training loop: it repeats, resumes, counts, keeps its clocks separate, and reports when a run diverges."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import launch
from batchtrim.errors import ApproximateGradient
from batchtrim.lab import records
from batchtrim.lab.run import loading, loop, train
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.task import models
from tiers import few

SMALL = RunConfig(method="trim", epochs=3, train_size=300, batch_size=64, lr=0.003)


def comparable(row: dict[str, Any]) -> str:
    """A row without what time of day and speed of the machine put into it."""
    row = {
        name: value
        for name, value in row.items()
        if name not in ("seconds", "seconds_eval", "seconds_total", "started")
    }
    row["curve"] = {name: values for name, values in row["curve"].items() if name != "seconds"}
    return json.dumps(row)


def test_it_equals_a_loop_written_by_hand() -> None:
    """The same weights as fifteen lines that use nothing of the loop, up to the rounding of the learning rate."""
    config = replace(SMALL, method="full", optimizer="adam", lr_schedule="cosine").resolved()
    images = loading.load_images(config)
    training = loop.Training(config, images)
    while training.epoch < 3:
        training.advance()

    torch.manual_seed(0)
    model = models.build("mlp", (1, 8, 8), 10)
    optimizer = torch.optim.Adam(model.parameters())
    order = torch.Generator().manual_seed(0)
    inputs = (images.train_images.float() - images.mean[0]) * (1.0 / torch.tensor(images.std[0]))
    for step in range(3 * 5):
        if step % 5 == 0:
            batches = torch.randperm(300, generator=order).split(64)
        rows = batches[step % 5]
        for group in optimizer.param_groups:
            group["lr"] = 0.003 * (1 + math.cos(math.pi * (step // 5 + step % 5 / 5) / 3)) / 2
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[rows]), images.train_labels[rows]).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(training.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_row_has_what_readers_rely_on() -> None:
    row = train.train_run(SMALL)
    assert row["schema"] == 1
    assert row["key"] == SMALL.resolved().key
    assert row["status"] == "finished"
    assert 0 < row["test_error"] < 1
    assert row["test_error"] == row["curve"]["test_error"][-1]
    assert set(row["curve"]) == {
        "epoch", "test_error", "train_error", "keep", "kept_loss", "mean_loss", "lr", "seconds",
        "samples_backward",
    }  # fmt: skip
    assert {len(values) for values in row["curve"].values()} == {3}
    assert row["curve"]["epoch"] == [0, 1, 2]
    assert row["samples_forward"] == 900
    # batches of 64 and one of 44: round(0.6 * 64) = 38, round(0.6 * 44) = 26; round(0.2 * 64) = 13, round(8.8) = 9
    assert row["samples_backward"] == 300 + 4 * 38 + 26 + 4 * 13 + 9
    assert row["curve"]["samples_backward"] == [300, 300 + 4 * 38 + 26, row["samples_backward"]]
    assert row["steps"] == 15
    assert row["params"] == 64 * 128 + 128 + 128 * 128 + 128 + 1290
    assert set(row["environment"]) >= {"torch", "python", "batchtrim", "platform", "cpu", "threads", "device", "commit"}
    assert RunConfig.from_dict(row["config"]).key == row["key"]
    json.dumps(row)


def test_runs_repeat_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    first = train.train_run(SMALL)
    assert torch.rand(3).equal(wanted)
    torch.rand(100)
    assert comparable(train.train_run(SMALL)) == comparable(first)


def test_threads_are_set_for_the_run_alone() -> None:
    before = torch.get_num_threads()
    seen = []
    train.train_run(replace(SMALL, threads=2), on_epoch=lambda _: seen.append(torch.get_num_threads()))
    assert seen == [2, 2, 2]
    assert torch.get_num_threads() == before


def test_an_interrupted_run_continues_from_its_checkpoint(tmp_path: Path) -> None:
    """Stopped after the second epoch; what goes on trains one more and gives the row of a run never stopped."""
    file = tmp_path / "checkpoints" / "run.pt"
    config = replace(SMALL, augment="crop+flip", optimizer="nesterov", lr=0.01)

    def stop_after_two(point: dict[str, Any]) -> None:
        if point["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train_run(config, checkpoint=file, checkpoint_seconds=0.0, on_epoch=stop_after_two)
    epochs = []
    resumed = train.train_run(config, checkpoint=file, on_epoch=lambda point: epochs.append(point["epoch"]))
    assert epochs == [2]
    assert comparable(resumed) == comparable(train.train_run(config))


def test_a_checkpoint_is_read_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of generators have to lie there, wherever the run trains."""
    file = tmp_path / "run.pt"
    train.train_run(SMALL, checkpoint=file, checkpoint_seconds=0.0)
    places, load = [], torch.load

    def noting(*args: Any, **options: Any) -> Any:
        places.append(options["map_location"])
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", noting)
    train.train_run(SMALL, checkpoint=file)
    assert places == ["cpu"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    train.train_run(SMALL, checkpoint=file, checkpoint_seconds=0.0)
    with pytest.raises(ValueError, match="expected a checkpoint of run"):
        train.train_run(replace(SMALL, seed=1), checkpoint=file)


def test_a_run_that_diverges_is_recorded_as_such() -> None:
    row = train.train_run(replace(SMALL, lr=1e30, optimizer="sgd"))
    assert row["status"] == "diverged"
    assert "not finite after epoch 1 of 3" in row["error"]
    assert row["test_error"] is None
    assert len(row["curve"]["epoch"]) == 1


def test_a_network_that_breaks_in_its_last_step_has_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of the last epoch are still fine; only the weights are not."""
    config = replace(SMALL, epochs=1).resolved()
    training = loop.Training(config, loading.load_images(config))
    step, calls = training.optimizer.step, []

    def breaking_step() -> None:
        step()
        calls.append(1)
        if len(calls) == 5:
            for parameter in training.model.parameters():
                parameter.data.fill_(float("inf"))

    monkeypatch.setattr(training.optimizer, "step", breaking_step)
    with pytest.raises(loop.Diverged):
        training.advance()


def test_evaluation_has_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = loop.Training.evaluate
    monkeypatch.setattr(loop.Training, "evaluate", lambda self: (time.sleep(0.2), evaluate(self))[1])
    row = train.train_run(replace(SMALL, epochs=2))
    assert row["seconds_eval"] > 0.4
    assert row["seconds"] < 0.4


def test_selection_is_inside_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = loop.Training._loss
    monkeypatch.setattr(loop.Training, "_loss", lambda self, *args: (time.sleep(0.04), loss(self, *args))[1])
    assert train.train_run(replace(SMALL, epochs=1))["seconds"] > 5 * 0.04


OPTIMIZERS, LR_SCHEDULES = ["adam", "adamw", "sgd", "nesterov"], ["constant", "step", "cosine", "onecycle"]


# by default each optimizer and each schedule once
@pytest.mark.parametrize(
    ("optimizer", "lr_schedule"),
    few(itertools.product(OPTIMIZERS, LR_SCHEDULES), list(zip(OPTIMIZERS, LR_SCHEDULES, strict=True))),
)
def test_every_optimizer_learns_with_every_learning_rate(optimizer: str, lr_schedule: str) -> None:
    lr = 0.001 if optimizer.startswith("adam") else 0.01
    settings = replace(SMALL, optimizer=optimizer, lr=lr, lr_schedule=lr_schedule, epochs=4, batch_size=16)
    assert train.train_run(settings)["test_error"] < 0.4


def test_sharing_the_seed_shares_start_and_order() -> None:
    """Comparisons are paired: at one seed two methods see the same images first."""
    trainings = [loop.Training(config, loading.load_images(config)) for config in (
        replace(SMALL, method=name).resolved() for name in ("full", "random")
    )]  # fmt: skip
    first, second = (training.model.state_dict() for training in trainings)
    assert all(first[name].equal(second[name]) for name in first)
    points = [training.train_epoch() for training in trainings]  # the first epoch keeps everything
    assert points[0]["mean_loss"] == points[1]["mean_loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, r"`epochs` to be at least 1, got 0"),
        ({"epochs": 2.5}, r"`epochs` to be an int, got 2.5"),
        ({"lr": -1.0}, r"`lr` to be positive"),
        ({"momentum": 1.5, "optimizer": "sgd"}, r"`momentum` in \[0, 1\)"),
        ({"keep_end": 20}, r"`keep_end` in \(0, 1\], got 20\. It is a fraction"),
        ({"keep_start": float("nan")}, r"`keep_start` in \(0, 1\], got nan"),
        ({"keep_end": "20%"}, r"`keep_end` to be a number, got '20%'"),
        ({"optimizer": "adm"}, r"`optimizer` to be one of 'adam'"),
        ({"schedule": "exponential"}, r"`schedule` to be one of 'linear'"),
        ({"device": "tpu"}, r"`device` to be one of"),
        ({"imbalance": 0.5}, r"`imbalance` to be at least 1"),
        ({"train_size": 3}, r"`train_size` to be at least 10"),
        ({"weight_decay": -0.1}, r"`weight_decay` to be at least 0"),
        ({"augment": "cutmix"}, r"`augment` to be one of"),
        ({"label_noise": "symmetric:2"}, r"rate in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        replace(SMALL, **settings).resolved()


def test_equal_runs_have_equal_keys() -> None:
    assert SMALL.resolved().key == replace(SMALL, threads=7).resolved().key
    assert SMALL.resolved().key == SMALL.resolved().resolved().key
    assert replace(SMALL, method="full").resolved().key == replace(SMALL, method="full", keep_end=0.5).resolved().key
    others = [{"seed": 1}, {"keep_end": 0.3}, {"lr": 0.1}, {"label_noise": "symmetric:0.1"}, {"epochs": 4}]
    assert len({replace(SMALL, **other).resolved().key for other in [{}, *others]}) == 6


def test_settings_that_came_later_leave_the_keys_of_old_runs_alone() -> None:
    """Keys of runs recorded before label smoothing and test views were settings."""
    assert RunConfig(device="cpu").resolved().key == "5b216a01dfe8"
    assert replace(SMALL, label_smoothing=0.0, test_views="plain").resolved().key == SMALL.resolved().key
    assert replace(SMALL, eval_every=3).resolved().key == SMALL.resolved().key
    assert replace(SMALL, label_smoothing=0.1).resolved().key != SMALL.resolved().key
    assert replace(SMALL, test_views="mirror").resolved().key != SMALL.resolved().key


def test_testing_now_and_then_changes_what_is_known_and_not_what_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SMALL, epochs=7)
    said: list[str] = []
    tests: list[str] = []
    evaluate = loop.Training.evaluate
    monkeypatch.setattr(loop.Training, "evaluate", lambda self: tests.append("one") or evaluate(self))
    every = train.train_run(settings)
    assert len(tests) == 7
    tests.clear()
    some = train.train_run(
        replace(settings, eval_every=3), on_epoch=lambda point: said.append(str(point["test_error"]))
    )
    assert len(tests) == 3, "a test that is not made costs nothing"
    known = every["curve"]["test_error"]
    assert some["curve"]["test_error"] == [None, None, known[2], None, None, known[5], known[6]]
    assert said[0] == "None"
    assert some["test_error"] == every["test_error"]
    assert some["curve"]["mean_loss"] == every["curve"]["mean_loss"]
    assert 0.0 < some["seconds_eval"] < some["seconds_total"]
    records.Records(tmp_path).append(some)
    (row,) = records.read(tmp_path)
    assert row["curve"]["test_error"][:3] == [None, None, pytest.approx(known[2], rel=1e-5)]


def test_the_mirror_image_may_have_a_say() -> None:
    config = replace(SMALL, test_views="mirror").resolved()
    training = loop.Training(config, loading.load_images(config))
    seen: list[torch.Tensor] = []
    training.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    training.evaluate()
    assert len(seen) == 4  # 596 images are two batches
    assert torch.equal(seen[0].flip(3), seen[1])


def test_a_setting_of_no_run_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"got 'optimiser'\. Did you mean 'optimizer'\?"):
        RunConfig.from_dict({"optimiser": "adam"})


@pytest.mark.parametrize(
    ("model", "engine"),
    few(itertools.product(["mlp", "resnet8"], ["two_pass", "shared", "auto"]), [("mlp", "two_pass")]),
)
def test_engines_train_on_the_samples_that_exact_trains_on(engine: str, model: str) -> None:
    settings = replace(SMALL, model=model, width=8)
    exact = train.train_run(settings)
    approximate = engine == "auto" and model == "resnet8"
    with pytest.warns(ApproximateGradient, match="cosine 0") if approximate else nullcontext():
        other = train.train_run(replace(settings, engine=engine))
    assert other["samples_backward"] == exact["samples_backward"]
    assert other["curve"]["mean_loss"][0] == pytest.approx(exact["curve"]["mean_loss"][0], rel=1e-4)
    assert other["curve"]["train_error"][0] == pytest.approx(exact["curve"]["train_error"][0], abs=0.01)
    if model == "mlp":  # no batch statistics: the very same steps
        assert other["curve"]["kept_loss"] == pytest.approx(exact["curve"]["kept_loss"], rel=1e-3)
    # a second forward of what is kept, in all epochs but the first, which keeps everything
    extra = other["samples_backward"] - 300 if engine == "two_pass" else 0
    assert other["samples_forward"] == exact["samples_forward"] + extra


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_number_formats_train(precision: str) -> None:
    assert train.train_run(replace(SMALL, precision=precision))["test_error"] < 0.8


@pytest.mark.slow
def test_two_processes_do_one_run(tmp_path: Path) -> None:
    """With torchrun; where everything is kept the steps are those of one process, up to the order of sums."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        launch.__file__, "-m", "batchtrim.lab.cli", "train", "--epochs", "3", "--out", str(tmp_path), "--threads", "1",
        "--augment", "crop+flip", "--batch-size", "64",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for method in ("full", "trim"):
        done = subprocess.run(
            [*command, "--method", method], capture_output=True, text=True, env=environment, timeout=200
        )
        assert done.returncode == 0, done.stderr
    full, trim = records.read(tmp_path)
    assert full["environment"]["processes"] == 2
    alone = train.train_run(RunConfig.from_dict(full["config"]))
    assert full["curve"]["mean_loss"] == pytest.approx(alone["curve"]["mean_loss"], rel=1e-3)
    assert full["curve"]["train_error"] == pytest.approx(alone["curve"]["train_error"], abs=0.005)
    assert full["curve"]["test_error"] == pytest.approx(alone["curve"]["test_error"], abs=0.02)
    assert full["samples_backward"] == 3 * 1201
    # 18 batches of 64, each process keeping round(0.2 * 32) = 6 of its half, and 49 in the last: 5 of 25, 5 of 24
    assert trim["curve"]["keep"][-1] == pytest.approx((18 * 12 + 10) / 1201, rel=1e-5)  # written to six figures
