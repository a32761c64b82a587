"""Expand settings with several values into the list of runs, from the command line or from a TOML file.

dataset = ["cifar10", "cifar100"]    # a list is an axis: every value with every other
methods = ["full", "trim", "small_loss"]
seeds = 5                            # 0, 1, 2, 3, 4; or a list
epochs = 20

[params.small_loss]
noise_rate = [0.1, 0.2]              # parameters may be axes too

[[grid]]                             # more than one part: each adds to the settings above, or replaces them
model = "resnet8"
[[grid]]
model = "resnet20"
width = 32
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from batchtrim._checks import check_count, describe, nearest
from batchtrim.lab.run.config import COMPARED, RunConfig, without_places
from batchtrim.lab.run.settings import check_tables, overridden, overridden_params
from batchtrim.lab.run.task_config import AnyConfig, TaskConfig
from batchtrim.lab.task.own_code import Code

MOST_RUNS = 100_000  # more than this is a typo, and would fill the memory before the first run starts

Settings = dict[str, Any]


Config = TypeVar("Config", RunConfig, TaskConfig)


def expand(settings: Mapping[str, Any], kind: type[Config] = RunConfig) -> list[Config]:
    """Return all runs of the settings, resolved, checked and without duplicates.

    Seeds vary slowest, so that a sweep that is stopped early has compared all methods on the seeds it reached.

    Args:
        kind: the class of the runs: of the lab's own loop, or of a task.

    Raises:
        ValueError, TypeError: a setting of a run is wrong. Nothing has been run by then.
    """
    common = {name: value for name, value in settings.items() if name != "grid"}
    parts = settings.get("grid", [{}])
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise TypeError("expected `grid` to be tables, each under a line [[grid]], got something else.")
    if not parts:
        raise ValueError("expected `grid` to have at least one table, under a line [[grid]], got an empty list.")
    shared = check_tables(common.pop("params", {}))
    configs: dict[str, Config] = {}
    for part in parts:
        for config in _expand_part(overridden(common, part), shared, kind):
            _refuse_namesakes(config, configs.setdefault(config.key, config))
    _refuse_unused(shared, {config.method: None for config in configs.values()})
    return sorted(configs.values(), key=lambda config: config.seed)  # stable: keeps the order within a seed


def expand_task(code: Code, settings: Mapping[str, Any]) -> list[TaskConfig]:
    """Return all runs of a user's training function; see :func:`expand`."""
    return [replace(config, code=code) for config in expand({**settings, "task": code.name}, TaskConfig)]


def cells(configs: Sequence[AnyConfig]) -> list[Settings]:
    """Return the settings that the runs of each part share; see :meth:`batchtrim.lab.records.Records.settle`."""
    found: list[Settings] = []
    for config in configs:
        cell = {name: value for name, value in without_places(config.to_dict()).items() if name not in COMPARED}
        if cell not in found:
            found.append(cell)
    return found


def _expand_part(settings: Settings, shared: Mapping[str, Any], kind: type[Config]) -> list[Config]:
    """Return the runs of one part; ``shared``: parameters of methods that any part may run."""
    axes = dict(settings)
    own = check_tables(axes.pop("params", {}))
    params = overridden_params(shared, own)
    if "method_params" in axes:
        raise ValueError("expected parameters of methods in tables such as [params.small_loss], got `method_params`.")
    for plural, name in (("methods", "method"), ("seeds", "seed")):
        if plural in axes and name in axes:
            raise ValueError(f"expected either `{plural}` or `{name}`, got both.")
        if plural in axes:
            axes[name] = axes.pop(plural)
            if plural == "seeds" and not isinstance(axes[name], (list, tuple, range)):
                axes[name] = list(range(_few_enough(check_count("seeds", axes[name]))))
    values = _as_lists(axes)
    for name, value in values.items():
        if not value:
            raise ValueError(f"expected `{name}` to have at least one value, got an empty list.")
    _few_enough(math.prod(len(value) for value in values.values()))
    _refuse_unused(own, values.get("method", ["full"]))
    chosen = [kind.from_dict(choice) for choice in _product(values)]
    return [
        replace(config, method_params=method_params).resolved()
        for config in chosen
        for method_params in _product(_as_lists(params.get(config.method, {})))
    ]


def _refuse_unused(params: Iterable[str], methods: Collection[str]) -> None:
    unused = next((name for name in params if name not in methods), None)
    if unused is not None:
        raise ValueError(
            f"expected parameters of methods that are run ({', '.join(map(str, methods))}), got [params.{unused}]."
            f"{nearest(unused, methods)}"
        )


def _refuse_namesakes(config: AnyConfig, other: AnyConfig) -> None:
    """Refuse networks in two files of one name, by which runs and their versions are told apart."""
    files = [getattr(each, "model", "") for each in (other, config)]
    if files[0] != files[1]:
        raise ValueError(f"expected networks in files of different names, got {' and '.join(files)}. Rename one.")


def _few_enough(runs: int) -> int:
    if runs > MOST_RUNS:
        raise ValueError(f"expected at most {MOST_RUNS} runs, got {float(min(runs, 10**300)):g}. Take fewer seeds.")
    return runs


def _as_lists(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    several = (list, tuple, range, np.ndarray)
    lists = {name: list(value) if isinstance(value, several) else [value] for name, value in values.items()}
    for name, found in lists.items():
        for value in found:
            if isinstance(value, (Mapping, list, tuple, set)):
                raise TypeError(f"expected `{name}` to be a value or a list of values, got {describe(value)} in it.")
    return lists


def _product(axes: Mapping[str, list[Any]]) -> list[Settings]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
