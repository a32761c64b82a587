"""Estimate the cost of a step from a trace's graphs, or before there is a trace, from a plain step's operators.

Nothing is timed, so runs repeat. An operator costs a fixed time to start, plus the longer of its arithmetic and its
memory traffic. The machine's figures are rough; they only decide whether a step that cuts rows is cheaper than a plain
one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from batchtrim.engine.graphs import hinted, name_of
from batchtrim.engine.operator_mode import OperatorMode

__all__ = [
    "TRACED_BELOW",
    "Cost",
    "Forecast",
    "Machine",
    "OperatorCount",
    "cost_of",
    "hinted_size",
    "is_costly",
    "machine_of",
]

TRACED_BELOW = 0.85  # the keep fraction above which no trace is made


@dataclass(frozen=True)
class Machine:
    """Operations per second, bytes per second, seconds to start an operator."""

    flops: float
    bytes: float
    start: float


def machine_of(device: torch.device) -> Machine:
    """Return rough figures for a device; for a CPU, by the number of threads in use."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return Machine(4e10 * threads, 6e9 * min(threads, 4), 6e-6)
    return Machine(6e13, 1.2e12, 1e-5)


@dataclass
class Cost:
    """Seconds of a plain step's forward, of backward's upper and lower part, and of cutting, on all rows.

    :meth:`ratio` is the cost of a step that keeps the fraction q, over that of a plain one:
    ``(forward + q * upper + lower + (1 + q) * cutting + overhead) / (forward + upper + lower)``.
    """

    forward: float = 0.0
    upper: float = 0.0
    lower: float = 0.0
    cutting: float = 0.0
    overhead: float = 0.0

    def ratio(self, q: float) -> float:
        """Return the cost of a step that keeps q, relative to a plain step."""
        plain = self.forward + self.upper + self.lower
        step = self.forward + q * self.upper + self.lower + (1 + q) * self.cutting + self.overhead
        return step / plain if plain else math.inf

    @property
    def share(self) -> float:
        """The share of a backward's work that runs on the kept rows."""
        return self.upper / (self.upper + self.lower) if self.upper else 0.0


_CONTRACTED = {"mm": -1, "bmm": -1, "addmm": -1, "baddbmm": -1, "addbmm": -1, "mv": -1, "addmv": -1}
_FREE = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "detach", "alias", "unsqueeze", "squeeze",
         "slice", "select", "split", "unbind", "split_with_sizes", "as_strided", "diagonal"}  # fmt: skip
_COSTLY = frozenset(_CONTRACTED) | {"convolution", "convolution_backward"}


def hinted_size(tensor: Any) -> int:
    """Return how many entries a tensor has, with the hints of symbolic sizes."""
    return int(tensor.numel()) if tensor.is_nested else math.prod(_shape(tensor))


def _shape(tensor: Any) -> list[int]:
    return [hinted(size) for size in tensor.shape]


def is_costly(node: fx.Node) -> bool:
    """True if an operator does more than move memory."""
    return _is_costly(name_of(node.target))


def _is_costly(name: str) -> bool:
    return name in _COSTLY or ("attention" in name and "::" not in name)


def _flops(name: str, args: Sequence[Any], output: Any) -> float:
    tensors = [each for each in args if isinstance(each, Tensor)]
    if any(each.is_nested for each in tensors):  # its sizes are no numbers
        return 0.0
    if name in _CONTRACTED:
        left = tensors[1] if name.startswith(("add", "badd")) else tensors[0]
        return 2.0 * hinted_size(output) * _shape(left)[-1]
    if name == "convolution":
        return 2.0 * hinted_size(output) * hinted_size(tensors[1]) / _shape(tensors[1])[0]
    if name == "convolution_backward":
        each = 2.0 * hinted_size(tensors[0]) * hinted_size(tensors[2]) / _shape(tensors[2])[0]
        return each * sum(map(bool, args[-1][:2]))
    if "attention" in name:
        query, key = (tensors[1], tensors[2]) if "backward" in name else (tensors[0], tensors[1])
        return (10.0 if "backward" in name else 4.0) * hinted_size(query) * _shape(key)[-2]
    return 0.0


def _bytes(tensors: Any) -> int:
    found = tensors if isinstance(tensors, (list, tuple)) else [tensors]
    return sum(hinted_size(t) * t.element_size() for t in found if isinstance(t, Tensor))


def _seconds(name: str, args: Sequence[Any], inputs: Sequence[Any], output: Any, machine: Machine) -> float:
    """Return the seconds an operator takes; ``inputs`` are all that it reads, including lists and keywords."""
    moved = _bytes(output) + _bytes(inputs)
    flops = _flops(name, args, output) if _is_costly(name) else 0.0
    return max(flops / machine.flops, moved / machine.bytes) + machine.start


def cost_of(node: fx.Node, machine: Machine) -> float:
    """Return the seconds that an operator takes."""
    name = name_of(node.target)
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or name in _FREE:
        return 0.0
    args = [each.meta.get("val") if isinstance(each, fx.Node) else each for each in node.args]
    inputs = [each.meta.get("val") for each in node.all_input_nodes]
    return _seconds(name, args, inputs, node.meta.get("val"), machine)


# --- before there is a trace -----------------------------------------------------------------------------------------

# Seconds of a trace, and of each operator in it, those that move no memory included: fitted to nine models, from an MLP
# of 30 operators (0.5 s) to a BERT of 315 (4.9 s), all within a third. The first one in a process imports more.
_TRACE, _TRACE_OPERATOR, _FIRST = 0.5, 0.0145, 0.9
# The backwards that compare a new trace with the model, in plain steps: two of two forwards each.
_COMPARING = 4 / 3
# The time of cutting, over that of writing the forward's outputs: fitted to networks of 46 to 500 ms a step.
_CUTTING_OVER_WRITING = 0.83
# The steps within which a trace must pay off, and how much slower than plain training they may be.
_PAID_WITHIN, _ALLOWED = 100, 0.02


@dataclass(frozen=True)
class Forecast:
    """Seconds of a plain step, of tracing it, and of cutting, estimated before it is traced."""

    step: float
    trace: float
    cutting: float = 0.0

    def pays(self, q: float) -> bool:
        """True if 100 steps that keep q each, and the trace, take at most 2 % more than plain steps.

        A traced step is assumed to cost ``(1 + 2q) / 3`` of a plain one, plus the cutting of all rows and of the kept.
        """
        saved = self.step * (1 + _ALLOWED - (1 + 2 * q) / 3) - (1 + q) * self.cutting
        return _PAID_WITHIN * saved >= self.trace


class OperatorCount(OperatorMode):
    """Count the operators of a forward and their cost, without changing anything.

    Use it as a context manager around a forward with a graph.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.operators = 0
        self.seconds = 0.0
        self.writing = 0.0  # the part of the seconds spent on writing outputs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.operators += 1
        name = name_of(func)
        if isinstance(func, torch._ops.OpOverload) and name not in _FREE:
            inputs = pytree.tree_leaves((args, dict(kwargs or {})))
            self.seconds += _seconds(name, args, inputs, output, self.machine)
            self.writing += _bytes(output) / self.machine.bytes
        return output

    def forecast(self, *, first: bool) -> Forecast:
        """Return the time of a step and of its trace, from the counted forward; ``first``: of this process.

        A step takes three forwards, and the machine may be three times as fast as assumed here, so a step is taken for
        the forward as counted.
        """
        trace = _TRACE + _TRACE_OPERATOR * self.operators + (_FIRST if first else 0.0) + _COMPARING * self.seconds
        return Forecast(self.seconds, trace, _CUTTING_OVER_WRITING * self.writing)
