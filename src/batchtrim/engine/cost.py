"""What a traced step costs, counted from its graphs: nothing is timed, so that a run repeats.

An operator costs the longest of its arithmetic and the memory it moves, and a share of time whatever it does. The
machine's numbers are rough; what is decided by them is whether a step that cuts is cheaper than one that does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from batchtrim.engine.rules import name_of

__all__ = ["Cost", "Machine", "cost_of", "hinted_size", "is_costly", "machine_of"]


@dataclass(frozen=True)
class Machine:
    """Operations a second, bytes a second, seconds to start an operator."""

    flops: float
    bytes: float
    start: float


def machine_of(device: torch.device) -> Machine:
    """Rough numbers of a device; of a CPU for the number of threads in use."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return Machine(4e10 * threads, 6e9 * min(threads, 4), 6e-6)
    return Machine(6e13, 1.2e12, 1e-5)


@dataclass
class Cost:
    """Seconds of a plain step's forward, of backward's upper and lower part, and of cutting, on all rows.

    :meth:`ratio` is what a step costs that keeps the fraction q, over a plain one:
    ``(forward + q * upper + lower + (1 + q) * cutting + overhead) / (forward + upper + lower)``.
    """

    forward: float = 0.0
    upper: float = 0.0
    lower: float = 0.0
    cutting: float = 0.0
    overhead: float = 0.0

    def ratio(self, q: float) -> float:
        """Cost of a step that keeps q, over a plain step's."""
        plain = self.forward + self.upper + self.lower
        step = self.forward + q * self.upper + self.lower + (1 + q) * self.cutting + self.overhead
        return step / plain if plain else math.inf

    @property
    def share(self) -> float:
        """How much of a backward's work runs on the kept rows."""
        return self.upper / (self.upper + self.lower) if self.upper else 0.0


_CONTRACTED = {"mm": -1, "bmm": -1, "addmm": -1, "baddbmm": -1, "addbmm": -1, "mv": -1, "addmv": -1}
_FREE = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "detach", "alias", "unsqueeze", "squeeze",
         "slice", "select", "split", "unbind", "split_with_sizes", "as_strided", "diagonal"}  # fmt: skip
_COSTLY = frozenset(_CONTRACTED) | {"convolution", "convolution_backward"}


def hinted_size(tensor: Any) -> int:
    """Return how many entries a tensor has, symbolic sizes by their hints."""
    return math.prod(_shape(tensor))


def _shape(tensor: Any) -> list[int]:
    # a size that the values decide (of nonzero) has no hint, and counts as one row
    return [int(size.node.hint or 1) if isinstance(size, torch.SymInt) else size for size in tensor.shape]


def is_costly(node: fx.Node) -> bool:
    """True if an operator does more than move memory."""
    name = name_of(node.target)
    return name in _COSTLY or "attention" in name


def _flops(node: fx.Node, name: str) -> float:
    tensors = [a.meta["val"] for a in node.args if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor)]
    if name in _CONTRACTED:
        left = tensors[1] if name.startswith(("add", "badd")) else tensors[0]
        return 2.0 * hinted_size(node.meta["val"]) * _shape(left)[-1]
    if name == "convolution":
        return 2.0 * hinted_size(node.meta["val"]) * hinted_size(tensors[1]) / _shape(tensors[1])[0]
    if name == "convolution_backward":
        masks: Any = node.args[-1]
        each = 2.0 * hinted_size(tensors[0]) * hinted_size(tensors[2]) / _shape(tensors[2])[0]
        return each * sum(map(bool, masks[:2]))
    if "attention" in name:
        query, key = (tensors[1], tensors[2]) if "backward" in name else (tensors[0], tensors[1])
        return (10.0 if "backward" in name else 4.0) * hinted_size(query) * _shape(key)[-2]
    return 0.0


def cost_of(node: fx.Node, machine: Machine) -> float:
    """Seconds an operator takes."""
    name = name_of(node.target)
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or name in _FREE:
        return 0.0
    outputs = node.meta.get("val")
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    inputs = [each.meta.get("val") for each in node.all_input_nodes]
    moved = sum(hinted_size(t) * t.element_size() for t in [*outputs, *inputs] if isinstance(t, Tensor))
    flops = _flops(node, name) if is_costly(node) else 0.0
    return max(flops / machine.flops, moved / machine.bytes) + machine.start
