"""Find side effects that an activation checkpoint repeats in backward and a trace does not.

Backward runs a checkpointed part of the forward once more. What that part writes into a buffer is then written twice,
and what it reads there is another value the second time. A trace runs it once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from batchtrim.engine.writes import memory_of

__all__ = ["done_again"]

_WRITING = ("setitem", "iadd", "isub", "imul", "itruediv", "ipow")  # further ones end with an underscore
# the argument by which a function writes its running statistics: its name and its position
_NORMS = {"batch_norm": ("training", 5), "instance_norm": ("use_input_stats", 5)}
_DRAWING = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout",
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial",
    "normal", "uniform", "exponential", "poisson", "rrelu", "gumbel_softmax", "scaled_dot_product_attention",
}  # fmt: skip


def done_again(graph: fx.GraphModule) -> str | None:
    """Return the side effect that a checkpoint in a graph of torch.compile's front end repeats, or None."""
    for node in graph.graph.find_nodes(op="get_attr"):
        body = getattr(graph, str(node.target), None)
        if not isinstance(body, fx.GraphModule):
            continue
        found = done_again(body)
        for user in node.users:
            if found is None and "activation_checkpoint" in str(user.target):
                redrawn = user.kwargs.get("preserve_rng_state") is False
                found = _in_body(body.graph, redrawn)
        if found is not None:
            return found
    return None


def _in_body(graph: fx.Graph, redrawn: bool) -> str | None:
    outside = {_storage(node) for node in graph.find_nodes(op="placeholder")} - {None}
    named = [(_name(node), node) for node in graph.nodes]
    for name, node in named:
        if _updates_statistics(node, name):
            return f"{name} in a checkpoint updates its running statistics, and again in backward"
    for name, node in named:
        writes = name in _WRITING or (name.endswith("_") and not name.endswith("__"))
        if writes and node.args and isinstance(node.args[0], fx.Node) and _storage(node.args[0]) in outside:
            return f"{name} in a checkpoint writes into a tensor from outside of it, and again in backward"
        if redrawn and name.rstrip("_") in _DRAWING:
            return f"{name} in a checkpoint with preserve_rng_state=False draws other numbers in backward"
    return None


def _name(node: fx.Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def _storage(node: fx.Node) -> Any:
    value = node.meta.get("example_value")
    return memory_of(value) if isinstance(value, Tensor) else None


def _updates_statistics(node: fx.Node, name: str) -> bool:
    if node.op != "call_function" or name not in _NORMS:
        return False
    keyword, at = _NORMS[name]
    training = node.args[at] if len(node.args) > at else node.kwargs.get(keyword, name == "instance_norm")
    mean = node.args[1] if len(node.args) > 1 else node.kwargs.get("running_mean")
    return bool(training) and mean is not None
