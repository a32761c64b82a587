"""Capture a function as graphs, and run them.

``torch.compile``'s front end traces model and loss together, with guards that trace anew when something in Python
changes. AOTAutograd turns the trace into one joint graph of forward and backward. :class:`Capture` passes the joint
graph to a planner and runs the graphs that the planner returns. :func:`unfit` says which torch releases cannot be used.
"""

from __future__ import annotations

# pyright: reportAttributeAccessIssue=false
import contextlib
import copy
import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx
from torch.torch_version import TorchVersion

from batchtrim.engine.checkpoints import done_again
from batchtrim.engine.graphs import boxed, executable, with_gradients
from batchtrim.engine.reasons import cause_of, told, too_many

if TYPE_CHECKING:
    from batchtrim.engine.inductor import Inductor

__all__ = [
    "CannotCapture",
    "Capture",
    "OneBatchSize",
    "Planner",
    "TooManyTraces",
    "dynamic",
    "hindrance",
    "keeps_graph",
    "no_new_traces",
    "unfit",
    "without_logging",
]


_OLDEST = TorchVersion("2.8")  # the oldest release with which the engine's tests have passed
# This release keeps the check of linalg.cholesky and its like, which raises; older ones drop it as an unused result.
_KEEPS_CHECKS = torch.__version__ >= TorchVersion("2.13")
_numbers = itertools.count()
_MARK = "dynamo"  # in the names of attributes that mark tensors


class CannotCapture(Exception):
    """A function cannot be captured as one graph; the message says why."""


class OneBatchSize(CannotCapture):
    """A trace is valid for one batch size only."""


class TooManyTraces(CannotCapture):
    """Every state of the guards needs a trace of its own, and there are more than the limit."""


class Planner(Protocol):
    """Makes the graphs of one trace, and runs them."""

    def partition(
        self, joint: fx.GraphModule, split: Callable[[], Any], outputs: int, own: int, leaves: Sequence[bool]
    ) -> Any:
        """Return the forward and backward modules of a joint graph; ``split`` cuts it as torch does.

        Of its ``outputs`` the function itself has ``own``. Those in front of them are written into its inputs, of which
        ``leaves`` says which are no other operator's result.
        """
        ...

    def forward(self, args: list[Any]) -> Any:
        """Run the forward; return its outputs, followed by what it saves for backward."""
        ...

    def backward(self, args: list[Any]) -> Any:
        """Run the backward."""
        ...

    def finish(self, run: Callable[..., Any], graph: fx.GraphModule) -> Callable[..., Any]:
        """Return what runs in place of ``run``, the traced function; ``graph`` is the same, as autograd runs it."""
        ...


def unfit() -> str | None:
    """Return why this torch release cannot be used for capture, or None."""
    if torch.__version__ < _OLDEST:
        return f"capture needs torch {_OLDEST} or newer, and this is torch {torch.__version__}"
    try:
        from torch._dynamo.backends.common import aot_autograd  # noqa: F401
        from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: F401
        from torch.fx.experimental._config import use_duck_shape  # type: ignore[attr-defined]  # noqa: F401
    except ImportError as error:
        return f"torch {torch.__version__} lacks what it captures with ({error})"
    return None


class Capture:
    """A function of (x, y) that runs as graphs, with one trace per state of the guards.

    Args:
        function: what to capture.
        make_planner: called once for every trace.
        limit: the most traces to make before giving up.
        compiler: what will compile the graphs, which are then decomposed into smaller operators.
        counts: a whole number that changes in a module becomes an input of the graph, as other numbers do.

    Raises:
        CannotCapture: on call, before any part of the function has run.
    """

    traced = False  # True once a trace was made in this process

    def __init__(
        self,
        function: Callable[..., Any],
        make_planner: Callable[[], Planner],
        limit: int = 8,
        compiler: Inductor | None = None,
        counts: bool = False,
    ) -> None:
        # torch caches traces by code object, and facts on sizes by its name: each capture has its own
        name = f"{function.__name__}_{next(_numbers)}"
        code = function.__code__.replace(co_name=name, co_qualname=name)
        own = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
        self.make_planner = make_planner
        self.limit = limit
        self.counts = counts
        self.compiler = compiler
        self.traces = 0
        self.calls = 0
        self.running = False
        # torch keeps every backend for good, and code keeps its traces, unseen by Python's garbage collector
        held = weakref.proxy(self)
        self._compiled = torch.compile(own, backend=lambda graph, inputs: held._backend(graph, inputs), fullgraph=True)

    def __call__(self, *args: Any) -> Any:
        self.running = False
        self.calls += 1
        with _settings(self.limit, self.counts):
            try:
                return self._compiled(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # an error of the model itself while its graph runs is passed on
                if self.running:
                    raise
                cause = cause_of(error)
                # Refused because of the graph, or not traced. Do not keep the error: it holds the model's frames.
                reason = str(cause) if isinstance(cause, CannotCapture) else told(cause)
                refusal = OneBatchSize if isinstance(cause, OneBatchSize) else CannotCapture
                refusal = TooManyTraces if too_many(cause) else refusal
                del cause
        raise refusal(reason)

    def _backend(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        if (reason := done_again(graph)) is not None:
            raise CannotCapture(reason)
        if any("invoke_subgraph" in str(node.target) for node in graph.graph.nodes):
            raise CannotCapture("it has regions of nested_compile_region, which this torch release keeps apart")
        self.traces += 1
        Capture.traced = True
        planner, held = self.make_planner(), weakref.proxy(self)
        own = len(next(iter(graph.graph.find_nodes(op="output"))).args[0])  # type: ignore[arg-type]
        leaves = [isinstance(each, Tensor) and each.is_leaf for each in inputs]

        def partition(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
            def split() -> Any:
                return min_cut_rematerialization_partition(
                    joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **options
                )

            return planner.partition(joint, split, num_fwd_outputs, own, leaves)

        def run(args: list[Any]) -> Any:
            held.running = True
            return planner.forward(args)

        def forward(_: fx.GraphModule, __: Any) -> Callable[..., Any]:
            return boxed(run)

        def backward(_: fx.GraphModule, __: Any) -> Callable[..., Any]:
            return boxed(planner.backward)

        def inference(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
            return executable(graph)

        backend = aot_autograd(
            fw_compiler=forward,
            bw_compiler=backward,
            inference_compiler=inference,
            partition_fn=partition,
            decompositions=None if self.compiler is None else self.compiler.decompositions(),
        )
        if not _KEEPS_CHECKS:
            fx.node.has_side_effect(torch.ops.aten._linalg_check_errors.default)
        with _draws_kept(), _nothing_donated():
            return planner.finish(backend(with_gradients(graph), inputs), graph)


@contextlib.contextmanager
def _settings(limit: int, counts: bool) -> Iterator[None]:
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    import torch.fx.experimental._config as shapes

    regions = "inline_invoke_subgraph"  # the backward of a region (nested_compile_region) is then part of the graph
    with (
        dynamo.patch(
            recompile_limit=limit,
            fail_on_recompile_limit_hit=True,
            allow_rnn=True,
            optimize_ddp=False,
            skip_nnmodule_hook_guards=False,  # a hook added later changes the function
            use_numpy_random_stream=True,  # do not replace NumPy's random numbers by torch's
        ),
        dynamo.patch(allow_unspec_int_on_nn_module=True) if counts else contextlib.nullcontext(),
        dynamo.patch({regions: True}) if hasattr(dynamo, regions) else contextlib.nullcontext(),
        functorch.patch(donated_buffer=False),
        shapes.patch(use_duck_shape=False),  # sizes that are equal by chance stay separate
    ):
        yield


@contextlib.contextmanager
def _draws_kept() -> Iterator[None]:
    """Keep random operators with unused results in graphs: they advance the generator, as in the model itself."""
    import torch._inductor.config as inductor

    with inductor.patch(fallback_random=True):
        yield


@contextlib.contextmanager
def _nothing_donated() -> Iterator[None]:
    """Have traces made inside give away none of what backward reads, since torch then forbids a second backward."""
    from torch._functorch._aot_autograd.schemas import ViewAndMutationMeta as Metadata

    own = Metadata.__post_init__

    def none(self: Any) -> None:
        own(self)
        self.bw_donated_idxs = []

    Metadata.__post_init__ = none  # type: ignore[method-assign]
    try:
        yield
    finally:
        Metadata.__post_init__ = own


@contextlib.contextmanager
def without_logging(*methods: Callable[..., Any]) -> Iterator[None]:
    """Leave calls of these functions of ``logging.Logger`` out of traces: they would break the graph."""
    import torch._dynamo.config as dynamo

    names = ("ignore_logging_functions", "ignore_logger_methods")  # a release has the second name, or both
    if (name := next((each for each in names if hasattr(dynamo, each)), None)) is None:
        yield
        return
    with dynamo.patch({name: {*getattr(dynamo, name), *methods}}):
        yield


@contextlib.contextmanager
def dynamic(sizes: Iterable[tuple[Tensor, int]]) -> Iterator[None]:
    """Have dimensions of tensors traced as sizes that change. The tensors bear no mark of it afterwards."""
    marked: dict[int, tuple[Tensor, dict[str, Any]]] = {}
    try:
        for tensor, dim in sizes:
            before = {name: copy.copy(mark) for name, mark in vars(tensor).items() if _MARK in name}
            marked.setdefault(id(tensor), (tensor, before))
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        yield
    finally:
        for tensor, before in marked.values():
            held = vars(tensor)
            for name in [name for name in held if _MARK in name]:
                del held[name]
            held.update(before)


def hindrance() -> str | None:
    """Return the reason why nothing can be traced at this point of the user's program, or None."""
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return "it runs inside torch.func or with forward-mode derivatives (jvp). Use engine='exact'"
    if torch._dynamo.config.disable:
        return "torch.compile is switched off (TORCH_COMPILE_DISABLE, or torch._dynamo.config.disable)"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a mode that sees every operator is active (FlopCounterMode, say). Run the step outside of it"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors are active, which would see them before they are cut"
    return None


def no_new_traces() -> bool:
    """True inside ``torch.compiler.set_stance("fail_on_recompile")``, where each trace that is needed is an error."""
    return getattr(getattr(torch._dynamo.eval_frame, "_stance", None), "stance", "") == "fail_on_recompile"


def keeps_graph() -> bool:
    """True if the current backward keeps its graph for another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()
