"""Turn graphs into functions, and transform them before they run."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = [
    "FROM_PYTHON",
    "any_strides",
    "boxed",
    "executable",
    "graph_copy",
    "hinted",
    "in_memory_of_their_own",
    "in_traced_order",
    "name_of",
    "pin",
    "with_gradients",
    "without_dead_draws",
    "without_passed_on",
    "writes",
]


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


# The same operators as functions of torch, which take half as long to call. A small network's step is mostly calls.
_aten = torch.ops.aten
FROM_PYTHON: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: torch.add,
    _aten.addmm.default: torch.addmm,
    _aten.bmm.default: torch.bmm,
    _aten.clone.default: torch.clone,
    _aten.convolution.default: torch.convolution,
    _aten.detach.default: torch.detach,
    _aten.expand.default: Tensor.expand,
    _aten.mm.default: torch.mm,
    _aten.mul.Tensor: torch.mul,
    _aten.native_dropout.default: torch.native_dropout,
    _aten.native_group_norm.default: torch.native_group_norm,
    _aten.native_layer_norm.default: torch.native_layer_norm,
    _aten.permute.default: torch.permute,
    _aten.select.int: torch.select,
    _aten.sum.dim_IntList: torch.sum,
    _aten.t.default: torch.t,
    _aten.transpose.int: torch.transpose,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.view.default: torch.reshape,
}


def executable(graph: fx.GraphModule) -> Callable[[list[Any]], Any]:
    """Return a graph as a function of a list of inputs, which it empties so that each is freed after its last use.

    Views become reshapes: on kept rows a value may have another memory layout than the traced one.
    """
    own = graph_copy(graph)
    in_traced_order(own)
    _without_double_transposes(own)
    for node in own.nodes:
        node.target = FROM_PYTHON.get(node.target, node.target)
    _take_from_list(own)
    return boxed(fx.GraphModule(graph, own).forward)


def _without_double_transposes(graph: fx.Graph) -> None:
    """Read ``x`` for ``x.t().t()``, as gradients of weights are traced; no output becomes an input or another one."""
    transpose = torch.ops.aten.t.default
    (output,) = graph.find_nodes(op="output")
    taken = {*graph.find_nodes(op="placeholder"), *output.all_input_nodes}
    for node in graph.find_nodes(op="call_function", target=transpose):
        before = node.args[0]
        if before.target is transpose:
            source = before.args[0]
            node.replace_all_uses_with(source, lambda user, source=source: user is not output or source not in taken)
            taken.update(output.all_input_nodes)
    graph.eliminate_dead_code(lambda node: node.target is not transpose)


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


def writes(graph: fx.Graph) -> bool:
    """True if an operator of a graph writes into one of its inputs."""
    return any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in graph.nodes)


def without_dead_draws(graph: fx.Graph) -> None:
    """Remove unused nodes from a backward graph, including random operators of the forward."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


_OF_TORCH = ("aten", "prims")


def name_of(func: Any) -> str:
    """Return an operator's name: ``mm`` of ``aten.mm.default``; ``own::mm`` of a library's, which may do anything."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return str(func)
    space, _, name = schema.name.rpartition("::")
    return name if space in _OF_TORCH else schema.name


def hinted(size: Any) -> int:
    """Return a size as it is in the traced batch; one that depends on values (of nonzero) counts as one."""
    return int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)


def pin(node: fx.Node) -> None:
    """Tell the partitioner to save a node's value rather than recompute it."""
    from torch.utils.checkpoint import CheckpointPolicy

    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def without_passed_on(graph: fx.Graph, losses: str, leaves: Sequence[bool]) -> None:
    """Give no gradient to a leaf that the forward only writes into: a trace would give it that of its new value.

    A leaf is written into without a graph. A tensor with a graph (a batch from another network) does get that gradient.
    """
    (output,) = graph.find_nodes(op="output")
    if len(output.args[0]) != len(leaves):
        return
    passed_on = {n for n in graph.find_nodes(op="placeholder") if "tangents" in n.name and n.name != losses}
    pairs = zip(output.args[0], leaves, strict=True)
    output.args = ([None if leaf and each in passed_on else each for each, leaf in pairs],)


def in_memory_of_their_own(graph: fx.Graph) -> None:
    """Copy each gradient that is a view of another one: what changes one in place, as clipping does, would change both.

    In a plain step autograd copies it. It takes what a trace returns for new.
    """
    (output,) = graph.find_nodes(op="output")
    gradients: list[Any] = list(output.args[0])
    taken: set[fx.Node] = set()
    for at, node in enumerate(gradients):
        if isinstance(node, fx.Node):
            source = _viewed(node)
            if source in taken or source.op != "call_function":
                with graph.inserting_before(output):
                    gradients[at] = graph.call_function(torch.ops.aten.clone.default, (node,))
                gradients[at].meta = copy.copy(node.meta)
            taken.add(source)
    output.args = (gradients,)


def _viewed(node: Any) -> Any:
    """Return the node whose memory a node shows."""
    made = node.args[0] if node.target is operator.getitem else node
    schema = getattr(made.target, "_schema", None)
    views = schema is not None and schema.arguments and schema.arguments[0].alias_info is not None
    if not views and name_of(made.target) != "_unsafe_view":
        return node
    return _viewed(made.args[0])


def with_gradients(graph: fx.GraphModule) -> fx.GraphModule:
    """Replace a function in a graph of torch.compile's front end whose gradient torch can trace for one size only.

    That of ``F.affine_grid``, in spatial transformers, takes sizes as numbers; those of its decomposition do not.
    """
    for node in graph.graph.find_nodes(op="call_function", target=torch.nn.functional.affine_grid):
        node.target = _affine_grid
    graph.recompile()
    return graph


def _affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Tensor:
    from torch._decomp import decomposition_table as table

    return table[torch.ops.aten.affine_grid_generator.default](theta, size, bool(align_corners))


# --- cuDNN's attention ------------------------------------------------------------------------------------------------


def in_traced_order(graph: fx.Graph) -> None:
    """Give cuDNN's attention its gradient and its output in the order of dimensions that they were traced with.

    It reuses what it planned for other tensors of the same sizes, in whatever order those lay, and then computes
    something else (torch 2.11 with cuDNN 9). Rows that are taken or put back may lie in another order than in a plain
    step.
    """
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
    for node in graph.find_nodes(op="call_function", target=backward):
        orders = [_order(node.args[at].meta["val"]) for at in (0, 4)]
        node.target, node.args = _cudnn_backward, (orders, *node.args)


def _cudnn_backward(
    orders: Sequence[Sequence[int]], gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    gradient, out = _ordered(gradient, orders[0]), _ordered(out, orders[1])
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
    return backward(gradient, query, key, value, out, *args, **kwargs)


def _order(traced: Tensor) -> list[int]:
    """Return the dimensions of a traced tensor from the slowest to the fastest in memory."""
    strides = [hinted(each) for each in traced.stride()]
    return sorted(range(traced.ndim), key=lambda dim: (-strides[dim], dim))


def _ordered(tensor: Tensor, order: Sequence[int]) -> Tensor:
    return tensor.permute(*order).contiguous().permute([order.index(dim) for dim in range(tensor.ndim)])
