"""Give the gradient of a traced step a graph of its own, where backward runs with ``create_graph=True``.

A trace has no second derivative, and whether one is asked for shows only when backward runs. The traced function then
runs again, operator by operator and under autograd, from the inputs and the random numbers that the step had. Where
that is not the same function, the model's own Python runs again (``rerun.py``). The gradient is compared with that of
the trace. If neither is alike, the gradient raises an error once its own gradient is asked for.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from batchtrim._checks import in_one_line
from batchtrim.engine.contents import in_double
from batchtrim.engine.generators import GeneratorStates
from batchtrim.engine.gradients import dense, distance, without_hooks
from batchtrim.engine.graphs import name_of
from batchtrim.engine.rerun import CannotRepeat, Inputs

if TYPE_CHECKING:
    from batchtrim.engine.sliced import SlicedStep
    from batchtrim.engine.tape import Tape

__all__ = ["function_of", "with_second_derivatives"]

# How far the two gradients of an input may be apart, relative to its norm or to a hundredth of the largest.
_APART, _COARSE_APART = 1e-3, 0.2
# Forms of BatchNorm, and how many of their results need no running statistics in training; these are arguments 3 and 4.
_NORMS = {"_native_batch_norm_legit_functional": 3, "cudnn_batch_norm": 4, "_batch_norm_with_update_functional": 4}

_function = torch.ops.higher_order.autograd_function_apply


def with_second_derivatives(run: Callable[..., Any], graph: fx.GraphModule, step: SlicedStep) -> Callable[..., Any]:
    """Return a traced function whose gradient can be differentiated.

    Args:
        run: the traced function.
        graph: the same, as autograd runs it.
        step: made the trace, and runs it.
    """
    again = _Again(graph, step)

    def call(*args: Any) -> Any:
        inputs = again.inputs(args)
        found = run(*args)
        if inputs is not None:
            again.note(inputs, found)
        return found

    return call


class _Again:
    """Runs a traced function again, for the graph of its gradient.

    Attributes:
        function: the autograd function that AOTAutograd made of the trace; ``plain`` is its own method.
        written: the positions of the inputs that the traced function writes into.
        read: those of them that its outputs depend on; before its first run, all that may be.
        hindrance: why the graph cannot run again, or None.
    """

    def __init__(self, graph: fx.GraphModule, step: SlicedStep) -> None:
        self.graph = _as_autograd_runs(graph)
        self.step = step
        self.function: Any = None
        self.plain: Any = None
        inputs, needed = list(step.forward_graph.graph.find_nodes(op="placeholder")), _needed_for(step.own_outputs)
        own = len(graph.graph.find_nodes(op="placeholder"))  # in front of them, a trace has tokens that order effects
        devices = {node.meta["val"].device.type for node in inputs if isinstance(node.meta.get("val"), Tensor)}
        self.autocast = [  # a trace holds for these settings only
            (each, torch.get_autocast_dtype(each), torch.is_autocast_enabled(each))
            for each in devices
            if torch.amp.is_autocast_available(each)
        ]
        self.written: list[int] = []
        self.hindrance = _hindrance(self.graph, step)
        self.read = []
        if step.compiled is None:  # which has no second derivative in plain training either
            given = enumerate(inputs[len(inputs) - own :])
            self.read = [at for at, node in given if node in needed and step.may_write_into(node)]

    def inputs(self, args: Sequence[Any]) -> Inputs | None:
        """Return the inputs of a run that is about to begin; None if nothing will run again."""
        tape = self.step.current()
        if tape is None or tape.python is None:
            return None
        return Inputs(args, self.read, tape.python, again=self.step.compiled is None)

    def note(self, inputs: Inputs, found: Sequence[Any]) -> None:
        """Note the inputs of a run that has ended."""
        tape = self.step.current()
        if tape is None or tape.step is not self.step:
            return
        if self.function is None:
            if (function := function_of(found)) is None:
                return
            self.function, self.plain = function, function._double_backward
            function._double_backward = staticmethod(self._double_backward)
            facts = function.metadata.input_info[-len(inputs.args) :]
            self.written = [at for at, each in enumerate(facts) if each.mutates_data]
            self.read = [at for at in self.read if at in self.written]
            inputs.before = {at: each for at, each in inputs.before.items() if at in self.read}
        tape.inputs = inputs

    def _double_backward(self, context: Any, run: Callable[[], Any], args: list[Any]) -> Any:
        """Return the gradient with its graph. It replaces AOTAutograd's own method, which raises an error later."""
        tape = self.step.tape_of(args)
        if tape is None or (inputs := tape.inputs) is None:
            return self.plain(context, run, args)
        tangents = [args[place] for place in self.step.tangents]
        with torch.no_grad():
            traced = run()
        reasons = []
        if self.step.compiled is not None:
            reasons.append("its model is compiled, which has no second derivative in plain training either")
        elif inputs.changed(self.written):
            reasons.append("an input or a weight was written into between forward and backward")
        elif inputs.asks_since(self.written):
            reasons.append("an input or a weight began to require a gradient between forward and backward")
        else:
            for runs in (self._run_graph, self._run_python):
                try:
                    return self._checked(tape, traced, self._gradients(inputs, tangents, runs))
                except CannotRepeat as error:
                    reasons.append(str(error))
        asking = [each for each in inputs.args if isinstance(each, Tensor) and each.requires_grad]
        return _NoSecondDerivative.apply("; ".join(reasons), len(asking), *asking, *traced)

    def _checked(self, tape: Tape, traced: Sequence[Any], found: list[Any]) -> tuple[Any, ...]:
        """Return the gradients that backward returns, compared with those of the trace."""
        found = [*[None] * (len(traced) - len(found)), *found]  # constants of the function come first in the trace
        if tape.arrivals is not None:
            found = tape.arrivals.without_unasked(found, self.step.tangents_of)
        approximate = tape.approximate and self.step.batch_norms  # then the same gradients exist, with other values
        if not _alike(traced, found, math.inf if approximate else self._apart):
            raise CannotRepeat("it computes something else when it runs again")
        return tuple(found)

    @property
    def _apart(self) -> float:
        return _COARSE_APART if self.step.coarse else _APART

    def _gradients(self, inputs: Inputs, tangents: Sequence[Tensor], runs: Callable[..., Any]) -> list[Tensor | None]:
        """Return the gradient of each input, with its graph."""
        before = inputs.python.generators
        now = GeneratorStates(before.device)
        try:
            with torch.enable_grad(), inputs.asking():
                own = inputs.for_this_use()
                written = {at: own[at].clone() for at in self.written}
                with ExitStack() as stack:
                    for device, dtype, enabled in self.autocast:
                        stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
                    before.restore()
                    outputs = [*written.values(), *runs(inputs, [written.get(at, each) for at, each in enumerate(own)])]
                # like those of a trace, in front of its outputs what it writes into, as it leaves it
                outputs = [each for each in outputs if isinstance(each, Tensor) and each.requires_grad]
                if [each.shape for each in outputs] != [each.shape for each in tangents]:
                    raise CannotRepeat("it has other outputs when it runs again")
                asked = [each for each, asks in zip(own, inputs.asks, strict=True) if asks]
                with without_hooks(asked):
                    found = iter(torch.autograd.grad(outputs, asked, tangents, create_graph=True, allow_unused=True))
        except (CannotRepeat, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise CannotRepeat(f"it fails when it runs again ({in_one_line(error)})") from None
        finally:
            now.restore()
        return [next(found) if asks else None for asks in inputs.asks]

    def _run_graph(self, _: Inputs, args: list[Any]) -> Sequence[Any]:
        if self.hindrance is not None:
            raise CannotRepeat(self.hindrance)
        return self.graph(*args)

    def _run_python(self, inputs: Inputs, args: list[Any]) -> Sequence[Any]:
        others = {id(given): own for given, own in zip(inputs.args, args, strict=True) if own is not given}
        found = inputs.python.run(others)
        if not _alike([inputs.python.losses], [found], self._apart):
            raise CannotRepeat("its losses are others when the model's own Python runs again")
        return [found]


def _hindrance(graph: fx.GraphModule, step: SlicedStep) -> str | None:
    """Return why a traced function cannot run again, or None."""
    for node in _nodes(graph):
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            own = "an autograd function that saves what it computes" if node.target is _function else node.target
            return f"it calls {own}, which a trace knows in part"
    for node in step.forward_graph.graph.nodes:
        if node.op == "call_function" and "::" in name_of(node.target):
            return f"it calls {name_of(node.target)}, which may do anything when it runs again"
    return None


def _modules(graph: fx.GraphModule) -> list[fx.GraphModule]:
    return [module for module in graph.modules() if isinstance(module, fx.GraphModule)]


def _nodes(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for module in _modules(graph) for node in module.graph.nodes]


def _as_autograd_runs(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without the two operators of a trace whose gradient autograd would not differentiate rightly.

    What is checkpointed runs once: run again in backward, it would draw other numbers. An autograd function saves what
    it saves for autograd to know.
    """
    higher = torch.ops.higher_order
    if not any(node.target in (higher.tag_activation_checkpoint, _function) for node in _nodes(graph)):
        return graph
    own = copy.deepcopy(graph)
    for module in _modules(own):
        for node in module.graph.nodes:
            if node.target is higher.tag_activation_checkpoint:
                node.target, node.kwargs = _run, {}
            elif node.target is _function and _is_differentiable(module, node):
                node.target, node.kwargs = _apply, {"constant": node.kwargs["non_differentiable_idx"]}
    for module in _modules(own):
        module.recompile()
    return own


def _is_differentiable(module: fx.GraphModule, node: fx.Node) -> bool:
    """True if autograd can differentiate an autograd function's backward; makes that run with gradients if so.

    It saves inputs and outputs alone, and its backward is run without gradients by the trace, not by itself.
    """
    if node.kwargs.get("dirty_idx") or "saved_for_backward_idx" not in node.kwargs:
        return False
    forward, backward = (module.get_submodule(each.target) for each in node.args[:2])  # type: ignore[union-attr]
    (output,) = forward.graph.find_nodes(op="output")  # type: ignore[union-attr]
    returned, saved = output.args[0]
    switches = backward.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)  # type: ignore[union-attr]
    computed = [each for each in saved if isinstance(each, fx.Node) and each.op != "placeholder"]
    if [each.args for each in switches] != [(False,), (True,)] or any(each not in returned for each in computed):
        return False
    for each in switches:
        backward.graph.erase_node(each)  # type: ignore[union-attr]
    return True


class _Applied(torch.autograd.Function):
    """An autograd function as a trace holds it: a graph of its forward and one of its backward."""

    @staticmethod
    def forward(ctx: Any, forward: Any, backward: Any, constant: Sequence[int], *args: Any) -> Any:
        results, saved = forward(*args)
        ctx.save_for_backward(*(each for each in saved if isinstance(each, Tensor)))
        ctx.saved = [None if isinstance(each, Tensor) else each for each in saved]
        ctx.run = backward
        ctx.mark_non_differentiable(*(results[at] for at in constant))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        tensors = iter(ctx.saved_tensors)
        return None, None, None, *ctx.run(*gradients, *(next(tensors) if each is None else each for each in ctx.saved))


def _apply(forward: Any, backward: Any, *args: Any, constant: Sequence[int]) -> Any:
    return _Applied.apply(forward, backward, constant, *args)


def _run(part: Callable[..., Any], *args: Any) -> Any:
    return part(*args)


def _needed_for(outputs: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the nodes that outputs depend on. What BatchNorm computes in training needs no running statistics."""
    found, ahead = set(), list(outputs)
    while ahead:
        node = ahead.pop()
        if node in found:
            continue
        found.add(node)
        norm = node.args[0] if node.target is operator.getitem else None
        results = _NORMS.get(name_of(norm.target), 0) if isinstance(norm, fx.Node) else 0
        if results and node.args[1] < results and norm.args[5] is not False:  # type: ignore[operator, union-attr]
            ahead.extend(each for each in norm.all_input_nodes if each not in norm.args[3:5])  # type: ignore[union-attr]
        else:
            ahead.extend(node.all_input_nodes)
    return found


class _NoSecondDerivative(torch.autograd.Function):
    """Returns gradients as they are, and raises an error when theirs is asked for."""

    @staticmethod
    def forward(ctx: Any, reason: str, count: int, *given: Tensor | None) -> Any:
        """``given``: the inputs, ``count`` in all, on which the gradients depend, and the gradients."""
        ctx.reason = reason
        return tuple(None if each is None else each.clone() for each in given[count:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "the gradient of a step that ran as a trace (engine='shared') cannot be differentiated here: "
            f"{ctx.reason}. Use engine='exact'."
        )


def _alike(traced: Sequence[Tensor | None], found: Sequence[Tensor | None], apart: float) -> bool:
    """True if two gradients are at most that far apart, and both lack the same."""
    if len(traced) != len(found):
        return False
    largest = max(
        (float(in_double(dense(each.detach())).nan_to_num(0, 0, 0).norm()) for each in traced if each is not None),
        default=0.0,
    )
    for own, other in zip(traced, found, strict=True):
        if own is None or other is None:
            if own is not other and (other if own is None else own).any():  # type: ignore[union-attr]
                return False
        elif not distance(*_without_overflow(own, other), largest) <= apart:  # nor if one alone is NaN
            return False
    return True


def _without_overflow(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return two gradients, as far as both are finite where neither is so everywhere: GradScaler skips such a step."""
    own, other = in_double(dense(own.detach())), in_double(dense(other.detach()))
    if own.isfinite().all() or other.isfinite().all():
        return own, other
    fits = own.isfinite() & other.isfinite()
    return own.where(fits, 0.0), other.where(fits, 0.0)


def function_of(found: Sequence[Any]) -> Any:
    """Return the autograd function that returned a result, as AOTAutograd makes it, or None."""
    for each in found:
        function = getattr(getattr(each, "grad_fn", None), "_forward_cls", None)
        if function is not None and hasattr(function, "_double_backward") and hasattr(function, "metadata"):
            return function
    return None
