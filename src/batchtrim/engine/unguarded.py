"""Notice changes that a trace's guards do not: a method replaced in its class, a hook on all modules, another loss.

torch's guards watch the values that a model's Python reads. They take for granted that classes keep their methods and
that nothing is hooked into every module.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from types import FunctionType
from typing import Any

from torch import nn

from batchtrim.engine.forward import Forward

__all__ = ["Unguarded"]

_OF_ALL_MODULES = [
    value for name, value in vars(nn.modules.module).items() if name.startswith("_global_") and isinstance(value, dict)
]
_METHODS = (FunctionType, staticmethod, classmethod, property)


class Unguarded:
    """The state that a model's traces depend on although no guard watches it."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        modules = [*forward.model.modules()]
        if isinstance(forward.per_sample_loss, nn.Module):
            modules += forward.per_sample_loss.modules()
        classes = dict.fromkeys(cls for module in modules for cls in type(module).__mro__ if cls is not object)
        # of each class: its attributes, how many they are, and a function that takes its methods from them
        self._classes: list[tuple[Any, int, Callable[[Any], Any]]] = []
        for held in map(vars, classes):
            methods = [name for name, value in held.items() if isinstance(value, _METHODS)]
            self._classes.append((held, len(held), itemgetter(*methods) if methods else len))
        self._methods = [take(held) for held, _, take in self._classes]
        self._others = self._now()

    def changed(self) -> bool:
        """True if something has changed since construction. Takes about 10 microseconds; it runs in every step."""
        if self._now() != self._others or any(len(held) != size for held, size, _ in self._classes):
            return True
        try:
            return [take(held) for held, _, take in self._classes] != self._methods
        except KeyError:  # a method was removed and another one added
            return True

    def _now(self) -> list[Any]:
        hooks = [list(hooks.values()) for hooks in _OF_ALL_MODULES if hooks]
        return [self.forward.model, self.forward.per_sample_loss, hooks]
