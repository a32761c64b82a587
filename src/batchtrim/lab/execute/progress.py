"""Progress on standard error: which run, which epoch, the error so far, the time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchtrim._checks import import_extra
from batchtrim.lab.metric import ERROR, Metric
from batchtrim.lab.records import Row
from batchtrim.lab.run.beat import OnEpoch
from batchtrim.lab.run.task_config import TaskConfig
from batchtrim.lab.terminal import console

SAY_EVERY = 30.0  # seconds between two lines inside an epoch, where there is no terminal


class Quiet:
    """Show nothing."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None: ...

    def begin(self, configs: list[Any], done: int) -> None: ...

    def epoch(self, config: Any, point: dict[str, Any]) -> None: ...

    def batch(self, config: Any, point: dict[str, Any]) -> None: ...

    def finished(self, config: Any, row: Row | None) -> None: ...

    def note(self, text: str) -> None: ...


class Live(Quiet):
    """A bar over all epochs of all runs, and a line for each run in progress.

    Where nothing can be redrawn (in a pipe, under ``TERM=dumb``), one line for each run.
    """

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = console(stderr=True)
        self.redraws = self.console.is_terminal and not self.console.is_dumb_terminal
        self.said = -SAY_EVERY
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[news]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.redraws,
            transient=True,
        )
        self.runs = self.done = 0
        self.shown: dict[str, tuple[Any, float]] = {}  # key -> its bar, epochs it has counted

    def __enter__(self) -> Live:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def begin(self, configs: list[Any], done: int) -> None:
        self.runs, self.done = len(configs), done
        if done:
            rest = "; going on with the rest" if done < self.runs else ""
            self.note(f"{done} of {self.runs} runs are recorded already{rest}")
        epochs = sum(config.epochs for config in configs)
        share = epochs * done // max(1, self.runs)
        self.total = self.bars.add_task("all runs", total=epochs - share, news=self._tally())

    def epoch(self, config: Any, point: dict[str, Any]) -> None:
        bar, before = self._bar(config, point)
        epoch, total = point["epoch"] + 1, point["epochs"]
        self.bars.update(bar, completed=epoch, news=f"epoch {epoch}/{total}, {_said(point)}")
        self.bars.advance(self.total, epoch - before)
        self.shown[config.key] = bar, epoch

    def batch(self, config: Any, point: dict[str, Any]) -> None:
        bar, before = self._bar(config, point)
        epoch = point["epoch"] + point["batch"] / point["batches"]
        where = f"epoch {point['epoch'] + 1}/{point['epochs']}, batch {point['batch']}/{point['batches']}"
        self.bars.update(bar, completed=epoch, news=where)
        self.bars.advance(self.total, epoch - before)
        self.shown[config.key] = bar, epoch
        if not self.redraws and time.monotonic() - self.said >= SAY_EVERY:
            self.said = time.monotonic()
            self._say(config, where)

    def _bar(self, config: Any, point: dict[str, Any]) -> tuple[Any, float]:
        if config.key not in self.shown:
            self.shown[config.key] = self.bars.add_task(config.label, total=point["epochs"], news=""), 0.0
        return self.shown[config.key]

    def finished(self, config: Any, row: Row | None) -> None:
        bar, counted = self.shown.pop(config.key, (None, 0))
        if bar is not None:
            self.bars.remove_task(bar)
        self.done += 1
        self.bars.update(self.total, advance=config.epochs - counted, news=self._tally())
        if row is None:
            self._say(config, "recorded by another process")
        elif row["status"] == "finished":
            if not self.redraws:
                metric = Metric.of(row["config"])
                self._say(config, f"{metric.text(row[metric.field])}, {_times(row)}")
        else:
            self._say(config, f"{row['status']}: {row.get('error', '')}")
        for note in (row or {}).get("notes", ()) if isinstance(config, TaskConfig) else ():
            self._say(config, note)  # those on the data are said once, before the first run

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _say(self, config: Any, text: str) -> None:
        self.note(f"{self._tally()}  {config.label}: {text}")

    def _tally(self) -> str:
        return f"{self.done}/{self.runs} runs"


@contextlib.contextmanager
def tensorboard_log(folder: Path) -> Iterator[OnEpoch]:
    """Write each epoch's numbers as TensorBoard events into ``folder``."""
    import_extra("tensorboard", "tensorboard", "--tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(point: dict[str, Any]) -> None:
        for name, value in point.items():
            if name not in ("epoch", "epochs") and not isinstance(value, str):
                writer.add_scalar(name, value, point["epoch"])

    try:
        yield log
    finally:
        writer.close()


def _times(row: Row) -> str:
    """Return the seconds of training, of evaluation and of the whole run, as far as measured."""
    more = [f"{row[name]:.1f} s {what}" for name, what in (("seconds_eval", "testing"), ("seconds_total", "in all"))
            if row.get(name)]  # fmt: skip
    return ", ".join([f"{row['seconds']:.1f} s training", *more])


def _said(point: dict[str, Any]) -> str:
    """Return the metric of an epoch in words; an own task words its own, and an epoch may be untested."""
    if "said" in point:
        return point["said"]
    error = point["test_error"]
    return "not tested" if error is None else ERROR.text(error)
