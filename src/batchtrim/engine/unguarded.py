"""Notice changes that a trace's guards do not: a method replaced in its class, a hook on all modules, another loss.

torch's guards watch the values that a model's Python reads. They take for granted that classes keep their methods and
functions their code, that nothing is hooked into every module, that ``os.getenv`` always returns the same, and that no
variable is added to ``os.environ``. Before torch 2.13 they do not notice either that a parameter gains an attribute.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from batchtrim.engine.compilation import uncompiled
from batchtrim.engine.forward import Forward
from batchtrim.engine.names import OF_ALL_MODULES
from batchtrim.engine.reachable import Reachable

__all__ = ["Unguarded"]

_CODE = attrgetter("__code__")
_ENVIRONMENT = {"getenv", "environ"}
_METHOD = "a method or attribute of its classes"
_OTHERS = (
    "the model", "the model that was compiled", "its loss", "a hook on all modules", "a variable of os.environ",
    "an attribute of its parameters",
)  # fmt: skip
_WATCHES_TENSORS = torch.__version__ >= TorchVersion("2.13")


class Unguarded:
    """The state that a model's traces depend on although no guard watches it."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.look()

    def look(self) -> None:
        """Note everything as it is now. A new trace may rest on classes that came with it."""
        # without its wrapper: DDP's class holds the instance whose forward runs, and no trace enters a wrapper
        held = Reachable(self.forward.inner, self.forward.per_sample_loss)
        classes = [cls for module in held.modules for cls in type(module).__mro__ if cls is not object]
        classes += [names.owner for names in held.names if isinstance(names.owner, type)]
        # of each class: its attributes, how many they are, and a function that takes its methods from them
        self._classes: list[tuple[Any, int, Callable[[Any], Any]]] = []
        for attributes in map(vars, dict.fromkeys([*classes, Tensor])):
            methods = [name for name, value in attributes.items() if callable(value) or hasattr(value, "__get__")]
            self._classes.append((attributes, len(attributes), itemgetter(*methods) if methods else len))
        self._methods = [take(attributes) for attributes, _, take in self._classes]
        self._functions = held.functions
        self._code = list(map(_CODE, held.functions))
        self._asks = any(not _ENVIRONMENT.isdisjoint(code.co_names) for code in self._code)
        self._of_tensors = [] if _WATCHES_TENSORS else list(map(vars, held.of_tensors))
        self._others = self._now()

    def changed(self) -> str | None:
        """Return what has changed since construction, or None. Takes 50 to 100 us for a BERT of 6 layers."""
        now = self._now()
        if now != self._others:
            return next(what for what, was, is_ in zip(_OTHERS, self._others, now, strict=True) if was != is_)
        if list(map(_CODE, self._functions)) != self._code:
            return "the code of one of its functions"
        try:
            if any(len(held) != size for held, size, _ in self._classes):
                return _METHOD
            return None if [take(held) for held, _, take in self._classes] == self._methods else _METHOD
        except KeyError:  # a method was removed and another one added
            return _METHOD

    def _now(self) -> list[Any]:
        hooks = [list(hooks.values()) for hooks in OF_ALL_MODULES if hooks]
        variables = os.environ.copy() if self._asks else None
        given = sum("dynamo" not in name for held in self._of_tensors for name in held)
        forward = self.forward
        return [forward.model, uncompiled(forward.inner), forward.per_sample_loss, hooks, variables, given]
