"""Short, unique names for groups and arms, of printable characters: they go to terminals, pages and drawings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from batchtrim.lab.files import shown
from batchtrim.lab.task.names import known_as

Settings = dict[str, Any]


def key(settings: Settings) -> str:
    """Return the key of an arm or a group: all its settings, unrounded."""
    return json.dumps(settings, sort_keys=True, default=str)


def titles(settings: Sequence[Settings]) -> list[str]:
    """Return a title for each group: data set, model, optimizer, and whatever distinguishes it from similar groups."""
    named = ("task", "dataset", "model", "optimizer")
    found = []
    for each in settings:
        alike = [other for other in settings if all(other.get(name) == each.get(name) for name in named)]
        extra = [f"{name} {each[name]}" for name in _varying(alike, exclude=named) if each.get(name) is not None]
        names = [_shortest_name(str(each[name]), [str(other.get(name)) for other in settings]) for name in named
                 if name in each]  # fmt: skip
        found.append(shown(", ".join([*names, *extra])))
    return found


def _shortest_name(name: str, names: Sequence[str]) -> str:
    """Return a data set's or network's own name; with its folders if another place has one of that name."""
    short = known_as(name)
    return name if any(other != name and known_as(other) == short for other in names) else short


def labels(settings: Sequence[Settings]) -> dict[str, str]:
    """Return a label for each arm, by :func:`key`: its method, and if arms share that, the settings that differ.

    Numbers are rounded unless two labels would then be equal.
    """
    arms = {key(each): each for each in settings}
    found: dict[str, str] = {}
    for name, each in arms.items():
        flat = [_flat(other) for other in arms.values() if other["method"] == each["method"]]
        mine = _flat(each)
        parts = [
            f"{setting} {_shortest(mine.get(setting), [other.get(setting) for other in flat])}"
            for setting in _varying(flat, exclude=("method",))
        ]
        label = shown(f"{each['method']} ({', '.join(parts)})" if parts else each["method"])
        count = sum(other == label or other.startswith(f"{label} #") for other in found.values())
        found[name] = f"{label} #{count + 1}" if count else label
    return found


def _flat(settings: Settings) -> Settings:
    params = settings.get("method_params") or {}
    return {name: value for name, value in settings.items() if name != "method_params"} | dict(params)


def _varying(settings: Sequence[Settings], exclude: Sequence[str] = ()) -> list[str]:
    names = list(dict.fromkeys(name for each in settings for name in each if name not in exclude))
    return [name for name in names if len({json.dumps(each.get(name), default=str) for each in settings}) > 1]


def _shortest(value: Any, values: Sequence[Any]) -> str:
    """Return the shortest form of ``value`` that differs from all ``values``."""
    others = [other for other in values if other != value or type(other) is not type(value)]
    for write in (lambda each: f"{each:g}" if isinstance(each, float) else str(each), str, repr):
        if write(value) not in map(write, others):
            return write(value)
    return f"{value!r} ({type(value).__name__})"
