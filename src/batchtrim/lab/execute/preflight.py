"""Warn before the first run of a command about settings without effect and likely mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from batchtrim.lab.methods.table import make_schedule
from batchtrim.lab.run.config import RunConfig, arm_label
from batchtrim.lab.run.remarks import remarks
from batchtrim.lab.run.task_config import AnyConfig
from batchtrim.lab.task.names import known_as

KEEP = ("keep_start", "keep_end", "schedule")
DECIDED_BY = {"momentum": "optimizer", "norm": "model"}  # settings that some values of another leave unused


def warnings_for(settings: Mapping[str, Any], configs: Sequence[AnyConfig]) -> list[str]:
    """Return a line for each problem in the given settings and the runs made from them.

    Those that concern single runs are in their records too.
    """
    of_runs = dict.fromkeys(text for config in configs for text in remarks(config))
    return [*_repeats(settings), *_keep(settings, configs), *_alike(configs), *of_runs, *_unused(settings, configs)]


def copies(asked: Sequence[RunConfig], configs: Sequence[RunConfig]) -> list[str]:
    """Return a line for each data set that is left out, since another place holds the same images under its name."""
    left = {config.dataset for config in configs}
    lost = dict.fromkeys(config.dataset for config in asked if config.dataset not in left)
    return [f"dataset {each}: left out, since its images are those of another {known_as(each)}" for each in lost]


def _repeats(settings: Mapping[str, Any]) -> list[str]:
    said = []
    for name, values in settings.items():
        if isinstance(values, list) and not any(isinstance(value, (list, dict)) for value in values):
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                said.append(f"{name}: {', '.join(map(str, twice))} is given more than once, but done once")
    return said


def _keep(settings: Mapping[str, Any], configs: Sequence[AnyConfig]) -> list[str]:
    """Return a line for settings of the keep schedule that no run uses."""
    given = [name for name in KEEP if name in settings]
    if given and all(config.schedule is None for config in configs):
        methods = ", ".join(dict.fromkeys(config.method for config in configs))
        return [f"{', '.join(given)}: without effect, since no method here has a keep schedule ({methods})"]
    said = {}
    for config in configs:
        if config.schedule == "constant" and "keep_start" in settings and config.keep_start != config.keep_end:
            said["constant"] = (
                f"keep_start {config.keep_start:g}: without effect under the constant schedule, which keeps keep_end "
                f"({config.keep_end:g}) throughout"
            )
    return list(said.values())


def _alike(configs: Sequence[AnyConfig]) -> list[str]:
    """Return a line for arms that keep the same in every epoch, by different settings of the keep schedule."""
    found: dict[tuple[str, tuple[float, ...]], dict[str, None]] = {}
    for config in configs:
        if config.schedule is not None:
            keep = make_schedule(config.schedule, config.keep_start or 1.0, config.keep_end or 1.0)
            course = tuple(keep(epoch / max(1, config.epochs - 1)) for epoch in range(config.epochs))
            rest = replace(config, keep_start=None, keep_end=None, schedule=None)
            found.setdefault((rest.key, course), {})[arm_label(config)] = None
    alike = dict.fromkeys(" and ".join(arms) for arms in found.values() if len(arms) > 1)
    return [f"{each}: they keep the same in every epoch, and are run and corrected for as several" for each in alike]


def _unused(settings: Mapping[str, Any], configs: Sequence[AnyConfig]) -> list[str]:
    said = []
    for name, by in DECIDED_BY.items():
        given = settings.get(name)
        values = given if isinstance(given, list) else [] if given is None else [given]
        lost = [value for value in values if all(getattr(config, name, value) != value for config in configs)]
        if lost:
            others = ", ".join(dict.fromkeys(str(getattr(config, by)) for config in configs))
            said.append(f"{name} {', '.join(map(str, lost))}: without effect with {by} {others}")
    return said
