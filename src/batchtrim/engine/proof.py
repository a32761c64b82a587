"""Prove from a graph which of its operators give the same result on the kept rows as on all rows.

There are two walks. :func:`label` follows rows through the forward part of a joint graph and notes in every node where
they lie. :func:`prove` walks the backward graph, which is to run on kept rows, and decides for every node whether it
may. The proof holds even if a label of the forward is wrong: saved tensors are cut along their labels, whatever they
are, and every operator of the backward must then agree with them. So the forward may mix rows if no gradient
follows.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from batchtrim.engine import rules_attention, rules_nn, rules_products, rules_shape  # noqa: F401  (they enter their rules)
from batchtrim.engine.cutting import can_be_cut
from batchtrim.engine.graphs import name_of
from batchtrim.engine.layout import Axis, Broken, Layout, Mixes, RowLayout, Whole, factor_of
from batchtrim.engine.operators import decomposed
from batchtrim.engine.rules import Call, Value, alike, apply_rule, has_rule, holds, only_dim
from batchtrim.engine.rules_attention import draws, draws_by_place
from batchtrim.engine.symbolic import expression_of

__all__ = ["LAYOUT", "NodeProof", "Proof", "by_shape", "label", "place_of", "prove"]

_UNCUT: Layout = Broken("its rows lie where they cannot be cut")
_COUNTS: Layout = Broken("it computes with the number of rows")
LAYOUT = "batchtrim_layout"  # key in a node's meta


# --- calls -----------------------------------------------------------------------------------------------------------


def _as_expressions(value: Any) -> Any:
    """Return nested arguments with symbolic numbers as expressions."""
    if isinstance(value, (list, tuple)):
        return [_as_expressions(item) for item in value]
    return expression_of(value)


def _shape(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(expression_of(size) for size in tensor.shape)


def _flat(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def make_call(func: Any, args: Sequence[Any], kwargs: dict[str, Any], outputs: Any, symbols: Any, see: Any) -> Call:
    """Return a call with its arguments by name; ``see`` converts each stand-in for a tensor to a :class:`Value`."""
    bound: dict[str, Any] = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            given = args[i]
        elif argument.name in kwargs:
            given = kwargs[argument.name]
        else:
            given = argument.default_value
        bound[argument.name] = [see(item) for item in given] if isinstance(given, (list, tuple)) else see(given)
    values = [Value(_shape(out), dtype=out.dtype) if isinstance(out, Tensor) else None for out in _flat(outputs)]
    return Call(func, bound, values, symbols)


def layouts_of(call: Call, args: Sequence[Any], kwargs: dict[str, Any], layouts: Any) -> list[Layout]:
    """Return layouts by the operator's rule, or by the rules of the operators that it decomposes into."""
    if has_rule(call.func) or not any(isinstance(value.layout, RowLayout) for value in call.values):
        return apply_rule(call)

    def inner(func: Any, args: Any, kwargs: Any, outputs: Any, known: Any) -> list[Layout]:
        def see(item: Any) -> Any:
            if isinstance(item, Tensor):
                return Value(_shape(item), known(item), item.dtype)
            return _as_expressions(item)

        if draws(func) or draws_by_place(func, args, kwargs):
            raise Mixes("it draws random numbers")
        if func._schema.is_mutable:
            raise Mixes("it is made of operators that write in place")
        return layouts_of(make_call(func, args, kwargs, outputs, call.symbols, see), args, kwargs, known)

    found = decomposed(call.func, args, kwargs, layouts, inner)
    if found is None:
        return apply_rule(call)  # it raises the error
    unknown = Broken("no rule tells what it does with rows")
    pairs = zip(found, call.outputs, strict=True)
    return [Whole() if output is None else layout or unknown for layout, output in pairs]


class _Walk:
    """The layouts of the nodes seen so far."""

    def __init__(self, symbols: tuple[sympy.Symbol, ...], lost: int = 0) -> None:
        self.symbols = symbols
        self.lost = lost
        self.layouts: dict[fx.Node, list[Layout]] = {}

    def layout(self, node: fx.Node) -> Layout:
        """Return the layout of a node's first output; whole if none was set."""
        found = self.layouts.get(node)
        return Whole() if not found else found[0]

    def lacks(self, layouts: Sequence[Layout]) -> bool:
        """True if a layout has fewer tokens than there are losses: a kept token may be missing."""
        axes = [axis for each in layouts if isinstance(each, RowLayout) for axis in each.axes[1:] if axis is not None]
        return any(axis.lost > self.lost for axis in axes)

    def see(self, item: Any) -> Any:
        """Return what a rule gets for an argument of a call: a tensor's ``Value``, or sizes as expressions."""
        if not isinstance(item, fx.Node):
            return _as_expressions(item)
        value = item.meta.get("val")
        if isinstance(value, Tensor):
            return Value(_shape(value), self.layout(item), value.dtype)
        return _as_expressions(value)

    def call(self, node: fx.Node) -> list[Layout]:
        """Return what the rule of a node's operator says.

        Raises:
            Mixes: see :func:`batchtrim.engine.rules.apply_rule`.
        """
        outputs = node.meta.get("val")
        for each in node.all_input_nodes:  # a number read from a tensor has no layout
            if isinstance(layout := self.layout(each), Broken):
                raise Mixes(layout.reason)
        if not isinstance(node.target, torch._ops.OpOverload):
            if not any(isinstance(each, Tensor) for each in pytree.tree_leaves(outputs)):
                return [Whole()]
            raise Mixes("no rule tells what it does with rows")
        call = make_call(node.target, node.args, node.kwargs, outputs, self.symbols, self.see)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        known: dict[int, Layout] = {}
        for each in node.all_input_nodes:
            value = each.meta.get("val")
            if isinstance(value, Tensor) and known.setdefault(id(value), self.layout(each)) != self.layout(each):
                known[id(value)] = Broken("one tensor is used in it as two")
        return layouts_of(call, args, kwargs, lambda tensor: known.get(id(tensor), Whole()))


def _getitem(walk: _Walk, node: fx.Node) -> list[Layout] | None:
    if node.target is not operator.getitem:
        return None
    source, at = node.args
    return [walk.layouts[source][at]]  # type: ignore[index]


# --- forward ---------------------------------------------------------------------------------------------------------


def label(graph: fx.Graph, symbols: tuple[sympy.Symbol, ...], skip: set[fx.Node]) -> dict[fx.Node, str]:
    """Store in the meta of every node where its rows lie.

    Args:
        graph: a joint graph; ``skip`` holds its nodes that belong to backward.

    Returns:
        The nodes that cannot be recomputed from the kept rows alone and so must be saved, each with its reason.
    """
    walk = _Walk(symbols)
    pinned: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node in skip or node.op == "output":
            continue
        value = node.meta.get("val")
        if node.op != "call_function":
            layouts = [by_shape(value, symbols, [])]
        elif (layouts := _getitem(walk, node)) is not None:
            if node.args[0] in pinned:
                pinned[node] = pinned[node.args[0]]
        else:
            try:
                layouts = walk.call(node)
                if draws(node.target) or draws_by_place(node.target, node.args, node.kwargs):
                    pinned[node] = "it draws random numbers"
            except Mixes as mixes:
                near = [walk.see(each) for each in node.all_input_nodes]
                pinned[node] = f"{mixes} ({place_of(node)})"
                layouts = [by_shape(each, symbols, near) for each in _flat(value)]
                layouts = [Broken(pinned[node]) if isinstance(each, Broken) else each for each in layouts]
        walk.layouts[node] = layouts
        node.meta[LAYOUT] = layouts
    return pinned


def by_shape(value: Any, symbols: Sequence[sympy.Symbol], near: Sequence[Any]) -> Layout:
    """Return a layout if no rule gives one: that of an operand of the same shape, or the only possible one."""
    if not isinstance(value, Tensor):
        return Whole()
    shape = _shape(value)
    if not holds(shape, symbols):
        return Whole()
    for each in near:
        if (
            isinstance(each, Value)
            and each.shape == shape
            and isinstance(each.layout, RowLayout)
            and not alike(each.layout)
        ):
            return replace(each.layout, vanish=False, iota=False)
    axes: list[Axis | None] = []
    for symbol in symbols:
        if not holds(shape, (symbol,)):
            axes.append(None)
            continue
        try:
            axis = only_dim(shape, symbol, symbols)
        except Mixes as mixes:
            return Broken(str(mixes))
        if axis.outer is None:
            return Broken("nothing tells where its rows are")
        axes.append(axis)
    return RowLayout(tuple(axes))


# --- backward --------------------------------------------------------------------------------------------------------


@dataclass
class NodeProof:
    """The proof of one node of a backward graph.

    Attributes:
        gradient: True if it depends on the losses' gradient.
        layouts: of its outputs, on the kept rows.
        whole: True if it has to run on all rows.
        reason: why, if the node is the first such node on its path.
        unkept: the operator that gives a gradient to rows that are not kept, if the node's rows have one. On the
            kept rows it is right; operators that sum over rows, or run on all of them, have to start above it.
        all_rows: True if it keeps rows apart but has to run on all of them: its gradients are put back before it, and
            its results are cut after it.
    """

    gradient: bool
    layouts: list[Layout]
    whole: bool = False
    reason: str | None = None
    unkept: str | None = None
    all_rows: bool = False

    @property
    def on_kept(self) -> bool:
        """True if it runs on the kept rows."""
        return not self.whole and not any(isinstance(each, Broken) for each in self.layouts)

    @property
    def vanishes(self) -> bool:
        """True if the result on the kept rows is complete, since its other rows are zero."""
        return self.on_kept and not any(isinstance(each, RowLayout) and not each.vanish for each in self.layouts)


@dataclass
class Proof:
    """The proofs of all nodes, and the approximations that they rely on."""

    verdicts: dict[fx.Node, NodeProof] = field(default_factory=dict)
    batch_norms: list[fx.Node] = field(default_factory=list)

    @property
    def first_mixing(self) -> fx.Node | None:
        """The first operator from the loss down that has to run on all rows."""
        return next((node for node, verdict in self.verdicts.items() if verdict.reason is not None), None)


# The outputs that a trace can see into are detached: those in tuples, lists, mappings, named tuples and dataclasses.
_OUTLIVES = (
    "a tensor that outlives the forward (kept by the model, returned in an object of its own class, or written into "
    "the batch)"
)


def prove(
    graph: fx.Graph,
    symbols: tuple[sympy.Symbol, ...],
    tangents: dict[fx.Node, Layout],
    *,
    batch_norm: bool,
    lost: int = 0,
) -> Proof:
    """Walk a backward graph.

    Args:
        graph: its placeholders labelled by :func:`label`.
        tangents: the placeholders of the outputs' gradients, and where their rows lie.
        batch_norm: True if BatchNorm's backward may take its means over the kept rows, which is not exact.
        lost: how many tokens at the end of each sample have no loss.
    """
    proof, walk = Proof(), _Walk(symbols, lost)
    for node in graph.nodes:
        if node.op == "placeholder":
            layouts = [tangents[node]] if node in tangents else node.meta.get(LAYOUT, [Whole()])
            if walk.lacks(layouts) or any(
                isinstance(each, RowLayout) and not can_be_cut(each, len(symbols)) for each in layouts
            ):
                layouts = [_UNCUT]
            if _counts_otherwise(node, symbols):
                layouts = [_COUNTS]
            verdict = NodeProof(node in tangents, layouts)
            if verdict.gradient and not verdict.vanishes:
                verdict.unkept = _OUTLIVES
        elif node.op == "call_function":
            verdict = _prove_node(node, walk, proof, batch_norm)
        elif node.op == "get_attr":  # a constant
            verdict = NodeProof(False, [Whole()])
        else:
            continue
        walk.layouts[node] = verdict.layouts
        proof.verdicts[node] = verdict
    return proof


def _counts_otherwise(node: fx.Node, symbols: tuple[sympy.Symbol, ...]) -> bool:
    """True for a saved size that depends on the number of samples and is no multiple of it: none is known for k."""
    size = _as_expressions(node.meta.get("val"))
    return len(symbols) == 1 and holds(size, symbols) and factor_of(size, symbols[0]) is None


def _prove_node(node: fx.Node, walk: _Walk, proof: Proof, batch_norm: bool) -> NodeProof:
    sources = [proof.verdicts[each] for each in node.all_input_nodes if each in proof.verdicts]
    gradient = any(source.gradient for source in sources)
    below = Broken("what it needs has to run on all rows")
    count = len(_flat(node.meta.get("val")))
    if any(source.whole for source in sources):
        return NodeProof(gradient, [below] * count, whole=gradient)
    item = _getitem(walk, node)
    if item is not None:
        return NodeProof(gradient, item, unkept=sources[0].unkept)
    try:
        if draws(node.target):
            raise Mixes("it draws random numbers again")
        layouts = _kept_batch_norm(node, walk, proof) if batch_norm else None
        layouts = walk.call(node) if layouts is None else layouts
        all_rows = draws_by_place(node.target, node.args, node.kwargs)
        if all_rows and not (len(walk.symbols) == 1 and all(each.vanishes for each in sources if each.gradient)):
            raise Mixes("it draws its dropout again from a seed for all rows")
        if walk.lacks(layouts):
            raise Mixes("it takes some rows and leaves others")
        gradient = gradient and not _fresh(node)
        if gradient and any(
            isinstance(each, RowLayout) and not can_be_cut(each, len(walk.symbols)) for each in layouts
        ):
            raise Mixes("it puts rows where they cannot be put back")
    except Mixes as mixes:
        if gradient:
            unkept = next((source.unkept for source in sources if source.unkept is not None), None)
            reason = str(mixes)
            if unkept is not None:
                reason = f"it gives a gradient to rows that are not kept, and of {place_of(node)}, {mixes}"
            return NodeProof(True, [Broken(reason)] * count, whole=True, reason=reason, unkept=unkept)
        return NodeProof(False, [Broken(f"{mixes} ({place_of(node)})")] * count)
    unkept = None
    if gradient and any(isinstance(each, RowLayout) and not each.vanish for each in layouts):
        unkept = next((source.unkept for source in sources if source.unkept is not None), place_of(node))
    return NodeProof(gradient, layouts, unkept=unkept, all_rows=all_rows)


def _fresh(node: fx.Node) -> bool:
    """True if an operator reads nothing but the shape of its operand."""
    name = name_of(node.target)
    return name.startswith("new_") or name in ("zeros_like", "ones_like", "empty_like", "full_like")


def _kept_batch_norm(node: fx.Node, walk: _Walk, proof: Proof) -> list[Layout] | None:
    """Return the layouts of BatchNorm's backward with means over the kept rows and the batch's own statistics."""
    if name_of(node.target) not in rules_nn.BATCH_NORM_BACKWARD:
        return None
    gradient, x = walk.see(node.args[0]), walk.see(node.args[1])
    if not (isinstance(x.layout, RowLayout) and isinstance(gradient.layout, RowLayout)) or 1 in x.layout.dims:
        return None
    if gradient.layout.axes != x.layout.axes or not gradient.zero:
        return None
    with contextlib.suppress(Mixes):
        return walk.call(node)  # in evaluation mode it takes no means
    proof.batch_norms.append(node)
    return [gradient.layout, Whole(), Whole()]


def place_of(node: fx.Node) -> str:
    """Return the operator and its module: ``aten.mean in layers.3 (Attention)``."""
    name = str(node.target).removesuffix(".default")
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    for path, kind in reversed(list(stack.values())):
        kind = kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1]
        path = path.split("model'].", 1)[-1] if "model']." in path else path.rsplit("].", 1)[-1]
        path = "the model" if path == "L['model']" else path
        return f"{name} in {path} ({kind})"
    return name
