"""Run the model's own Python of a traced step once more, in backward, for a gradient that has a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from batchtrim.engine.batch import map_tensors
from batchtrim.engine.forward import Forward
from batchtrim.engine.state import Snapshot, caches_left
from batchtrim.engine.traced_function import traced_function
from batchtrim.engine.writes import ParameterWrites

__all__ = ["CannotRepeat", "OwnPython"]


class CannotRepeat(Exception):
    """A step cannot run again; the message says why."""


class OwnPython:
    """What ran in a traced step: the model's own Python, on its batch.

    Attributes:
        losses: what the trace found, detached, (B,).
    """

    def __init__(self, forward: Forward, scope: str, x: Any, y: Any) -> None:
        self.forward = forward
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
