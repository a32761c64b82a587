"""Run a traced step once more, in backward, for a gradient that has a graph: on what, and by the model's own Python."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from batchtrim.engine.batch import map_tensors
from batchtrim.engine.forward import Forward
from batchtrim.engine.generators import GeneratorStates
from batchtrim.engine.memory import version_of
from batchtrim.engine.state import Snapshot, caches_left
from batchtrim.engine.traced_function import traced_function
from batchtrim.engine.writes import ParameterWrites

__all__ = ["CannotRepeat", "Inputs", "OwnPython"]


class CannotRepeat(Exception):
    """A step cannot run again; the message says why."""


class OwnPython:
    """What ran in a traced step: the model's own Python, on its batch.

    Attributes:
        generators: as they were before the step.
        losses: what the trace found, detached, (B,).
    """

    def __init__(self, forward: Forward, scope: str, x: Any, y: Any, generators: GeneratorStates) -> None:
        self.forward = forward
        self.generators = generators
        self.function = traced_function(forward, False, scope)
        self.x, self.y = x, y
        self.losses: Tensor | None = None

    def run(self, others: Mapping[int, Tensor]) -> Tensor:
        """Return the losses, with their graph. It starts from the present state, and leaves it unchanged.

        Args:
            others: what takes the place of parameters, buffers and tensors of the batch, by their ``id()``.

        Raises:
            CannotRepeat: nothing could put the model's state back.
        """
        before = Snapshot(self.forward, self.x, self.y)
        if before.lasting is not None:
            raise CannotRepeat(before.lasting)
        x, y = map_tensors(lambda each: others.get(id(each), each), (self.x, self.y))
        writes = ParameterWrites(self.forward.inner, others=before.model.watched)
        held: list[dict[str, Any]] = [
            each for module in before.model.modules for each in (module._parameters, module._buffers)
        ]
        swapped = [(each, name, own) for each in held for name, own in each.items() if id(own) in others]
        try:
            for each, name, own in swapped:
                each[name] = others[id(own)]
            with writes, caches_left():
                parts, _ = self.function(x, y)
        finally:
            for each, name, own in swapped:
                each[name] = own
            before.restore(batch=True)
            writes.restore()
        return parts[0]


class Inputs:
    """What one run of a trace ran on: the inputs of the traced function, in their order.

    Attributes:
        python: the model's own Python, as it ran.
        asks: which of the inputs required a gradient.
        before: copies of those that the run writes over.

    Args:
        copied: the positions of inputs to copy.
        again: False if nothing can run again; then nothing is noted but the inputs.
    """

    def __init__(self, args: Sequence[Any], copied: Sequence[int], python: OwnPython, *, again: bool) -> None:
        self.args = args
        self.python = python
        noted = args if again else ()
        self.asks = [isinstance(each, Tensor) and each.requires_grad for each in noted]
        self.before = {at: args[at].clone() for at in copied if isinstance(args[at], Tensor)}
        self.versions = [version_of(each) for each in noted]

    def changed(self, but: Container[int]) -> bool:
        """True if one of them was written into since; ``but``: the positions of those that the run itself writes."""
        return any(
            version_of(each) != version
            for at, (each, version) in enumerate(zip(self.args, self.versions, strict=True))
            if at not in but
        )

    def asks_since(self, but: Container[int]) -> bool:
        """True if one of them began to require a gradient since: plain training follows it in part of its graph."""
        return any(
            isinstance(each, Tensor) and each.requires_grad and not asks
            for at, (each, asks) in enumerate(zip(self.args, self.asks, strict=True))
            if at not in but
        )

    def for_this_use(self) -> list[Any]:
        """Return them as they were, where none depends on another: each has the gradient of this use alone."""
        apart = any(asks and not each.is_leaf for each, asks in zip(self.args, self.asks, strict=True))
        return [
            self.before.get(at, torch.ops.aten.alias.default(each) if apart and asks else each)
            for at, (each, asks) in enumerate(zip(self.args, self.asks, strict=True))
        ]

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Have the leaves require a gradient that did, though they were frozen since."""
        frozen = [each for each, asks in zip(self.args, self.asks, strict=True) if asks and not each.requires_grad]
        try:
            for each in frozen:
                each.requires_grad_(True)
            yield
        finally:
            for each in frozen:
                each.requires_grad_(False)
