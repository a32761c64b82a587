"""Notice changes that a trace's guards do not: a method replaced in its class, a hook on all modules, another loss.

torch's guards watch the values that a model's Python reads. They take for granted that classes keep their methods and
that nothing is hooked into every module.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import nn

from batchtrim.engine.batch import Forward

__all__ = ["Unguarded"]

_OF_ALL_MODULES = [
    value for name, value in vars(nn.modules.module).items() if name.startswith("_global_") and isinstance(value, dict)
]
_METHODS = (FunctionType, staticmethod, classmethod, property)


class Unguarded:
    """What the traces of a model rest on, though no guard watches it."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        modules = [*forward.model.modules()]
        if isinstance(forward.per_sample_loss, nn.Module):
            modules += forward.per_sample_loss.modules()
        classes = dict.fromkeys(cls for module in modules for cls in type(module).__mro__ if cls is not object)
        # of each class, as the check runs in every step: its attributes, the names of its methods, and how many it has
        self._methods = [
            (vars(cls), [name for name, value in vars(cls).items() if isinstance(value, _METHODS)]) for cls in classes
        ]
        self._noted = self._now()

    def changed(self) -> bool:
        """True if something is other than at the construction."""
        return self._now() != self._noted

    def _now(self) -> list[Any]:
        found: list[Any] = [self.forward.model, self.forward.per_sample_loss]
        found += [list(hooks.values()) for hooks in _OF_ALL_MODULES]
        for held, names in self._methods:
            found.append(len(held))
            found += map(held.get, names)
        return found
