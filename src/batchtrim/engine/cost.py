"""Estimate the cost of a step from a trace's graphs, or before there is a trace, from a plain step's operators.

Nothing is timed, so runs repeat. An operator costs a fixed time to start, plus the longer of its arithmetic and its
memory traffic. Python starts a GPU's operators ahead of it, so a step there takes the longer of Python's time and the
GPU's. The machine's figures are rough; they only decide whether a step that cuts rows is cheaper than a plain one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from batchtrim.engine.graphs import hinted, name_of
from batchtrim.engine.operator_mode import OperatorMode
from batchtrim.engine.precision import in_tf32

if TYPE_CHECKING:
    from batchtrim.engine.split import Slices

__all__ = [
    "TRACED_BELOW",
    "Cost",
    "Forecast",
    "Machine",
    "OperatorCount",
    "cost_of_step",
    "gpu",
    "is_costly",
    "machine_of",
]

TRACED_BELOW = 0.85  # the keep fraction above which no trace is made


@dataclass(frozen=True)
class Machine:
    """How fast a device is.

    Attributes:
        flops: operations per second in products of float32.
        bytes: bytes read or written per second.
        start: seconds to start an operator, on the device itself.
        short: operations per second in products of 16 bits; None if they are not faster.
        tf32: whether matrix products and convolutions of float32 are computed in TF32.
        python: seconds of Python's time for an operator, if the device works meanwhile; otherwise 0.
    """

    flops: float
    bytes: float
    start: float
    short: float | None = None
    tf32: tuple[bool, bool] = (False, False)
    python: float = 0.0

    def fused(self) -> Machine:
        """Return the figures for compiled code, where one kernel does the work of several operators."""
        return replace(self, start=0.0, bytes=self.bytes * (_FUSED if self.python else 1.0), python=1.25 * self.python)

    def products(self, name: str, dtype: torch.dtype) -> float:
        """Return the operations per second of an operator that multiplies matrices."""
        if self.short is None or dtype == torch.float64:
            return self.flops
        if dtype == torch.float32:
            return self.short / 2 if self.tf32["convolution" in name] else self.flops
        return self.short


def machine_of(device: torch.device) -> Machine:
    """Return rough figures for a device: for a CPU by the number of threads in use, for a GPU by its size and age."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return Machine(4e10 * threads, 6e9 * min(threads, 4), 6e-6)
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return gpu(found.multi_processor_count, found.major, in_tf32(device))
    return gpu(132, 9)


def gpu(multiprocessors: int, generation: int, tf32: tuple[bool, bool] = (False, False)) -> Machine:
    """Return rough figures for a GPU: those of an H200, scaled by its multiprocessors and their generation.

    Python's time is that of a slow CPU: where Python may be what a step waits for, it is taken to be.

    Args:
        generation: the first digit of the compute capability.
    """
    speed = multiprocessors / 132 * {8: 0.5, 9: 1.0}.get(generation, 2.0 if generation > 9 else 0.25)
    return Machine(4e13 * speed, 4e12 * speed, 3e-6, short=5e14 * speed, tf32=tf32, python=4e-5)


_FUSED = 6.0  # by how much compiled code on a GPU reads and writes less than its operators: fitted to BERT-base


@dataclass
class Cost:
    """Seconds of a plain step's forward, of backward's upper and lower part, and of cutting, on all rows.

    Attributes:
        overhead: seconds that do not depend on the number of rows.
        python: seconds of Python's time in a plain step, while the device works.
        python_cut: the same in a step that cuts rows.
    """

    forward: float = 0.0
    upper: float = 0.0
    lower: float = 0.0
    cutting: float = 0.0
    overhead: float = 0.0
    python: float = 0.0
    python_cut: float = 0.0

    def ratio(self, q: float) -> float:
        """Return the cost of a step that keeps the fraction q, over that of a plain one.

        That is ``max(forward + q * upper + lower + (1 + q) * cutting + overhead, python_cut)`` over
        ``max(forward + upper + lower, python)``.
        """
        plain = max(self.forward + self.upper + self.lower, self.python)
        return max(self._on_device(q), self.python_cut) / plain if plain else math.inf

    def waits_for_python(self, q: float) -> bool:
        """True if the device finishes a step that keeps q before Python has started all its operators."""
        return self._on_device(q) < self.python_cut

    def _on_device(self, q: float) -> float:
        return self.forward + q * self.upper + self.lower + (1 + q) * self.cutting + self.overhead

    @property
    def share(self) -> float:
        """The share of a backward's work that runs on the kept rows."""
        return self.upper / (self.upper + self.lower) if self.upper else 0.0


_CONTRACTED = {"mm": -1, "bmm": -1, "addmm": -1, "baddbmm": -1, "addbmm": -1, "mv": -1, "addmv": -1}
_FREE = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "detach", "alias", "unsqueeze", "squeeze",
         "slice", "select", "split", "unbind", "split_with_sizes", "as_strided", "diagonal"}  # fmt: skip
_COSTLY = frozenset(_CONTRACTED) | {"convolution", "convolution_backward"}


def _size(tensor: Any) -> int:
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
        return 2.0 * _size(output) * _shape(left)[-1]
    if name == "convolution":
        return 2.0 * _size(output) * _size(tensors[1]) / _shape(tensors[1])[0]
    if name == "convolution_backward":
        each = 2.0 * _size(tensors[0]) * _size(tensors[2]) / _shape(tensors[2])[0]
        return each * sum(map(bool, args[-1][:2]))
    if "attention" in name:
        query, key = (tensors[1], tensors[2]) if "backward" in name else (tensors[0], tensors[1])
        return (10.0 if "backward" in name else 4.0) * _size(query) * _shape(key)[-2]
    return 0.0


def _bytes(tensors: Any) -> int:
    found = tensors if isinstance(tensors, (list, tuple)) else [tensors]
    return sum(_size(t) * t.element_size() for t in found if isinstance(t, Tensor))


def _seconds(name: str, args: Sequence[Any], inputs: Sequence[Any], output: Any, machine: Machine) -> float:
    """Return the seconds an operator takes; ``inputs`` are all that it reads, including lists and keywords."""
    moved = _bytes(output) + _bytes(inputs)
    working = 0.0
    if _is_costly(name):
        dtype = next((each.dtype for each in args if isinstance(each, Tensor)), torch.float32)
        working = _flops(name, args, output) / machine.products(name, dtype)
    return max(working, moved / machine.bytes) + machine.start


def _starts(target: Any) -> bool:
    """True if a call of this target starts an operator on the device."""
    return isinstance(target, torch._ops.OpOverload) and name_of(target) not in _FREE


def _cost_of(node: fx.Node, machine: Machine) -> float:
    """Return the seconds that an operator takes on the device."""
    if not _starts(node.target):
        return 0.0
    name = name_of(node.target)
    args = [each.meta.get("val") if isinstance(each, fx.Node) else each for each in node.args]
    inputs = [each.meta.get("val") for each in node.all_input_nodes]
    return _seconds(name, args, inputs, node.meta.get("val"), machine)


_COMPILED_OVERHEAD = 3e-4  # seconds of a step outside the compiled functions
# Python's time for a step that cuts rows, over that for a plain one. Measured on an H200: 1.3 to 1.8, and 1.05 to 1.26.
_PYTHON_EAGER, _PYTHON_COMPILED = 1.5, 1.2


def cost_of_step(
    forward: fx.Graph, backward: fx.Graph, slices: Slices, machine: Machine, *, compiled: bool, replayed: bool
) -> Cost:
    """Return the cost of a step whose backward is split.

    Args:
        compiled: the step runs compiled, and so does the plain one.
        replayed: the plain step is a CUDA graph, which needs none of Python's time.
    """
    machine = machine.fused() if compiled else machine
    gradients = {node: each for node, each in slices.proof.verdicts.items() if each.gradient}
    cost = Cost(forward=sum(_cost_of(node, machine) for node in forward.nodes))
    for node, verdict in gradients.items():
        if node in slices.lower.nodes or verdict.all_rows:
            cost.lower += _cost_of(node, machine)
        else:
            cost.upper += _cost_of(node, machine)
    for place, node in enumerate(backward.find_nodes(op="placeholder")):
        if place in slices.cuts:
            cost.cutting += _bytes(node.meta["val"]) / machine.bytes
            cost.overhead += 2 * machine.start
    if compiled:
        cost.cutting /= 2  # a tensor that is read once is not copied
        cost.overhead = _COMPILED_OVERHEAD
    # compiled code starts about one kernel for each product, and one for each gradient
    nodes = (*forward.nodes, *gradients)
    started = sum(is_costly(node) if compiled else _starts(node.target) for node in nodes)
    started += len(backward.output_node().all_input_nodes) if compiled else 0
    cost.python = 0.0 if replayed else started * machine.python
    cost.python_cut = started * machine.python * (_PYTHON_COMPILED if compiled else _PYTHON_EAGER)
    return cost


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
        if _starts(func):
            inputs = pytree.tree_leaves((args, dict(kwargs or {})))
            self.seconds += _seconds(name_of(func), args, inputs, output, self.machine)
            self.writing += _bytes(output) / self.machine.bytes
        return output

    def forecast(self, *, first: bool) -> Forecast:
        """Return the time of a step and of its trace, from the counted forward; ``first``: of this process.

        A step takes three forwards, and the machine may be three times as fast as assumed here, so a step is taken for
        the forward as counted.
        """
        trace = _TRACE + _TRACE_OPERATOR * self.operators + (_FIRST if first else 0.0) + _COMPARING * self.seconds
        return Forecast(self.seconds, trace, _CUTTING_OVER_WRITING * self.writing)
