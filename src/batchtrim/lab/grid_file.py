"""Settings of runs in a TOML file, with errors for what a file cannot say."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from batchtrim.lab import files
from batchtrim.lab.run.config import SETTINGS
from batchtrim.lab.run.settings import check_tables, overridden, overridden_params
from batchtrim.lab.task.names import MODELS, SPECS

__all__ = ["overridden_everywhere", "read"]


def read(grid: Path, methods: str | None, elsewhere: Collection[str]) -> dict[str, Any]:
    """Return the settings of a TOML file.

    Args:
        grid: the file. The name of a method, a data set or a network is an error: it was typed without its option.
        methods: the methods given as an option, for that error.
        elsewhere: options of the command that are no settings of a run, and refused in the file.
    """
    from batchtrim.lab.methods.table import METHODS

    names = [each for each in re.split(r"[,\s]+", str(grid)) if each]
    if not grid.exists() and all(name in METHODS for name in names):
        listed = ",".join([*filter(None, [methods]), *names])
        raise ValueError(f"expected a TOML file, got the method {grid}. Methods are an option: --methods {listed}.")
    for option, known in (("dataset", SPECS), ("model", MODELS)):
        if not grid.exists() and all(name in known for name in names):
            raise ValueError(f"expected a TOML file, got the {option} {grid}. It is an option: --{option} {grid}")
    settings = files.load_toml(grid)
    for part in _parts(settings):
        if "lower_is_better" in part:  # a flag of the command line, and the other side of one setting
            if not isinstance(lower := part.pop("lower_is_better"), bool) or "higher_is_better" in part:
                raise ValueError(f"expected `lower_is_better` alone, and true or false, in {grid}, got {lower!r}.")
            part["higher_is_better"] = not lower
    for name, value in itertools.chain.from_iterable(part.items() for part in _parts(settings)):
        _check_written(name, value, grid)
    _refuse_elsewhere(settings, grid, elsewhere)
    return settings


def overridden_everywhere(settings: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with options in their place, also where a part of the grid has its own.

    Parameters in the file of methods that the options leave out are dropped.
    """
    found = overridden(settings, options)
    if isinstance(grid := settings.get("grid"), list):
        found["grid"] = [_part(part, options) if isinstance(part, dict) else part for part in grid]
    if "methods" in options and "params" in settings:
        found["params"] = _of_methods(found["params"], options)
    return found


def _part(part: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of a grid without what options replace."""
    own = overridden(part, options)
    left = {name: own[name] for name in part if name in own and name not in options}
    if "params" in part:
        tables = check_tables(part["params"])
        typed = {name: table for name, table in options.get("params", {}).items() if name in tables}
        left["params"] = _of_methods(overridden_params(tables, typed), options)
    return left


def _of_methods(params: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of methods that are run, or that were typed."""
    wanted = {*options.get("methods", params), *options.get("params", {})}
    return {name: table for name, table in check_tables(params).items() if name in wanted}


def _parts(settings: dict[str, Any]) -> list[dict[str, Any]]:
    grid = settings.get("grid")
    return [settings, *(part for part in grid if isinstance(part, dict))] if isinstance(grid, list) else [settings]


def _check_written(name: str, value: Any, grid: Path) -> None:
    """Refuse text in TOML where a number or a list is expected: text is not parsed."""
    setting = SETTINGS.get({"methods": "method", "seeds": "seed"}.get(name, name))
    if setting is None or not isinstance(value, str):
        return
    if setting.kind in (int, float):
        raise TypeError(f"expected `{name}` to be a number in {grid}, got the text {value!r}. Leave out the quotes.")
    if setting.many and not setting.own and "," in value:
        listed = ", ".join(f'"{each.strip()}"' for each in value.split(","))
        raise ValueError(f"expected `{name}` to be a list in {grid}, got the text {value!r}. Write [{listed}].")


def _refuse_elsewhere(settings: dict[str, Any], grid: Path, elsewhere: Collection[str]) -> None:
    """Refuse tables other than a grid and parameters, and options of the command."""
    table = next((name for name, value in settings.items() if isinstance(value, dict) and name != "params"), None)
    if table is not None:
        cure = {"grid": "Double its brackets: [[grid]].", "param": "Put parameters into [params.METHOD]."}.get(
            table, f"Put settings above all tables or into [[grid]], and remove the line [{table}]."
        )
        raise ValueError(f"expected a value of `{table}` in {grid}, got a table. {cure}")
    wrong = next((name for part in _parts(settings) for name in part if name in elsewhere), None)
    if wrong is not None:
        raise ValueError(
            f"expected settings of runs in {grid}, got {wrong!r}. It belongs on the command line: "
            f"--{wrong.removeprefix('as_').replace('_', '-')}."
        )
