"""Progress on standard error: which run, which epoch, the error so far, the time left."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchtrim._checks import import_extra
from batchtrim.lab.files import in_lines, shown, writing
from batchtrim.lab.metric import ERROR, Metric
from batchtrim.lab.records import Row
from batchtrim.lab.run.batch_progress import OnEpoch
from batchtrim.lab.run.task_config import TaskConfig
from batchtrim.lab.terminal import console

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

SAY_EVERY = 30.0  # without a terminal: seconds between two lines inside an epoch
WIDE = 110  # columns of a terminal: the least for a long bar and the elapsed time
NARROW = 76  # the least for a bar and the time left
NEWS, TIME = 31, 7  # characters: epoch 100/100, accuracy 99.99 %; 0:00:00


class Quiet:
    """Shows nothing."""

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

    If nothing can be redrawn (in a pipe, under ``TERM=dumb``), it prints one line per run.
    """

    def __init__(self) -> None:
        from rich.progress import Progress

        self.console = console(stderr=True)
        # FORCE_COLOR in a pipe makes rich believe in a terminal, but it cannot be redrawn
        self.redraws = self.console.file.isatty() and self.console.is_terminal and not self.console.is_dumb_terminal
        self.said = -SAY_EVERY
        self.noted: set[str] = set()
        self.bars = Progress(
            *_columns(self.console.width), console=self.console, disable=not self.redraws, transient=True
        )
        self.alike = 0  # how many words all labels start with
        self.runs = self.done = 0
        self.shown: dict[str, tuple[Any, float]] = {}  # key -> the run's bar, and the epochs it has counted

    def __enter__(self) -> Live:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def begin(self, configs: list[Any], done: int) -> None:
        self.runs, self.done = len(configs), done
        if done:
            rest = "; continuing with the rest" if done < self.runs else ""
            self.note(f"{done} of {self.runs} runs are recorded already{rest}")
        self.alike = _words_alike([config.label for config in configs])
        epochs = sum(config.epochs for config in configs)
        share = epochs * done // max(1, self.runs)
        self.total = self.bars.add_task("all runs", total=epochs - share, news=self._tally())

    def epoch(self, config: Any, point: dict[str, Any]) -> None:
        epoch, total = point["epoch"] + 1, point["epochs"]
        self._advance(config, point, epoch, f"epoch {epoch}/{total}, {_metric_text(point)}")

    def batch(self, config: Any, point: dict[str, Any]) -> None:
        where = f"epoch {point['epoch'] + 1}/{point['epochs']}, batch {point['batch']}/{point['batches']}"
        self._advance(config, point, point["epoch"] + point["batch"] / point["batches"], where)
        if not self.redraws and time.monotonic() - self.said >= SAY_EVERY:
            self.said = time.monotonic()
            self._say(config, where)

    def _advance(self, config: Any, point: dict[str, Any], epochs: float, news: str) -> None:
        """Set a run's bar to the epochs it has done, and advance that of all runs."""
        if config.key not in self.shown:
            label = shown(" ".join(config.label.split()[self.alike :]))
            self.shown[config.key] = self.bars.add_task(label, total=point["epochs"], news=""), 0.0
        bar, before = self.shown[config.key]
        self.bars.update(bar, completed=epochs, news=news)
        self.bars.advance(self.total, epochs - before)
        self.shown[config.key] = bar, epochs

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
            if note not in self.noted:  # those on the settings, before the first run
                self._say(config, note)

    def note(self, text: str) -> None:
        self.noted.add(text)
        self.console.print(in_lines(text), highlight=False, markup=False, soft_wrap=True)

    def _say(self, config: Any, text: str) -> None:
        self.note(f"{self._tally()}  {config.label}: {text}")

    def _tally(self) -> str:
        return f"{self.done}/{self.runs} runs"


def _columns(width: int) -> list[ProgressColumn]:
    """Return the columns that fit on a terminal line: labels are truncated, numbers are not."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    bars: list[ProgressColumn] = []
    times: list[ProgressColumn] = []
    taken = NEWS + 1
    if width >= NARROW:
        bar = 24 if width >= WIDE else 10
        bars, times = [BarColumn(bar_width=bar)], [TextColumn("left"), TimeRemainingColumn()]
        taken += bar + len("left") + TIME + 3
    if width >= WIDE:
        times.insert(0, TimeElapsedColumn())
        taken += TIME + 1
    label = Column(no_wrap=True, overflow="ellipsis", max_width=max(8, width - taken))
    news = Column(no_wrap=True, overflow="ellipsis", max_width=NEWS)
    return [
        TextColumn("{task.description}", table_column=label, markup=False),
        *bars,
        TextColumn("{task.fields[news]}", table_column=news, markup=False),
        *times,
    ]


def _words_alike(labels: Sequence[str]) -> int:
    """Return how many words all labels start with; 0 for a single label."""
    if len(labels) < 2:
        return 0
    columns = zip(*(label.split() for label in labels), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda words: len(set(words)) == 1, columns))


@contextlib.contextmanager
def tensorboard_log(folder: Path) -> Iterator[OnEpoch]:
    """Write each epoch's numbers as TensorBoard events into ``folder``."""
    import_extra("tensorboard", "tensorboard", "--tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with _threads_of_writers_silent():
        with writing(folder):
            writer = SummaryWriter(str(folder))

        def log(point: dict[str, Any]) -> None:
            with writing(folder):
                for name, value in point.items():
                    # None: not every epoch is tested
                    if name not in ("epoch", "epochs") and value is not None and not isinstance(value, str):
                        writer.add_scalar(name, value, point["epoch"])

        try:
            yield log
        finally:
            with writing(folder):
                writer.close()


@contextlib.contextmanager
def _threads_of_writers_silent() -> Iterator[None]:
    """Show no traceback of a thread of TensorBoard's that cannot write; its next call raises the same error."""
    before = threading.excepthook

    def pass_on(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            before(args)

    threading.excepthook = pass_on
    try:
        yield
    finally:
        threading.excepthook = before


def _times(row: Row) -> str:
    """Return the seconds of training, of evaluation and of the whole run, if measured."""
    more = [f"{row[name]:.1f} s {what}" for name, what in (("seconds_eval", "testing"), ("seconds_total", "in all"))
            if row.get(name)]  # fmt: skip
    return ", ".join([f"{row['seconds']:.1f} s training", *more])


def _metric_text(point: dict[str, Any]) -> str:
    """Return an epoch's metric as text; a user's task may have its own, and an epoch may be untested."""
    if "said" in point:
        return point["said"]
    error = point["test_error"]
    return "not tested" if error is None else ERROR.text(error)
