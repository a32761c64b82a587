"""A traced step whose backward runs on the kept rows: when what it saved is cut, and how backward runs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from batchtrim.engine.backward import Runs, run_backward
from batchtrim.engine.capture import CannotCapture, OneBatchSize, keeps_graph
from batchtrim.engine.compiled import CompiledStep
from batchtrim.engine.cost import Cost, cost_of_step, machine_of
from batchtrim.engine.cutting import KeptRows, cut, put_back
from batchtrim.engine.graphs import (
    any_strides,
    executable,
    in_memory_of_their_own,
    pin,
    without_dead_draws,
    without_passed_on,
    writes,
)
from batchtrim.engine.inductor import Inductor, without_strides
from batchtrim.engine.layout import Axis, Broken, Layout, RowLayout, exact_ratio, factor_of
from batchtrim.engine.proof import LAYOUT, by_shape, label, place_of, prove
from batchtrim.engine.reasons import fixed_by
from batchtrim.engine.rules_shape import view_axis
from batchtrim.engine.second_derivatives import with_second_derivatives
from batchtrim.engine.split import Slices, split_backward
from batchtrim.engine.symbolic import expression_of
from batchtrim.engine.tape import Tape
from batchtrim.engine.unasked import noting_arrivals, tangents_of_each
from batchtrim.engine.writes import memory_of

__all__ = ["NewTrace", "SlicedStep"]


class NewTrace(Exception):
    """A trace that was never compared with the model is about to run; nothing has run yet."""


class SlicedStep:
    """One trace: its forward, its backward, and the backward in two parts. A planner of :class:`Capture`."""

    def __init__(
        self,
        current: Callable[[], Tape | None],
        approximate: bool = False,
        unit: str = "sample",
        compiler: Inductor | None = None,
    ) -> None:
        self.current = current
        self.unit = unit
        self.approximate = approximate
        self.compiled = None if compiler is None else CompiledStep(self, compiler)
        self.runs = 0
        self.checked, self._compared = False, 0  # True once enough runs were compared with the model
        self._shown: set[int] = set()
        self._slices: dict[bool, Slices] = {}
        self._costs: dict[bool, Cost] = {}

    # what Capture calls

    def partition(
        self, joint: fx.GraphModule, split: Callable[[], Any], outputs: int, own: int, leaves: Sequence[bool]
    ) -> Any:
        joint.graph.eliminate_dead_code()
        if self.compiled is not None:
            without_strides(joint)
        tangents = _after_tangents(joint.graph)
        losses = _losses_of(tangents)
        self.losses = losses.name
        self.symbols, self.lost = _row_symbols(joint.graph, tangents, losses, self.unit)
        for node in label(joint.graph, self.symbols, tangents):
            pin(node)
        forward, backward = split()
        if writes(backward.graph):
            raise CannotCapture("its backward writes into a tensor (a hook or autograd function moves a buffer)")
        without_dead_draws(backward.graph)
        without_passed_on(backward.graph, self.losses, leaves)
        in_memory_of_their_own(backward.graph)
        backward.recompile()
        self.outputs, self._written = outputs, outputs - own
        if self.compiled is not None and not any_strides(backward):
            self.compiled.failed = "its backward depends on how tensors lie in memory (as_strided)"
        self._read(forward, backward)
        mixing = self.mixing(self.approximate)
        if mixing is not None and not self.slices(self.approximate).worth:
            raise CannotCapture(f"{mixing[0]} mixes rows, since {mixing[1]}")
        return forward, backward

    def forward(self, args: list[Any]) -> Any:
        self.runs += 1
        tape = self.current()
        if not (self.checked or (tape is not None and tape.compares)):
            raise NewTrace
        batch = 0 if self._batch_at is None else args[self._batch_at[0]].shape[self._batch_at[1]]
        # until enough runs were compared with the model, operator by operator
        compiler = self.compiled if self.checked and tape is not None else None
        results = None if compiler is None else compiler.forward(args)
        compiled = results is not None
        results = list(self._forward(args) if results is None else results)
        for at in self._copied:
            results[at] = results[at].clone()
        if tape is None:
            return results
        tape.step, tape.batch = self, batch
        tape.outputs = [weakref.ref(each) for each in results[self._written : self.outputs] if isinstance(each, Tensor)]
        tape.compiled = self.compiled if compiled else None
        if not self.checked:
            self._shown = self._places_shown(results)
        # torch before 2.13 looks for a graph of the gradient only where something saved requires one
        mark = torch.empty(0, requires_grad=True)
        mark.tape = tape  # type: ignore[attr-defined]
        for at, place in self._stashed.items():
            tape.saved[place] = results[at]
            if (place in self.given and at not in self._copied) or place in self._shown or compiled:
                tape.versions[place] = results[at]._version
            results[at] = mark
        return results

    def compared(self, again: bool) -> None:
        """Note that a run was compared with the model; ``again``: compare two runs in all, not one."""
        self._compared += 1
        self.checked = self._compared > again

    def _places_shown(self, results: list[Any]) -> set[int]:
        """Return the positions of what is saved in memory that the outputs show, where it may be written into."""
        shown = {memory_of(each) for each in results[: self.outputs] if isinstance(each, Tensor)}
        return {place for at, place in self._stashed.items() if memory_of(results[at]) in shown}

    def finish(self, run: Callable[..., Any], graph: fx.GraphModule) -> Callable[..., Any]:
        return noting_arrivals(with_second_derivatives(run, graph, self), self)

    @property
    def own_outputs(self) -> list[fx.Node]:
        """The outputs of the traced function itself: not what it writes into its inputs."""
        (out,) = self.forward_graph.graph.find_nodes(op="output")
        return [node for node in out.args[0][self._written : self.outputs] if isinstance(node, fx.Node)]

    def tape_of(self, args: Sequence[Any]) -> Tape | None:
        """Return the tape that a backward's arguments belong to; None if its forward had none."""
        return next((args[place].tape for place in self._stashed.values() if hasattr(args[place], "tape")), None)

    def backward(self, args: list[Any]) -> Any:
        tape = self.tape_of(args)
        if tape is None:
            return self._backward(args)
        found = self._run_backward(args, tape)
        return found if tape.arrivals is None else tape.arrivals.without_unasked(found, self.tangents_of)

    def _run_backward(self, args: list[Any], tape: Tape) -> Any:
        _check_unasked(tape.outputs)
        for place, version in tape.versions.items():
            if place in tape.saved and tape.saved[place]._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    "a batch, or the model's outputs, changed between forward and backward"
                )
        if not (keep := keeps_graph()):
            tape.inputs = tape.python = None
        if tape.compiled is not None and tape.late:
            found = tape.compiled.backward(args, tape, keep)
            if found is not None:
                return found
        for place in self._stashed.values():
            args[place] = tape.saved.get(place)
        kept = dict(tape.kept)
        if not keep:
            tape.saved.clear()
            tape.kept.clear()
        if tape.chosen is None:
            return self._backward(args)
        slices = self.slices(tape.approximate)
        runs = Runs(slices.upper.run, slices.lower.run, slices.beside.run, cut, put_back)
        return run_backward(self, slices, tape.chosen, args, kept, runs)

    # made once

    def _read(self, forward: fx.GraphModule, backward: fx.GraphModule) -> None:
        self.backward_graph = backward
        self.forward_graph = forward
        self._forward, self._backward = executable(forward), executable(backward)
        self.places = [node for node in backward.graph.nodes if node.op == "placeholder"]
        by_name = {node.name: place for place, node in enumerate(self.places)}
        (output,) = forward.graph.find_nodes(op="output")
        saved = list(output.args[0])[self.outputs :]
        inputs = list(forward.graph.find_nodes(op="placeholder"))
        batch = self.symbols[0]
        shapes = [tuple(map(expression_of, getattr(node.meta.get("val"), "shape", ()))) for node in inputs]
        self._batch_at = next(((at, shape.index(batch)) for at, shape in enumerate(shapes) if batch in shape), None)
        self.tangents = [place for place, node in enumerate(self.places) if "tangents" in node.name]
        self.place = {node: place for place, node in enumerate(self.places)}
        self.multiples = {place for place, node in enumerate(self.places) if self._counts_rows(node.meta.get("val"))}
        self._stashed: dict[int, int] = {}
        self.given: set[int] = set()  # positions of saved parts of the batch itself
        self.saved_at = {by_name[node.name]: at for at, node in enumerate(saved, start=self.outputs)}
        # a write into an input after the forward must not change what backward reads of it
        self._written_kinds = {_kind(node) for node in output.args[0][: self._written]}
        given = [(at, node) for at, node in enumerate(saved, self.outputs) if node in inputs]
        self._copied = [at for at, node in given if self.may_write_into(node)]
        for at, node in enumerate(saved, start=self.outputs):
            if isinstance(node.meta.get("val"), Tensor) and isinstance(_layout(node), (RowLayout, Broken)):
                self._stashed[at] = by_name[node.name]
                if node in inputs:
                    self.given.add(by_name[node.name])

    def may_write_into(self, node: fx.Node) -> bool:
        """True if an input may be one that the forward writes into."""
        return _kind(node) in self._written_kinds

    def _counts_rows(self, value: Any) -> bool:
        """True if a saved number is a multiple of the number of rows."""
        size = expression_of(value)
        return isinstance(size, sympy.Expr) and factor_of(size, self.symbols[0]) is not None

    def slices(self, approximate: bool) -> Slices:
        """Return the backward in two parts, created at the first call."""
        if approximate not in self._slices:
            self._slices[approximate] = self._split(approximate)
        return self._slices[approximate]

    def _split(self, approximate: bool) -> Slices:
        graph = self.backward_graph.graph
        given = [self.places[place] for place in self.tangents]
        tangents = {n: self._tangent(n.meta["val"], n.name == self.losses) for n in given}
        batch_norm = approximate and self.unit == "sample"
        proof = prove(graph, self.symbols, tangents, batch_norm=batch_norm, lost=self.lost)
        return split_backward(self.backward_graph, proof, self.places, self.symbols)

    def _tangent(self, value: Tensor, losses: bool) -> Layout:
        """Return where the rows of an output's gradient lie.

        Only in the losses' gradient are rows that are not kept zero. The model's outputs are detached, but the gradient
        of a tensor that the model keeps, or of a batch that the forward wrote into, depends on what follows the step.
        """
        if self.unit == "element" and losses:
            batch, tokens = self.symbols
            shape, flat = (batch, tokens - self.lost), (expression_of(value.shape[0]),)
            axes = view_axis(Axis(0), batch, shape, flat), view_axis(Axis(1, lost=self.lost), tokens, shape, flat)
            return RowLayout(axes, vanish=True)
        layout = by_shape(value, self.symbols, [])
        return RowLayout(layout.axes, vanish=losses) if isinstance(layout, RowLayout) else layout

    def kept(self, rows: Tensor, batch: int, size: int) -> KeptRows:
        """Return the rows at the given positions among ``size`` losses of the tokens of ``batch`` samples."""
        if self.unit == "sample":
            return KeptRows(rows, size)
        return KeptRows(rows, batch, size // batch, self.lost)

    def cost(self, approximate: bool) -> Cost:
        """Return the cost of a step of this trace."""
        if approximate not in self._costs:
            device = next(n.meta["val"].device for n in self.places if isinstance(n.meta.get("val"), Tensor))
            compiled = self.compiled is not None and self.compiled.failed is None
            self._costs[approximate] = cost_of_step(
                self.forward_graph.graph,
                self.backward_graph.graph,
                self.slices(approximate),
                machine_of(device),
                compiled=compiled,
                replayed=compiled and self.compiled.compiler.cuda_graphs,  # type: ignore[union-attr]
            )
        return self._costs[approximate]

    def mixing(self, approximate: bool) -> tuple[str, str] | None:
        """Return the first operator from the loss down that mixes rows, and how; None if none does."""
        proof = self.slices(approximate).proof
        node = proof.first_mixing
        if node is None:
            return None
        verdict = proof.verdicts[node]
        return verdict.unkept or place_of(node), str(verdict.reason)

    @functools.cached_property
    def tangents_of(self) -> list[frozenset[int]]:
        """On which tangents each gradient depends, by their positions among the tangents."""
        return tangents_of_each(self.backward_graph.graph, [self.places[place] for place in self.tangents])

    @functools.cached_property
    def coarse(self) -> bool:
        """True if some of the forward is computed with fewer digits than float32 has."""
        values = (node.meta.get("val") for node in self.forward_graph.graph.nodes)
        return any(isinstance(each, Tensor) and each.dtype in (torch.float16, torch.bfloat16) for each in values)

    @property
    def batch_norms(self) -> bool:
        """True if BatchNorm's backward could take its means over the kept rows."""
        return bool(self.slices(True).proof.batch_norms)


def _check_unasked(outputs: Sequence[weakref.ref[Tensor]]) -> None:
    for each in outputs:
        tensor = each()
        if tensor is not None and (tensor._backward_hooks or tensor.retains_grad):
            raise RuntimeError(
                f"expected no hook and no retain_grad() on a tensor {tuple(tensor.shape)} that the model keeps, got "
                "one: the gradient of the loss does not pass through it. Use engine='exact'."
            )


def _kind(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return (tuple(map(expression_of, value.shape)), value.dtype) if isinstance(value, Tensor) else (node,)


def _layout(node: fx.Node) -> Layout | None:
    found = node.meta.get(LAYOUT)
    return found[0] if found else None


def _after_tangents(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of a joint graph that are tangents or depend on them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and "tangents" in node.name) or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _losses_of(tangents: set[fx.Node]) -> fx.Node:
    """Return the losses' gradient: the only vector with one entry per row.

    Writes of a forward into a parameter or into the batch have a gradient too.
    """
    vectors = [n for n in tangents if n.op == "placeholder" and n.meta["val"].ndim == 1]
    counting = [n for n in vectors if not isinstance(expression_of(n.meta["val"].shape[0]), int)]
    if len(counting or vectors) != 1:
        raise CannotCapture("it returns or keeps further vectors with a gradient, so the losses cannot be identified")
    return (counting or vectors)[0]


def _row_symbols(
    graph: fx.Graph, tangents: set[fx.Node], losses: fx.Node, unit: str
) -> tuple[tuple[sympy.Symbol, ...], int]:
    """Return the symbols that count rows, from the size of the losses, a vector with a gradient.

    Returns:
        The batch size's symbol; for tokens also that of their number, and how many at the end have no loss.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)]
    size = expression_of(losses.meta["val"].shape[0])
    if unit == "element":
        shapes = [tuple(map(expression_of, n.meta["val"].shape[:2])) for n in inputs if n not in tangents]
        for batch, tokens in (shape for shape in shapes if len(shape) == 2):
            if isinstance(batch, sympy.Symbol) and isinstance(tokens, sympy.Symbol) and batch != tokens:
                counted = exact_ratio(size, batch)
                lost = None if counted is None else tokens - counted
                if lost == 0 or getattr(lost, "is_Integer", False):
                    return (batch, tokens), int(lost)  # type: ignore[arg-type]
        if fixed := next((shape[1] for shape in shapes if exact_ratio(size, shape[0]) == shape[-1] != size), None):
            raise CannotCapture(
                f"unit='element' takes tokens as rows, and its code takes their number, {fixed}, for a constant, as a "
                "recurrent layer does"
            )
        raise CannotCapture("unit='element' takes tokens as rows, and no input (B, T) has one for each loss")
    several = next((factor_of(size, each) for each in getattr(size, "free_symbols", ())), None)
    if isinstance(several, int) and several > 1:
        raise CannotCapture(
            f"its loss returns {several} values for each sample, in one dimension. Return them as (B, {several}): then "
            "their mean is the sample's loss, or each one counts with unit='element'"
        )
    if getattr(size, "free_symbols", None) and not isinstance(size, sympy.Symbol):
        raise CannotCapture(f"its losses are not one for each sample: {size} for a batch of {size.free_symbols.pop()}")
    if not isinstance(size, sympy.Symbol):
        raise OneBatchSize(
            f"its trace holds for one batch size only ({size} losses{fixed_by(losses.meta['val'], size)})"
        )
    return (size,), 0
