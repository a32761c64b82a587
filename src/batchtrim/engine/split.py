"""Split a backward graph in two: the upper part runs on the kept rows, the lower part on all rows.

The upper part, from the loss down, is proven to give the same result on the kept rows; it reads saved tensors cut to
them. The lower part begins where an operator mixes rows: gradients that go into it are put back among zeros for the
other rows, and it runs on all rows, as in plain training. An operator of the upper part may also have to run
on all rows, since it draws its dropout again by the position of a row: see :class:`Crossing`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from batchtrim.engine.capture import CannotCapture
from batchtrim.engine.cost import is_costly
from batchtrim.engine.graphs import executable, name_of
from batchtrim.engine.layout import Layout, RowLayout
from batchtrim.engine.proof import Proof
from batchtrim.engine.symbolic import expression_of

__all__ = ["Crossing", "Part", "Slices", "split_backward"]


@dataclass(frozen=True)
class Crossing:
    """An operator among kept rows that runs on all rows.

    Attributes:
        gradients: the layouts of its operands that have a gradient, which are put back.
        results: the layouts of its results, which are cut.
    """

    gradients: list[Layout]
    results: list[Layout]


@dataclass
class Part:
    """One of the graphs: its nodes, inputs and outputs, and its sizes as functions of k.

    Attributes:
        beside: nodes whose values on all rows are further inputs, for what crosses to all rows.
        crossings: those operators, each with its own input that puts back and cuts.
    """

    run: Callable[[list[Any]], Any]
    graph: fx.GraphModule
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    nodes: set[fx.Node]
    beside: list[fx.Node] = field(default_factory=list)
    crossings: dict[fx.Node, Crossing] = field(default_factory=dict)
    sizes: dict[fx.Node, Callable[[int], int]] = field(default_factory=dict)


@dataclass
class Slices:
    """A backward graph in two parts.

    Attributes:
        upper, lower: run on the kept rows and on all.
        beside: computes from saved tensors what the upper part reads of all rows.
        cuts: positions of the backward's inputs that are cut, and where their rows lie.
        whole: positions read uncut.
    """

    upper: Part
    lower: Part
    beside: Part
    proof: Proof
    cuts: dict[int, RowLayout] = field(default_factory=dict)
    whole: set[int] = field(default_factory=set)

    @property
    def worth(self) -> bool:
        """True if a costly operator runs on the kept rows."""
        return any(is_costly(node) for node in self.upper.nodes.difference(self.upper.crossings))


def split_backward(
    module: fx.GraphModule, proof: Proof, places: list[fx.Node], symbols: tuple[sympy.Symbol, ...]
) -> Slices:
    """Split one graph into the part that runs on the kept rows and the part that runs on all."""
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    wanted = [node for node in output.args[0] if isinstance(node, fx.Node)]
    verdicts = proof.verdicts

    def at_frontier(node: fx.Node) -> bool:
        """True if the lower part can take a result from the upper one; otherwise it recomputes it."""
        tensor = node.op != "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
        return tensor and verdicts[node].gradient and verdicts[node].vanishes

    lower_needs: set[fx.Node] = set()
    frontier: list[fx.Node] = []
    stack = [node for node in wanted if not verdicts[node].vanishes]
    while stack:
        node = stack.pop()
        if at_frontier(node):
            if node not in frontier:
                frontier.append(node)
        elif node not in lower_needs:
            lower_needs.add(node)
            stack.extend(node.all_input_nodes)
    upper_outputs = list(dict.fromkeys([*(node for node in wanted if verdicts[node].vanishes), *frontier]))
    lower_outputs = list(dict.fromkeys(node for node in wanted if not verdicts[node].vanishes))
    sizes, same = (_kept_sizes(graph, symbols), _cut_by_slices(proof)) if len(symbols) > 1 else ({}, set())
    upper = _extract(module, upper_outputs, set(sizes), same, proof)
    upper.sizes = {node: each for node, each in sizes.items() if each is not None}
    for node in upper.inputs:
        if node in sizes and sizes[node] is None:
            raise CannotCapture(f"it has a size, {node.meta['val']}, that does not exist for kept tokens alone")
    lower = _extract(module, lower_outputs, set(frontier))
    beside = _extract(module, upper.beside)
    cuts: dict[int, RowLayout] = {}
    for place, node in enumerate(places):
        layout = verdicts[node].layouts[0]
        if node in upper.inputs and isinstance(layout, RowLayout):
            cuts[place] = layout
    whole = {place for place, node in enumerate(places) if node in lower.inputs or node in beside.inputs}
    return Slices(upper, lower, beside, proof, cuts, whole)


def _kept_sizes(graph: fx.Graph, symbols: tuple[sympy.Symbol, ...]) -> dict[fx.Node, Callable[[int], int] | None]:
    """Return every symbolic size for k samples of one token each, None where it does not exist."""
    sizes: dict[fx.Node, Callable[[int], int] | None] = {}
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), torch.SymInt):
            sizes[node] = _kept_size(sympy.factor(expression_of(node.meta["val"])), symbols)
    return sizes


def _kept_size(size: Any, symbols: tuple[sympy.Symbol, ...]) -> Callable[[int], int] | None:
    """Return ``c * k`` for ``c * batch * (tokens - lost)``, and likewise for either factor alone; None for others."""
    batch, tokens = symbols
    factor, rows = 1, False
    for each in sympy.Mul.make_args(sympy.sympify(size)):
        if each == batch:
            rows = True
        elif each.is_Integer:
            factor *= int(each)
        elif not (each == tokens or (each.free_symbols == {tokens} and (each - tokens).is_Integer)):
            return None
    return (lambda k: factor * k) if rows else (lambda k: factor)


def _cut_by_slices(proof: Proof) -> set[fx.Node]:
    """Return the slices that cut tokens off the end, or put them back; no kept token lies there."""
    found = set()
    for node, verdict in proof.verdicts.items():
        if name_of(node.target) in ("slice", "slice_backward"):
            before, after = proof.verdicts[node.args[0]].layouts[0], verdict.layouts[0]  # type: ignore[index]
            if isinstance(before, RowLayout) and isinstance(after, RowLayout) and before.axes != after.axes:
                found.add(node)
    return found


def _extract(
    module: fx.GraphModule,
    outputs: list[fx.Node],
    given: Collection[fx.Node] = (),
    same: Collection[fx.Node] = (),
    proof: Proof | None = None,
) -> Part:
    """Return a graph that computes some nodes from given ones.

    Args:
        same: nodes that are replaced by their operand.
        proof: says which operators cross to all rows, if any may.
    """
    verdicts = {} if proof is None else proof.verdicts
    needed: set[fx.Node] = set()
    crossings: dict[fx.Node, Crossing] = {}
    beside: dict[fx.Node, fx.Node] = {}
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        sources = [] if node in given else node.all_input_nodes
        if node in verdicts and verdicts[node].all_rows:
            beside |= {each: each for each in sources if not verdicts[each].gradient}
            sources = [each for each in sources if verdicts[each].gradient]
            crossings[node] = Crossing([verdicts[each].layouts[0] for each in sources], verdicts[node].layouts)
        stack.extend(sources)
    new = fx.Graph()
    inputs = [n for n in module.graph.nodes if n in needed and (n.op == "placeholder" or n in given)]
    copies = {node: _placeholder(new, node, node.name) for node in inputs}
    whole = {node: _placeholder(new, node, f"{node.name}_of_all") for node in beside}
    crosses = {node: new.placeholder(f"{node.name}_crosses") for node in crossings}
    for node in module.graph.nodes:
        if node not in needed or node in copies:
            continue
        if node in same:
            copies[node] = copies[node.args[0]]  # type: ignore[index]
        elif node in crossings:
            copies[node] = _crossed(new, node, crosses[node], copies, whole)
        else:
            copies[node] = new.node_copy(node, lambda n: copies[n])
    new.output([copies[node] for node in outputs])
    part = fx.GraphModule(module, new)
    nodes = needed.difference(inputs)
    return Part(executable(part), part, inputs, outputs, nodes, list(beside), crossings)


def _placeholder(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    made = graph.placeholder(name)
    made.meta = copy.copy(node.meta)
    return made


def _crossed(
    graph: fx.Graph, node: fx.Node, crosses: fx.Node, copies: dict[fx.Node, fx.Node], whole: dict[fx.Node, fx.Node]
) -> fx.Node:
    """Copy an operator that runs on all rows, between one that puts its gradients back and one that cuts."""
    gradients = [each for each in node.all_input_nodes if each not in whole]

    def on_all_rows(source: fx.Node) -> fx.Node:
        if source in whole:
            return whole[source]
        put_back = graph.call_function(_put_back, (crosses, copies[source], gradients.index(source)))
        put_back.meta = copy.copy(source.meta)
        return put_back

    return graph.call_function(_cut, (crosses, graph.node_copy(node, on_all_rows)))


def _put_back(crosses: Any, value: Any, at: int) -> Any:
    return crosses.put_back(value, at)


def _cut(crosses: Any, results: Any) -> Any:
    return crosses.cut(results)
