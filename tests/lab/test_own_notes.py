"""Notes on a training function: a schedule that did not run as meant, and what a run leaves behind."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batchtrim.lab import Run, compare, records
from own_tasks import calls


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stepping(times: int) -> Callable[[Run], dict[str, float]]:
    """Return a task that steps its clock so often, whatever its epochs."""

    def train(run: Run) -> dict[str, float]:
        for _ in range(times):
            run.trim(torch.rand(8))
            run.trim.step()
        return {"error": 0.1}

    return train


def test_a_schedule_that_did_not_get_to_its_end_is_noted(capfd: pytest.CaptureFixture[str]) -> None:
    compare(stepping(2), ["trim"], 1, epochs=10, out="here")
    assert (
        "run.trim.step() was called 2 times in 10 epochs, so the schedule ended at keep 0.82" in capfd.readouterr().err
    )


def test_a_task_that_shortens_its_run_is_noted() -> None:
    """The note on the schedule went by the epochs that the task had set."""

    def train(run: Run) -> dict[str, float]:
        run.epochs, run.seed = 2, 7
        return stepping(run.epochs)(run)

    compare(train, ["trim"], 1, epochs=10, out="here", quiet=True)
    (note,) = records.read("here")[0]["notes"]
    assert note.startswith("run.trim.step() was called 2 times in 10 epochs")


@pytest.mark.filterwarnings("ignore::batchtrim.errors.ClockPastTotal")
def test_a_clock_that_counts_batches_for_epochs_is_noted(capfd: pytest.CaptureFixture[str]) -> None:
    """The warning went by; the record said nothing of a schedule that was over in the first epoch."""

    compare(stepping(40), ["trim"], 1, epochs=10, out="here")
    said = "run.trim.step() was called 40 times in 10 epochs, so the schedule was over after 22% of them"
    assert said in capfd.readouterr().err
    assert records.read("here")[0]["notes"] == [said]


@pytest.mark.parametrize(("method", "rows", "noted"), [("trim", 8, False), ("trim", 1, True), ("full", 8, False),
                                                       ("loss_mass", 8, False), ("loss_mass", 1, True)])  # fmt: skip
def test_a_run_that_kept_everything_is_noted(method: str, rows: int, noted: bool) -> None:
    """A trimmer of one's own that is never stepped, or batches of one sample: plain training by another name."""

    def train(run: Run) -> dict[str, float]:
        for _ in range(run.epochs):
            run.trim(torch.arange(rows) ** 3.0)
            run.trim.step()
        return {"error": 0.1}

    compare(train, [method], 1, epochs=2, out="here", quiet=True)
    notes = records.read("here")[0].get("notes", [])
    assert [each.startswith(f"every one of the {2 * rows} samples was kept") for each in notes] == [True] * noted


@pytest.mark.parametrize("method", ["trim", "small_loss"])
def test_one_epoch_is_the_cause_of_keeping_everything(method: str) -> None:
    """It asked to check the clock and the size of the batches, or, of small_loss, said nothing."""
    compare(stepping(1), [method], 1, epochs=1, out="here", quiet=True)
    cause, note = records.read("here")[0]["notes"]
    assert note.endswith("samples was kept, as in plain training")
    assert {"trim": "epochs 1: a schedule moves", "small_loss": "small_loss: with epochs 1"}[method] in cause


def test_remarks_on_the_settings_are_printed_once_and_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    """They were printed on the command line, not from Python, and not in the report."""
    params = {"small_loss": {"noise_rate": 0.2, "ramp_epochs": 9}}
    compare(stepping(3), ["full", "small_loss", "trim"], 2, epochs=3, params=params, keep_start=0.2, keep_end=0.8,
            out="here")  # fmt: skip
    said, report = capsys.readouterr().err, Path("here/report.md").read_text().replace("\\", "")
    for words in ("small_loss: with epochs 3 the dropped fraction rises to 0.044", "keep_start 0.2 is below keep_end"):
        assert said.count(words) == 1
        assert words in report


def test_what_one_run_leaves_for_the_next_is_noted() -> None:
    """A network or a generator outside of the function makes results depend on the order of the runs."""
    held: dict[str, Any] = {"network": torch.nn.Linear(1, 1), "data": torch.ones(2)}
    draws, numbers, own = torch.Generator(), np.random.default_rng(0), random.Random(0)

    def train(run: Run) -> dict[str, float]:
        if run.method == "trim":
            torch.rand(2, generator=draws), numbers.random(), own.random()
            with torch.no_grad():
                held["network"].weight.add_(1.0)
        held["made"] = held["data"] + 1
        return calls()(run)

    compare(train, ["full", "trim"], 1, epochs=2, out="here", quiet=True)
    full, trim = records.read("here")
    assert "notes" not in full
    assert trim["notes"][0].startswith(
        "the task changed draws, held, numbers, ..., which it did not make: the next run"
    )


def closed_over(value: Any) -> Callable[[], Any]:
    return lambda: value


HIDDEN: dict[str, tuple[Callable[[], Callable[[], Any]], str]] = {
    "a cache": (lambda: functools.cache(lambda: nn.Linear(1, 1)), "get"),
    "a cache with a limit": (lambda: functools.lru_cache(1)(lambda: nn.Linear(1, 1)), "get"),
    "a generator in a cache": (lambda: functools.cache(torch.Generator), "get"),
    "a closure of another function": (lambda: closed_over(nn.Linear(1, 1)), "a network kept from before (Linear)"),
    "weights": (lambda: closed_over(torch.ones(1, requires_grad=True)), "a network kept from before (Tensor)"),
}


@pytest.mark.parametrize("where", HIDDEN)
def test_a_network_is_seen_wherever_it_is_kept(where: str) -> None:
    """Only what the function itself names, outside of caches, was looked at."""
    make, says = HIDDEN[where]
    get = make()

    def train(run: Run) -> dict[str, float]:
        found = get()
        if isinstance(found, torch.Generator):
            torch.rand(1, generator=found)
        else:
            with torch.no_grad():
                for each in found.parameters() if isinstance(found, nn.Module) else [found]:
                    each.add_(1.0)
        return calls()(run)

    get()
    compare(train, ["full"], 1, epochs=2, out="here", quiet=True)
    assert [each.partition(" which it did not")[0] for each in records.read("here")[0]["notes"]] == [
        f"the task changed {says},"
    ]


def test_a_network_without_sizes_is_looked_at() -> None:
    """Parameters of a lazy layer have no version yet."""
    kept = nn.LazyLinear(1)

    def train(run: Run) -> dict[str, float]:
        kept(torch.ones(8, 2))
        return calls()(run)

    compare(train, ["full"], 1, epochs=2, out="here", quiet=True)
    assert records.read("here")[0]["status"] == "finished"


@pytest.mark.parametrize("shape", [(3,), (3000, 3000)])
def test_an_array_that_a_run_changes_is_noted(shape: tuple[int, ...]) -> None:
    """As labels made wrong, or features scaled, once more in every run."""
    labels = np.ones(shape)

    def train(run: Run) -> dict[str, float]:
        labels[:] *= 2.0 if run.method == "trim" else 1.0
        return calls()(run)

    compare(train, ["full", "trim"], 1, epochs=2, out="here", quiet=True)
    full, trim = records.read("here")
    assert "notes" not in full
    assert trim["notes"][0].startswith("the task changed labels, which it did not make")


def test_data_shuffled_or_changed_in_place_are_noted() -> None:
    """The next run draws its batches from what this one left; a list that collects results is not told."""
    pandas = pytest.importorskip("pandas")
    rows, nested, seen = list(range(2000)), {"train": ["a", "b", "c"]}, [0.5]
    frame, texts = pandas.DataFrame({"x": [1.0, 2.0], "name": ["a", "b"]}), pandas.Series(["a", "b"])

    def train(run: Run) -> dict[str, float]:
        random.shuffle(rows)
        nested["train"].reverse()
        frame["x"] = frame["x"] / 2
        seen.insert(0, float(len(texts)))
        return stepping(1)(run)

    compare(train, ["full"], 1, epochs=1, out="here", quiet=True)
    (note,) = records.read("here")[0]["notes"]
    assert note.startswith("the task changed frame, nested, rows, which it did not make: the next run in the process")


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


class LibraryThread(threading.Thread):
    """As tqdm's monitor."""


def test_threads_of_libraries_are_not_told_and_processes_are(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import multiprocessing

    monkeypatch.setattr(LibraryThread, "__module__", "numpy")
    left: list[Any] = []

    def train(run: Run) -> dict[str, float]:
        left.append(LibraryThread(target=time.sleep, args=(0.5,), name="monitor", daemon=True))
        left.append(multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,), name="mine"))
        for each in left[-2:]:
            each.start()
        return calls()(run)

    compare(train, ["full"], 1, epochs=2, threads=1, quiet=True, out="here")
    for each in left[1::2]:
        each.kill()
        each.join()
    assert records.read("here")[0]["notes"] == ["the task left 1 process running (mine)"]


@pytest.mark.parametrize(("method", "forward", "noted"), [("trim", False, True), ("full", False, False),
                                                          ("trim", True, False)])  # fmt: skip
def test_an_engine_that_was_not_used_is_noted(method: str, forward: bool, noted: bool) -> None:
    """The runs were recorded as those of an engine that no step had used."""

    def train(run: Run) -> dict[str, float]:
        step = run.forward(nn.Linear(2, 2), nn.CrossEntropyLoss()) if forward else None
        for _ in range(run.epochs):
            step(torch.rand(8, 2), torch.zeros(8).long()) if step else run.trim(torch.rand(8))
            run.trim.step()
        return {"error": 0.1}

    compare(train, [method], 1, epochs=2, engine="two_pass", quiet=True, out="here")
    assert any("--engine had no effect" in note for note in records.read("here")[0].get("notes", ())) == noted
