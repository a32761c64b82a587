"""A row of the table of methods, and checks of parameters that only methods need."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchtrim._checks import check_count, check_number, nearest
from batchtrim.lab.methods.base import Method, RunInfo

Params = dict[str, Any]


@dataclass(frozen=True)
class Param:
    """A method's parameter: its default, its check ``(name, value) -> value``, and a line of help."""

    default: Any
    check: Callable[[str, Any], Any]
    help: str


@dataclass(frozen=True)
class MethodSpec:
    """One method: a row of the table.

    Args:
        name: as typed.
        summary: one line.
        source: the origin of the rule.
        build: makes the method from a :class:`RunInfo` and checked parameters.
        params: the parameters it takes, by name.
        uses_schedule: True if it follows the run's keep schedule.
        any_engine: True if its choice needs only the losses of the current batch.
        smoothing: False if it derives probabilities from the loss, which rules out label smoothing.
    """

    name: str
    summary: str
    source: str
    build: Callable[[RunInfo, Params], Method]
    params: Mapping[str, Param] = field(default_factory=dict)
    uses_schedule: bool = False
    any_engine: bool = True
    smoothing: bool = True

    def described(self) -> dict[str, Any]:
        """Return a description of the method as plain values, for JSON."""
        params = {name: param.default for name, param in self.params.items()}
        return {"summary": self.summary, "source": self.source, "params": params}

    def check_params(self, given: Mapping[str, Any]) -> Params:
        """Return all parameters with defaults filled in; an error names the wrong one."""
        for name in given:
            if name not in self.params:
                takes = ", ".join(self.params) or "none"
                raise ValueError(
                    f"expected a parameter of method '{self.name}' ({takes}), got {name!r}.{nearest(name, self.params)}"
                )
        return {
            name: param.check(f"{self.name}.{name}", given.get(name, param.default))
            for name, param in self.params.items()
        }


def check_open_interval(name: str, value: Any) -> float:
    value = check_number(name, value)
    if not 0.0 < value < 1.0:
        raise ValueError(f"expected `{name}` between 0 and 1, got {value:g}.")
    return value


def check_not_negative(name: str, value: Any, hint: str = "") -> float:
    value = check_number(name, value, hint)
    if not (value >= 0.0 and math.isfinite(value)):
        raise ValueError(f"expected `{name}` to be at least 0 and finite, got {value:g}.{hint and ' '}{hint}")
    return value


def check_count_or_zero(name: str, value: Any) -> int:
    return check_count(name, value, minimum=0)
