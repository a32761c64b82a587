"""What one run of the reader's own training function is: settings, checked, with a key that names the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from batchtrim import Trimmer
from batchtrim._checks import check_choice, check_count, check_keep
from batchtrim.lab.methods.driven import trimmer_for
from batchtrim.lab.methods.table import find_method, make_schedule
from batchtrim.lab.metric import Metric
from batchtrim.lab.run.config import ENGINES, SCHEDULES, RunConfig, resolve_device
from batchtrim.lab.task.code import Code

__all__ = ["AnyConfig", "TaskConfig"]

_NOT_RECORDED = ("code",)
_NOT_IN_KEY = ("threads",)


@dataclass(frozen=True)
class TaskConfig:
    """The settings of one run of a training function. The function itself decides on data, network and optimizer.

    Args:
        task: the function's name, as in ``my_task.py:train``. ``code``: how to get at it; not recorded.
        method, method_params, keep_start, keep_end, schedule, engine, seed, device, threads: as in
            :class:`batchtrim.lab.run.config.RunConfig`.
        epochs: what ``run.epochs`` is, and how often the trimmer's clock is stepped.
        metric: the number that the function's result is asked for. ``higher_is_better``: None where the name tells.
    """

    task: str
    method: str = "full"
    method_params: Mapping[str, Any] = field(default_factory=dict)
    metric: str = "error"
    higher_is_better: bool | None = None
    epochs: int = 10
    seed: int = 0
    keep_start: float | None = 1.0
    keep_end: float | None = 0.2
    schedule: str | None = "linear"
    engine: str = "exact"
    device: str = "auto"
    threads: int = 1
    code: Code | None = field(default=None, compare=False, repr=False)

    def resolved(self) -> TaskConfig:
        """Return the same run with every default written out and every setting checked.

        Raises:
            ValueError, TypeError: a setting is out of its range, or no trimmer can drive the method.
        """
        for name in ("epochs", "threads"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, minimum=0)
        check_choice("engine", self.engine, ENGINES)
        metric = Metric.called(self.metric, self.higher_is_better)
        method = find_method(self.method)
        keep: dict[str, Any] = {"keep_start": None, "keep_end": None, "schedule": None}
        if method.uses_schedule:
            keep = {
                "keep_start": check_keep("keep_start", 1.0 if self.keep_start is None else self.keep_start),
                "keep_end": check_keep("keep_end", 0.2 if self.keep_end is None else self.keep_end),
                "schedule": check_choice("schedule", self.schedule or "linear", SCHEDULES),
            }
        found = replace(
            self,
            method_params=method.check_params(self.method_params),
            higher_is_better=metric.higher_is_better,
            device=resolve_device(self.device),
            **keep,
        )
        found.trimmer()
        return found

    def trimmer(self) -> Trimmer:
        """Return a fresh trimmer of the method."""
        keep = make_schedule(self.schedule or "constant", self.keep_start or 1.0, self.keep_end or 1.0)
        return trimmer_for(self.method, self.method_params, epochs=self.epochs, seed=self.seed, keep=keep)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self) if each.name not in _NOT_RECORDED}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskConfig:
        """Return the run of plain values; a name that is no setting of a task is an error."""
        names = [each.name for each in fields(cls)]
        for name in values:
            if name not in names:
                listed = ", ".join(each for each in names if each not in (*_NOT_RECORDED, "method_params"))
                raise ValueError(
                    f"expected settings of a task ({listed}), got {name!r}. A training function of your own decides "
                    "on data, network and optimizer itself."
                )
        return cls(**values)

    @property
    def key(self) -> str:
        """Short hash that names the run: equal for equal settings, whatever the number of threads."""
        values = {name: value for name, value in self.to_dict().items() if name not in _NOT_IN_KEY}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """A few words for progress lines."""
        params = ",".join(f"{name}={value}" for name, value in self.method_params.items())
        keep = f" {self.schedule} {self.keep_start:g}-{self.keep_end:g}" if self.keep_start and self.keep_end else ""
        return f"{self.task} {self.method}{f'({params})' if params else ''}{keep} seed {self.seed}"


AnyConfig = RunConfig | TaskConfig
"""A run of the lab's own loop, or of a training function of the reader's."""


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
