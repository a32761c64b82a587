"""A backward graph in two: what runs on the kept rows, and what runs on all.

The upper part, from the loss down, is proven to give the same on the kept rows; it reads saved tensors that were cut to
them. The lower part begins where an operator mixes rows: gradients that go into it are put back among zeros for the
rows that were not kept, and it runs on all rows, as in plain training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from batchtrim.engine.capture import executable
from batchtrim.engine.cost import is_costly
from batchtrim.engine.layout import Broken, Rows
from batchtrim.engine.proof import Proof

__all__ = ["Part", "Slices", "split_backward"]


@dataclass
class Part:
    """One of the two graphs: what it reads, by place among the backward's inputs or by node, and what it gives."""

    run: Callable[[list[Any]], Any]
    graph: fx.GraphModule
    inputs: list[fx.Node]
    outputs: list[fx.Node]


@dataclass
class Slices:
    """A backward graph in two parts.

    Attributes:
        upper, lower: run on the kept rows and on all.
        cuts: places of the backward's inputs that are cut, and where their rows lie. whole: places read uncut.
    """

    upper: Part
    lower: Part
    proof: Proof
    cuts: dict[int, Rows] = field(default_factory=dict)
    whole: set[int] = field(default_factory=set)

    @property
    def worth(self) -> bool:
        """True if a costly operator runs on the kept rows."""
        return any(is_costly(node) for node in self.upper.graph.graph.nodes)


def split_backward(module: fx.GraphModule, proof: Proof, places: list[fx.Node]) -> Slices:
    """Two graphs of one: what runs on the kept rows, and what runs on all."""
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    wanted = [node for node in output.args[0] if isinstance(node, fx.Node)]
    verdicts = proof.verdicts

    def on_kept(node: fx.Node) -> bool:
        verdict = verdicts[node]
        return not verdict.whole and not any(isinstance(each, Broken) for each in verdict.layouts)

    lower_needs: set[fx.Node] = set()
    frontier: list[fx.Node] = []
    stack = [node for node in wanted if not on_kept(node)]
    while stack:
        node = stack.pop()
        if node in lower_needs or (node.op == "placeholder" and verdicts[node].gradient):
            lower_needs.add(node)
            continue
        if verdicts[node].gradient and on_kept(node) and node.op != "placeholder":
            if node not in frontier:
                frontier.append(node)
            continue
        lower_needs.add(node)
        stack.extend(node.all_input_nodes)
    upper_outputs = list(dict.fromkeys([*(node for node in wanted if on_kept(node)), *frontier]))
    lower_outputs = list(dict.fromkeys(node for node in wanted if not on_kept(node)))
    upper = _extract(module, upper_outputs, set())
    lower = _extract(module, lower_outputs, set(frontier))
    cuts: dict[int, Rows] = {}
    for place, node in enumerate(places):
        layout = verdicts[node].layouts[0]
        if node in upper.inputs and isinstance(layout, Rows):
            cuts[place] = layout
    whole = {place for place, node in enumerate(places) if node in lower.inputs}
    return Slices(upper, lower, proof, cuts, whole)


def _extract(module: fx.GraphModule, outputs: list[fx.Node], given: set[fx.Node]) -> Part:
    """A graph that computes some nodes, with others given to it."""
    needed: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if node not in given:
                stack.extend(node.all_input_nodes)
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []
    for node in module.graph.nodes:
        if node in needed and (node.op == "placeholder" or node in given):
            copies[node] = new.placeholder(node.name)
            copies[node].meta = copy.copy(node.meta)
            inputs.append(node)
    for node in module.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = new.node_copy(node, lambda n: copies[n])
    new.output([copies[node] for node in outputs])
    part = fx.GraphModule(module, new)
    return Part(executable(part), part, inputs, outputs)
