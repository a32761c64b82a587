"""Graphs as functions, and what is changed in them before they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

__all__ = ["any_strides", "boxed", "executable", "graph_copy", "without_dead_draws"]


def boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Return a function of a list of inputs, marked as one that empties it."""

    def run(args: list[Any]) -> Any:
        return function(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def graph_copy(graph: fx.GraphModule) -> fx.Graph:
    """Return a copy of a module's graph, to be changed."""
    own = fx.Graph()
    own.output(own.graph_copy(graph.graph, {}))
    return own


def executable(graph: fx.GraphModule) -> Callable[[list[Any]], Any]:
    """Return a graph as a function of a list of inputs, which it empties so that each is freed after its last use.

    Views become reshapes: on kept rows a value may have another memory layout than the traced one.
    """
    own = graph_copy(graph)
    for node in own.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    _take_from_list(own)
    return boxed(fx.GraphModule(graph, own).forward)


def _take_from_list(graph: fx.Graph) -> None:
    """Replace all inputs by one list, from which each is taken when it is needed."""
    inputs = list(graph.find_nodes(op="placeholder"))
    with graph.inserting_before():
        args = graph.placeholder("args")
    for at, node in enumerate(inputs):
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_function(_take, (args, at)))
        graph.erase_node(node)


def _take(args: list[Any], at: int) -> Any:
    taken, args[at] = args[at], None
    return taken


def any_strides(graph: fx.GraphModule) -> bool:
    """Make a graph correct for inputs of other strides than the traced ones; return False if that is impossible."""
    views = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in views:
            node.target = torch.ops.aten.reshape.default
        elif node.op == "call_function" and "as_strided" in str(node.target):
            return False
    graph.recompile()
    return True


def without_dead_draws(graph: fx.Graph) -> None:
    """Remove what nobody reads from a backward graph, random operators of the forward too."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
