"""Give no gradient to what depends on none that arrives in backward, as autograd does. A trace alone gives zeros.

A model may keep a tensor of its forward, which the loss of some steps leaves out. Weight decay and momentum move a
parameter with a gradient of zeros, and none without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from batchtrim.engine.second_derivatives import function_of

if TYPE_CHECKING:
    from batchtrim.engine.sliced import SlicedStep

__all__ = ["Arrivals", "noting_arrivals", "tangents_of_each"]


class Arrivals:
    """Which gradients have arrived in the backward that runs.

    Attributes:
        inputs: those of the traced function that require a gradient, None for others. One with hooks gets its zeros,
            since a hook expects a tensor.
        slots, bases: where among all gradients of the trace's node those of its tangents are, and how many at the end.
        arrived: the positions of tangents; None before backward.
    """

    def __init__(self, inputs: Sequence[Any], slots: Sequence[int], bases: int) -> None:
        self.inputs = [each if isinstance(each, Tensor) and each.requires_grad else None for each in inputs]
        self.slots, self.bases = slots, bases
        self.arrived: frozenset[int] | None = None

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        """Note them: a hook of the trace's node, which sees them before zeros replace those that are missing."""
        slots = (*self.slots, *range(len(gradients) - self.bases, len(gradients)))
        self.arrived = frozenset(at for at, slot in enumerate(slots) if gradients[slot] is not None)

    def without_unasked(self, found: Sequence[Any], tangents: Sequence[frozenset[int]]) -> list[Any]:
        """Return the gradients, None for each that depends on none that arrived."""
        inputs = [*[None] * (len(found) - len(self.inputs)), *self.inputs]  # constants come first in a trace
        return [
            None if needed and self.arrived is not None and not needed & self.arrived and not _has_hooks(own) else each
            for each, needed, own in zip(found, tangents, inputs, strict=True)
        ]


def _has_hooks(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def noting_arrivals(run: Callable[..., Any], step: SlicedStep) -> Callable[..., Any]:
    """Return a traced function that has its tape note in backward which gradients arrive.

    It does not for a trace that writes into a tensor with a gradient, whose tangents are not those of its outputs; nor
    for a compiled model, for which torch gives zeros too.
    """
    if len(step.tangents) == 1 or step.compiled is not None:
        return run

    def call(*args: Any) -> Any:
        found = run(*args)
        tape, function = step.current(), function_of(found)
        if tape is not None and tape.step is step and function is not None:
            own = {each.output_nr: each.grad_fn for each in found if _made_by(function, each)}
            bases = function.metadata.num_intermediate_bases
            if len(own) + bases == len(step.tangents):
                tape.arrivals = Arrivals(args, sorted(own), bases)
                next(iter(own.values())).register_prehook(tape.arrivals)
        return found

    return call


def _made_by(function: Any, each: Any) -> bool:
    return isinstance(each, Tensor) and getattr(each.grad_fn, "_forward_cls", None) is function


def tangents_of_each(backward: fx.Graph, tangents: Sequence[fx.Node]) -> list[frozenset[int]]:
    """Return on which tangents each gradient of a backward graph depends, by their positions."""
    of: dict[fx.Node, frozenset[int]] = {}
    for node in backward.nodes:
        own = frozenset([tangents.index(node)]) if node in tangents else frozenset()
        of[node] = own.union(*(of[each] for each in node.all_input_nodes))
    (output,) = backward.find_nodes(op="output")
    return [of[each] if isinstance(each, fx.Node) else frozenset() for each in output.args[0]]
