"""The settings of one run of the user's training function: checked, and hashed into the key that names the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from batchtrim import Trimmer
from batchtrim._checks import check_choice, check_count, check_keep, nearest, plain
from batchtrim.lab.methods.driven import trimmer_for
from batchtrim.lab.methods.table import find_method, make_schedule
from batchtrim.lab.metric import Metric
from batchtrim.lab.run.config import (
    ENGINES,
    SETTINGS,
    RunConfig,
    arm_label,
    keep_schedule,
    resolve_device,
    short_hash,
)
from batchtrim.lab.run.settings import Role, setting
from batchtrim.lab.task.own_code import Code

__all__ = ["AnyConfig", "TaskConfig"]

_NOT_RECORDED = ("code",)
_NOT_IN_KEY = tuple(name for name, each in SETTINGS.items() if each.role is Role.SPEED)


@dataclass(frozen=True)
class TaskConfig:
    """The settings of one run of a training function, which itself decides on data, network and optimizer.

    Settings that a run of the lab's own loop has too are defined in :class:`batchtrim.lab.run.config.RunConfig`.
    ``task`` is the function's name, as in ``my_task.py:train``; ``code`` loads it and is not recorded. None as
    ``higher_is_better`` means: as the metric's name implies.
    """

    task: str = setting("", role=Role.DATA)
    method: str = SETTINGS["method"].again()
    method_params: Mapping[str, Any] = setting(dict, role=Role.ARM)
    metric: str = setting("error")
    higher_is_better: bool | None = setting(None)
    epochs: int = SETTINGS["epochs"].again()
    seed: int = SETTINGS["seed"].again()
    keep_start: float | None = SETTINGS["keep_start"].again()
    keep_end: float | None = SETTINGS["keep_end"].again()
    schedule: str | None = SETTINGS["schedule"].again()
    engine: str = SETTINGS["engine"].again()
    device: str = SETTINGS["device"].again()
    threads: int = SETTINGS["threads"].again()
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
        found = replace(
            self,
            method_params=method.check_params(self.method_params),
            higher_is_better=metric.higher_is_better,
            device=resolve_device(self.device),
            **keep_schedule(self, method),
        )
        found.trimmer()
        return found

    def trimmer(self) -> Trimmer:
        """Return a fresh trimmer of the method."""
        keep = make_schedule(self.schedule or "constant", self.keep_start or 1.0, self.keep_end or 1.0)
        return trimmer_for(self.method, self.method_params, epochs=self.epochs, seed=self.seed, keep=keep)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        names = [each.name for each in fields(self) if each.name not in _NOT_RECORDED]
        return {name: _for_json(getattr(self, name)) for name in names}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskConfig:
        """Return the run from plain values; a name that is not a setting of a task is an error."""
        names = [each.name for each in fields(cls)]
        for name in values:
            if name not in names:
                listed = ", ".join(each for each in names if each not in (*_NOT_RECORDED, "method_params"))
                near = "" if name in SETTINGS else nearest(name, names)
                why = " A training function of your own decides on data, network and optimizer itself."
                raise ValueError(f"expected settings of a task ({listed}), got {name!r}.{near or why}")
        return cls(**{name: plain(value) for name, value in values.items()})

    @property
    def key(self) -> str:
        """A short hash that names the run: equal for equal settings, whatever the number of threads."""
        values = {name: value for name, value in self.to_dict().items() if name not in _NOT_IN_KEY}
        return short_hash(values)

    @property
    def label(self) -> str:
        """A short description for progress lines."""
        return f"{self.task} {arm_label(self)} seed {self.seed}"


AnyConfig = RunConfig | TaskConfig
"""A run of the lab's own loop, or of the user's training function."""


def _for_json(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
