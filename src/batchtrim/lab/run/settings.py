"""The definition of a setting of a run: one dataclass field holds everything about it.

The command line, TOML grids, keys, groups of the report and ``--help`` are derived from these definitions; no other
file lists settings.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from batchtrim._checks import describe


class Role(Enum):
    """The role of a setting in a comparison."""

    ARM = "arm"
    """Varies within a comparison: runs that differ only in these are compared with each other."""
    SEED = "seed"
    """Pairs runs: two runs of one seed share all random numbers."""
    GROUP = "group"
    """Shared by all runs of a comparison."""
    DATA = "data"
    """As GROUP; in addition, these and the seed determine the training set."""
    SPEED = "speed"
    """Does not affect the result: not in a run's key, so that a sweep can continue on another machine."""


@dataclass(frozen=True)
class Setting:
    """One setting, read from a dataclass field.

    Attributes:
        name, default: of the field.
        kind: str, int or float.
        help: a line without the default.
        default_help: what None stands for, or "" if the default speaks for itself.
        choices: the possible values, None if there is no list.
        own: what else may be given, or "".
        many: the command line takes several values, comma-separated.
        later: added after runs had been recorded; at its default it is not part of keys, so that old keys stay valid.
    """

    name: str
    kind: type
    default: Any
    role: Role
    help: str
    default_help: str
    choices: Collection[str] | None
    many: bool
    own: str
    later: bool

    def in_key(self, value: Any) -> bool:
        """Return True if this value distinguishes a run from others."""
        return self.role is not Role.SPEED and not (self.later and value == self.default)

    def again(self) -> Any:
        """Return a field that defines the same setting in another class."""
        given = {name: value for name, value in vars(self).items() if name not in ("name", "kind", "default")}
        return setting(self.default, **given)


def setting(
    default: Any,
    help: str = "",
    *,
    role: Role = Role.GROUP,
    choices: Collection[str] | None = None,
    many: bool = False,
    default_help: str = "",
    own: str = "",
    later: bool = False,
) -> Any:
    """Return a dataclass field that defines a setting; see :class:`Setting`. Without ``help`` it has no option."""
    metadata = {
        "help": help,
        "role": role,
        "choices": choices,
        "many": many,
        "own": own,
        "default_help": default_help,
        "later": later,
    }
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(config: type) -> dict[str, Setting]:
    """Return all settings that a dataclass defines, by name."""
    hints = typing.get_type_hints(config)
    found = {}
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(each for each in typing.get_args(kind) if each is not type(None))
        found[field.name] = Setting(field.name, kind, field.default, **field.metadata)
    return found


_OTHER_NAME = {"method": "methods", "methods": "method", "seed": "seeds", "seeds": "seed"}


def overridden(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base with what is given in its place, also under its other name: `method` for `methods`.

    Parameters of methods (``params``) are replaced one by one.
    """
    found = {**{name: value for name, value in base.items() if _OTHER_NAME.get(name) not in given}, **given}
    if "params" in base and "params" in given:
        found["params"] = overridden_params(base["params"], given["params"])
    return found


def overridden_params(base: Any, given: Any) -> dict[str, dict[str, Any]]:
    """Return tables of parameters, one a method, with each parameter that is given in its place."""
    tables, own = check_tables(base), check_tables(given)
    return {name: {**tables.get(name, {}), **own.get(name, {})} for name in (*tables, *own)}


def check_tables(params: Any) -> Mapping[str, Mapping[str, Any]]:
    """Check that parameters of methods are tables, one a method."""
    if not isinstance(params, Mapping) or not all(isinstance(each, Mapping) for each in params.values()):
        raise TypeError(f"expected `params` to be tables such as [params.small_loss], got {describe(params)}.")
    return params
