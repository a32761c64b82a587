"""The argument of the user's training function: the run with its trimmer, seed, folder and log."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from batchtrim import KeepLog, Losses, Selection, TrimmedForward, Trimmer
from batchtrim._checks import check_count, describe, is_number, plain
from batchtrim._transforms import in_backward
from batchtrim.integrations import log_values
from batchtrim.lab.metric import Metric
from batchtrim.lab.run.batch_progress import OnEpoch
from batchtrim.lab.run.samples import checked_images, checked_labels, checked_rows
from batchtrim.lab.run.task_config import TaskConfig
from batchtrim.selection.base import asks_for_all

__all__ = ["Run", "TaskMistake", "as_number"]


class TaskMistake(ValueError):
    """The training function breaks a rule of the harness; every other run would end the same way."""


@dataclass
class RuleCounts:
    """Counts of what the copies of a rule chose.

    Attributes:
        calls, seen, kept: how often they chose in training, from how many samples, and how many they kept.
        repeated: of these, how many went forward once more, in a second pass.
        called: they chose, if only in validation.
        compiled: some steps were compiled, which are not counted.
        sent: a copy went to another process, whose choices are not counted.
        steps: the run's :class:`batchtrim.TrimmedForward`.
        begun: when training began, in seconds of :func:`time.perf_counter`.
        curve: the points that the run logged.
        key: of the run.
        source: the hash of the user's program.
        continued: they include those of an earlier attempt, from whose checkpoint the run continued.
        changed: that attempt was made by another version of the program.
    """

    calls: int = 0
    seen: int = 0
    kept: int = 0
    repeated: int = 0
    called: bool = False
    compiled: bool = False
    sent: bool = False
    steps: list[TrimmedForward] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)  # set again just before the function is called
    curve: dict[str, list[float | None]] = field(default_factory=dict)
    key: str = ""
    source: str = ""
    continued: bool = False
    changed: bool = False

    @property
    def used(self) -> bool:
        """True if the rule was used."""
        return self.called or self.compiled

    @property
    def counted(self) -> bool:
        """True if every step was counted."""
        return self.calls > 0 and not self.compiled

    def __getstate__(self) -> dict[str, Any]:
        self.sent = True
        return {**vars(self), "steps": []}

    def saved(self) -> str:
        """Return what a later attempt of the run continues from, as JSON."""
        names = ("key", "calls", "seen", "kept", "repeated", "called", "compiled", "sent", "curve", "source", "changed")
        return json.dumps({name: getattr(self, name) for name in names} | {"seconds": time.perf_counter() - self.begun})

    def restore(self, saved: str) -> None:
        """Add an attempt of the same run in an earlier process, if this one has done nothing yet."""
        state = json.loads(saved)
        seconds, curve, source = state.pop("seconds"), state.pop("curve"), state.pop("source", self.source)
        if state["key"] != self.key or self.used or self.curve or self.continued:
            return
        vars(self).update(state)
        self.curve.update(curve)
        self.begun -= seconds
        self.continued = True
        self.changed = self.changed or source != self.source


class WatchedRule:
    """A selection rule that counts the samples it chooses from, whichever trimmer uses it or a copy of it.

    Attributes:
        counts: shared with the copies that :mod:`copy` makes.

    Notes:
        Not counted: batches without gradient (validation), and a choice that an activation checkpoint repeats.
    """

    def __init__(self, rule: Any, counts: RuleCounts | None = None) -> None:
        self.rule = rule
        self.counts = RuleCounts() if counts is None else counts

    def __call__(self, losses: Tensor, keep: float, *args: Any, **kwargs: Any) -> Selection:
        selection = self.rule(losses, keep, *args, **kwargs)
        counts = self.counts
        counts.called = True
        if not torch.is_grad_enabled() or in_backward() != -1:
            return selection
        counts.calls += 1
        counts.seen += selection.candidates
        counts.kept += selection.k
        if not asks_for_all(self.rule, keep) and any(_running(step) == "two_pass" for step in counts.steps):
            counts.repeated += selection.k
        return selection

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("rule", "counts"):
            raise AttributeError(name)
        value = getattr(self.rule, name)
        if name == "compiled_mask":  # used in a compiled step, which is not counted
            self.counts.compiled = True
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> WatchedRule:
        return WatchedRule(copy.deepcopy(self.rule, memo), self.counts)

    def __repr__(self) -> str:
        return repr(self.rule)


class RunTrimmer(Trimmer):
    """The trimmer of a run. Its state includes the run's counts, time and curves, so that a resumed run has all."""

    @classmethod
    def of(cls, trim: Trimmer, counts: RuleCounts) -> RunTrimmer:
        """Return the trimmer of a method, whose rule is then watched."""
        made = cls.__new__(cls)
        made.__setstate__(vars(trim))
        made.rule = WatchedRule(trim.rule, counts)
        return made

    def state_dict(self) -> dict[str, Any]:
        """Return the trimmer's state, and with it the run's."""
        state = super().state_dict()
        return {**state, "run": self.rule.counts.saved()} if isinstance(self.rule, WatchedRule) else state

    def load_state_dict(self, state: dict[str, Any], *, length: str | None = None) -> None:
        """Continue from :meth:`state_dict`; from that of any trimmer if the run has done nothing before."""
        super().load_state_dict(state, length=length)
        if "run" in state and isinstance(self.rule, WatchedRule):
            self.rule.counts.restore(state["run"])


class Run:
    """One run: the argument of ``train(run)``.

    Attributes:
        trim: the method's :class:`batchtrim.Trimmer`. Call it in place of the mean of the losses, and
            ``trim.step()`` once an epoch. For the method ``full`` it keeps everything. Its ``state_dict()`` includes
            what the run has counted and logged, so that a run that loads it is recorded as one without a break.
        keep, trim_options: the same for a trainer that makes and steps the trimmer itself:
            ``TrimmedTrainer(..., keep=run.keep, trim_options=run.trim_options)``, or
            ``TrimmingCallback(run.keep, **run.trim_options)``. For tokens or pixels make your own:
            ``Trimmer(run.keep, total=run.epochs, unit="element", **run.trim_options)``.
        rule: the method's rule, which counts what it chooses. ``run.rule.rule`` may be changed between epochs.
        method, params: the method's name and its parameters.
        seed: the seed to use; torch, NumPy and ``random`` are already seeded with it.
        epochs: how many to train.
        device: "cpu", "cuda" or "mps".
        threads: torch's number of threads is set to it.
        out: a permanent folder of this run, for example for the function's own checkpoints.
    """

    def __init__(self, config: TaskConfig, out: Path, on_epoch: OnEpoch | None = None) -> None:
        self.method, self.params = config.method, dict(config.method_params)
        self.seed, self.epochs = config.seed, config.epochs
        self.device, self.threads = config.device, config.threads
        counts = RuleCounts(key=config.key, source=config.code.source if config.code else "")
        self.trim = RunTrimmer.of(config.trimmer(), counts)
        self.rule = cast(WatchedRule, self.trim.rule)
        self.keep = self.trim.schedule
        self.keep_in_two_epochs = replace(config, epochs=max(2, config.epochs)).trimmer().schedule
        self.trim_options = {"select": self.rule, "scale": self.trim.scale, "seed": config.seed}
        self.metric = Metric.of(config.to_dict())
        self.curve = counts.curve
        self.kept: KeepLog | None = None
        self.shown: dict[str, Any] | None = None
        self._engine, self._out, self._on_epoch = config.engine, out, on_epoch
        self.found = sorted(path.name for path in out.iterdir()) if out.is_dir() else []  # of an earlier attempt
        self.engine_used = config.engine == "exact"  # as a trimmer without an engine does

    @property
    def out(self) -> Path:
        self._out.mkdir(parents=True, exist_ok=True)
        return self._out

    def forward(
        self, model: nn.Module, criterion: Callable[[Any, Any], Tensor | Losses], engine: str | None = None, **more: Any
    ) -> TrimmedForward:
        """Return a :class:`batchtrim.TrimmedForward` with this run's trimmer: ``loss = step(x, y)``.

        Args:
            engine: by default the command's ``--engine``.
            more: further arguments of TrimmedForward.
        """
        engine = engine or self._engine
        step = TrimmedForward(model, criterion, self.trim, engine, **more)
        self.engine_used = self.engine_used or engine == self._engine
        self.rule.counts.steps.append(step)
        return step

    def log(self, *unnamed: NoReturn, epoch: int | None = None, **values: float) -> None:
        """Record an epoch's numbers: a point of every curve, a line of progress, and TensorBoard events if asked for.

        The statistics since the last call are added: ``keep``, ``kept_loss``, ``mean_loss``, ``ratio``.

        Args:
            epoch: counted from 0; by default the last one plus 1.
            values: numbers by name, including the metric if it is known: ``run.log(epoch=3, error=0.12)``. The names
                ``seconds``, ``samples_backward`` and, unless the metric is called so, ``value`` are the lab's own.
        """
        if unnamed:
            named = "**values" if isinstance(unnamed[0], Mapping) else f"{self.metric.name}=..."
            raise TypeError(
                f"expected numbers by name, run.log(epoch=..., {named}), got {describe(unnamed[0])} without a name."
            )
        taken = {"seconds", "samples_backward", "value"} - {self.metric.name}
        if wrong := next((name for name in values if name in taken), None):
            raise ValueError(
                f"expected names of numbers besides the lab's own ({', '.join(sorted(taken))}), got {wrong!r}. "
                f"Log the metric as {self.metric.name}=..., and other numbers by other names."
            )
        last = self.curve["epoch"][-1] if self.curve.get("epoch") else None
        if epoch is None:
            epoch = 0 if last is None else int(last) + 1
        epoch = check_count("epoch", epoch, minimum=0)
        if last is not None and epoch <= last:
            raise ValueError(f"expected `epoch` after {last:g}, got {epoch}. Log each epoch once, counted from 0.")
        numbers = {name: as_number(name, value) for name, value in values.items()}
        if self.metric.in_percent and (value := numbers.get(self.metric.name)) is not None and not math.isnan(value):
            check_share(self.metric, value)
        if self.metric.name in numbers and self.metric.field != self.metric.name:
            numbers[self.metric.field] = numbers.pop(self.metric.name)
        point = {**self._kept_since(), **numbers, "seconds": time.perf_counter() - self.rule.counts.begun}
        if self.rule.counts.counted:
            point["samples_backward"] = self.rule.counts.kept
        self._add(epoch, point)
        if self._on_epoch is not None:
            named = {self.metric.name if name == self.metric.field else name: value for name, value in point.items()}
            self._on_epoch(
                {
                    **named, "epoch": epoch, "epochs": max(self.epochs, epoch + 1),
                    "said": self.metric.text(numbers.get(self.metric.field)),
                }
            )  # fmt: skip

    def keep_log(self, n: int, classes: int | None = None) -> KeepLog:
        """Return the run's :class:`batchtrim.KeepLog` for ``n`` samples; it is saved in the folder ``keep``.

        Record each batch with ``log.record(run.trim.last, ids=ids)`` and end each epoch with ``log.end_epoch()``.
        """
        if self.kept is None:
            self.kept = KeepLog(n, classes=classes)
        return self.kept

    def show(
        self,
        *,
        rows: Sequence[str | Mapping[str, Any]] | None = None,
        images: Tensor | None = None,
        labels: Sequence[int] | Tensor | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        """Describe the samples of :meth:`keep_log` for the page of ``batchtrim show``.

        Args:
            rows: for each sample a text, or a mapping of fields; or images: uint8 (n, C, H, W), C 1 or 3.
            labels, classes: int (n,) and their names, for classification; without them, samples of no class.
        """
        if self.kept is None:
            raise ValueError("expected a keep log to show, got none. Make it with run.keep_log(n), and record batches.")
        if (rows is None) == (images is None):
            raise ValueError("expected either `rows` or `images` of the samples, got both or neither.")
        if (labels is None) != (not len(classes)):
            raise ValueError("expected `labels` and the names of their `classes`, or neither, got one of the two.")
        for name, value in (("rows", rows), ("images", images), ("labels", labels)):
            if value is not None and len(value) != self.kept.n:
                raise ValueError(f"expected `{name}` of {self.kept.n} samples, got {len(value)}.")
        self.shown = {
            "rows": None if rows is None else checked_rows(rows),
            "images": None if images is None else checked_images(images),
            "labels": None if labels is None else checked_labels(labels, classes),
            "classes": [str(each) for each in classes],
        }

    def _kept_since(self) -> dict[str, float]:
        """Return the statistics of the run's own trimmer since the last point; a trainer's trimmer logs its own."""
        keep = self.trim.stats.compute()["keep"]  # what was kept, which need not be what the schedule says
        values = log_values(self.trim)
        names = ("kept_loss", "mean_loss", "ratio")
        return {"keep": keep, **{name: values[f"trim/{name}"] for name in names}} if values else {}

    def _add(self, epoch: int, point: dict[str, float]) -> None:
        points = len(self.curve.get("epoch", ()))
        for name, value in {"epoch": float(epoch), **point}.items():
            self.curve.setdefault(name, [None] * points).append(value)
        for values in self.curve.values():
            values += [None] * (points + 1 - len(values))

    def __repr__(self) -> str:
        return f"Run({self.method!r}, seed={self.seed}, epochs={self.epochs}, device={self.device!r})"


def check_share(metric: Metric, value: float) -> None:
    """Refuse a value of error or accuracy that is no fraction."""
    if not 0.0 <= value <= 1.0:
        raise TaskMistake(
            f"expected `{metric.name}` in [0, 1], a fraction of the test samples, got {value:g}. Divide by 100 if "
            "it is in percent, or name it otherwise and pass --metric."
        )


def _running(step: TrimmedForward) -> str:
    """Return the name of the engine that runs a step: of "auto", the one it has chosen."""
    return getattr(step.engine, "running", step.engine).name


def as_number(name: str, value: Any) -> float:
    """Return a number, or a tensor or array of one entry, as a float; raise an error that names it otherwise."""
    value = plain(value)
    if not is_number(value) and not isinstance(value, Decimal):
        raise TypeError(f"expected `{name}` to be a number, got {describe(value)}.")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except ValueError:  # Decimal's signalling NaN
        return math.nan
