"""The settings of one run of the user's training function: checked, and hashed into the key that names the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from batchtrim import Trimmer
from batchtrim._checks import check_choice, check_count, check_keep, plain
from batchtrim.lab.methods.driven import trimmer_for
from batchtrim.lab.methods.table import METHODS, find_method, make_schedule
from batchtrim.lab.metric import Metric
from batchtrim.lab.run.config import DEVICES, ENGINES, SCHEDULES, RunConfig, resolve_device
from batchtrim.lab.run.settings import Role, setting
from batchtrim.lab.task.code import Code

__all__ = ["AnyConfig", "TaskConfig"]

_NOT_RECORDED = ("code",)
_NOT_IN_KEY = ("threads",)


@dataclass(frozen=True)
class TaskConfig:
    """The settings of one run of a training function, which itself decides on data, network and optimizer.

    Each field defines its help and its role, as in :class:`batchtrim.lab.run.config.RunConfig`. ``task`` is
    the function's name, as in ``my_task.py:train``; ``code`` loads it and is not recorded. None as
    ``higher_is_better`` means: as the metric's name implies.
    """

    task: str = setting("", role=Role.DATA)
    method: str = setting("full", role=Role.ARM, choices=METHODS, many=True)
    method_params: Mapping[str, Any] = setting(dict, role=Role.ARM)
    metric: str = setting("error", "number that the task returns and methods are compared by")
    higher_is_better: bool | None = setting(None, "a higher metric is better", default_help="by its name")
    epochs: int = setting(10, "epochs of each run")
    seed: int = setting(0, role=Role.SEED)
    keep_start: float | None = setting(1.0, "fraction of each batch kept at the start", role=Role.ARM, many=True)
    keep_end: float | None = setting(0.2, "fraction of each batch kept at the end", role=Role.ARM, many=True)
    schedule: str | None = setting("linear", "keep schedule", role=Role.ARM, choices=SCHEDULES, many=True)
    engine: str = setting("exact", "how a trimmed step is computed", role=Role.ARM, choices=ENGINES, many=True)
    device: str = setting("auto", "device to train on", choices=DEVICES)
    threads: int = setting(1, "threads of each run", role=Role.SPEED, default_help="cores / workers")
    code: Code | None = field(default=None, compare=False, repr=False)

    def resolved(self) -> TaskConfig:
        """Return the same run with every default filled in and every setting checked.

        Raises:
            ValueError, TypeError: a setting is out of range, or no trimmer can drive the method.
        """
        for name in ("epochs", "threads"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, minimum=0)
        check_choice("engine", self.engine, ENGINES)
        for name in ("keep_start", "keep_end"):  # a method may ignore them, but a wrong number is an error
            if getattr(self, name) is not None:
                check_keep(name, getattr(self, name))
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
        """Return the run from plain values; a name that is not a setting of a task is an error."""
        names = [each.name for each in fields(cls)]
        for name in values:
            if name not in names:
                listed = ", ".join(each for each in names if each not in (*_NOT_RECORDED, "method_params"))
                raise ValueError(
                    f"expected settings of a task ({listed}), got {name!r}. A training function of your own decides "
                    "on data, network and optimizer itself."
                )
        return cls(**{name: plain(value) for name, value in values.items()})

    @property
    def key(self) -> str:
        """A short hash that names the run: equal for equal settings, whatever the number of threads."""
        values = {name: value for name, value in self.to_dict().items() if name not in _NOT_IN_KEY}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """A short description for progress lines."""
        params = ",".join(f"{name}={value}" for name, value in self.method_params.items())
        keep = f" {self.schedule} {self.keep_start:g}-{self.keep_end:g}" if self.keep_start and self.keep_end else ""
        return f"{self.task} {self.method}{f'({params})' if params else ''}{keep} seed {self.seed}"


AnyConfig = RunConfig | TaskConfig
"""A run of the lab's own loop, or of the user's training function."""


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
