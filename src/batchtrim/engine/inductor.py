"""Compile a trace's graphs with Inductor.

A model that the user compiled runs compiled here too. The graphs of one trace become two functions, the forward and the
backward of the kept rows. Sizes that change are symbols in both, so that a new batch size or a new k needs no new
compilation. Before each call, the sizes are checked against what Inductor assumed of them.
"""

from __future__ import annotations

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from batchtrim._checks import in_one_line
from batchtrim.engine.compilation import compiled_part, context_of
from batchtrim.engine.graphs import graph_copy, in_traced_order
from batchtrim.engine.layout import product
from batchtrim.engine.symbolic import expression_of

__all__ = [
    "CannotCompile",
    "Compiled",
    "Inductor",
    "inductor_of",
    "not_traced",
    "with_strides",
    "without_strides",
]

_SHARED_BYTES = 2**15
_GRAPHS = "triton.cudagraphs"

# Do not decompose these before a graph is proven and split:
# BatchNorm, for the proof may take its means over the kept rows; operators that draw random numbers, so that a trace
# that runs operator by operator draws as the model does; operators with a rule whose parts have none.
_WHOLE = (
    "batch_norm", "native_dropout", "rrelu_with_noise", "bernoulli", "embedding_dense_backward", "slice_backward",
)  # fmt: skip


class CannotCompile(Exception):
    """Inductor cannot compile a graph; the message says why."""


def inductor_of(model: nn.Module) -> Inductor | None:
    """Return Inductor with the user's options if it compiles the model or a part of it; else None."""
    part = compiled_part(model)
    backend: Any = getattr(context_of(part), "callback", None)
    while backend is not None and not isinstance(backend, torch._TorchCompileInductorWrapper):
        backend = next((getattr(backend, name) for name in _INSIDE if hasattr(backend, name)), None)
    if backend is not None:
        return Inductor.of(backend.config)
    settings = getattr(part, "get_compiler_config", lambda: None)()  # a release that keeps its backend elsewhere
    if settings is None:
        return None
    from torch._inductor import config

    current = config.get_config_copy()
    return Inductor.of({name: value for name, value in settings.items() if current.get(name, value) != value})


_INSIDE = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")  # the second before torch 2.9


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


# Call a function from a compiled one, without tracing it.
not_traced: Callable[..., Any] = torch.compiler.disable(_call)


@dataclass
class Compiled:
    """A compiled function of a list of inputs, which it empties.

    Attributes:
        further: the sizes that the compiled code takes after the inputs: of which input, and in which dimension.
        strides: of each output, or None if unknown. They may be symbolic.
        assumed: conditions on the symbols of the inputs' sizes.
        sizes: where each symbol is found.
    """

    code: Callable[[list[Any]], Any]
    further: list[tuple[int, int]]
    strides: list[Any]
    assumed: list[Any] = field(default_factory=list)
    sizes: dict[Any, tuple[int, int | None]] = field(default_factory=dict)
    _known: dict[tuple[int, ...], bool] = field(default_factory=dict)

    def run(self, args: list[Any]) -> Any:
        args += [args[at].shape[dim] for at, dim in self.further]
        return self.code(args)

    def fits(self, args: Sequence[Any]) -> bool:
        """Return True if the assumptions on sizes hold for these inputs."""
        if not self.assumed:
            return True
        sizes = tuple(args[at] if dim is None else args[at].shape[dim] for at, dim in self.sizes.values())
        if sizes not in self._known:
            values = dict(zip(self.sizes, map(sympy.Integer, sizes), strict=True))
            self._known[sizes] = all(each.subs(values) == sympy.true for each in self.assumed)
        return self._known[sizes]


@dataclass(frozen=True)
class Inductor:
    """Inductor, and the options that the user gave it.

    CUDA graphs are not among them: they are recorded per size, while k changes in every step.
    """

    options: dict[str, Any] = field(default_factory=dict)
    cuda_graphs: bool = False  # whether the user's own compiled model replays them

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Inductor:
        from torch._inductor import config

        others = dict(settings)
        return cls(cuda_graphs=others.pop(_GRAPHS, config.triton.cudagraphs), options=others)

    @contextlib.contextmanager
    def _settings(self, **more: Any) -> Iterator[None]:
        from torch._inductor import config

        with config.patch({**self.options, _GRAPHS: False, **more}):
            yield

    def decompositions(self) -> dict[Any, Any]:
        """Return which operators to decompose before a graph is proven and split."""
        from torch._inductor.decomposition import select_decomp_table

        with self._settings():
            table = dict(select_decomp_table())
        return {op: run for op, run in table.items() if not any(name in str(op) for name in _WHOLE)}

    def compile(
        self, function: Callable[..., Sequence[Any]], inputs: Sequence[Any], *, visible: int, backward: bool
    ) -> Compiled:
        """Compile a function of tensors and symbolic sizes.

        Args:
            inputs: tensors without data, and symbolic sizes.
            visible: how many of the first outputs need the strides that the operators themselves would give; the others
                may have any strides.

        Raises:
            CannotCompile: with Inductor's reason.
        """
        mode = next(each.fake_mode for each in inputs if isinstance(each, Tensor))
        env = mode.shape_env
        further, all_known = _sizes_of(inputs)
        # Inductor's cache keeps those of its assumptions that are about sizes among the inputs, and no others
        cached = {} if all_known else {"fx_graph_cache": False}
        known, frozen = len(env.guards), env.frozen
        env.frozen = False  # otherwise it would not record later assumptions
        try:
            # do not fuse operators that share only the rows' numbers, far from their readers
            apart = {"score_fusion_memory_threshold": _SHARED_BYTES} if backward else {}
            with self._settings(**apart, **cached):
                code, strides = self._compile(function, inputs, further, mode, visible, backward)
            assumed = [guard.expr for guard in env.guards[known:]]
        except Exception as error:
            raise CannotCompile(in_one_line(error, 300)) from None
        finally:
            env.frozen = frozen
        symbols = sorted({symbol for each in assumed for symbol in each.free_symbols}, key=str)
        return Compiled(code, further, strides, assumed, {symbol: _place(symbol, inputs) for symbol in symbols})

    def _compile(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Any],
        further: Sequence[tuple[int, int]],
        mode: Any,
        visible: int,
        backward: bool,
    ) -> tuple[Callable[[list[Any]], Any], list[Any]]:
        from torch._dispatch.python import enable_python_dispatcher
        from torch._dynamo.convert_frame import compile_lock
        from torch._guards import TracingContext, tracing
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table
        from torch._inductor.fx_passes.replace_random import replace_random_passes
        from torch._inductor.virtualized import V
        from torch.fx.experimental.proxy_tensor import make_fx

        with compile_lock, torch.no_grad(), torch._C._DisableAutocast(), V.set_fake_mode(mode):
            given = [*inputs, *(inputs[at].shape[dim] for at, dim in further)]
            with mode, enable_python_dispatcher():
                graph = make_fx(
                    lambda *args: function(*args[: len(inputs)]), decomposition_table=select_decomp_table()
                )(*given)
            graph.shape_env = None  # Inductor takes it from the inputs; with one here, its cache finds no key
            graph.__dict__["visible_outputs"] = visible  # a part of that key
            if not config.fallback_random:
                replace_random_passes(graph)  # random numbers come from Inductor's own generator, inside its loops
            (output,) = graph.graph.find_nodes(op="output")
            output.meta["user_visible_output_idxs"] = [
                at for at, node in enumerate(output.args[0][:visible]) if isinstance(node, fx.Node)
            ]
            with tracing(TracingContext(mode)):
                code = compile_fx_inner(graph, given, is_backward=backward, cpp_wrapper=config.cpp_wrapper)
        read = mode.shape_env.deserialize_symexpr
        strides = getattr(code, "output_strides", None) or []
        return code, [None if each is None else [read(step) for step in each] for each in strides]


_STRIDED = "batchtrim_strided"  # in the meta of a node: it was an as_strided


def without_strides(graph: fx.GraphModule) -> None:
    """Replace each ``as_strided`` that is a reshape by a plain reshape: decompositions of norms use them.

    :func:`with_strides` undoes that.
    """
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default):
        before, after = node.args[0].meta["val"], node.meta["val"]
        same = _strides(before) == _contiguous(before) and _strides(after) == _contiguous(after)
        if same and len(node.args) == 3 and sympy.expand(_numel(before) - _numel(after)) == 0:
            node.target, node.args = torch.ops.aten.reshape.default, node.args[:2]
            node.meta[_STRIDED] = True
    graph.recompile()


def with_strides(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy in which the reshapes of :func:`without_strides` are ``as_strided`` again, of any number of rows.

    With it, Inductor computes the input once, for each channel of a sample. A reader of a reshape recomputes it
    for each pixel, and dividing an index prevents vectorisation of the loop.
    """
    own = graph_copy(graph)
    for node in own.find_nodes(op="call_function", target=torch.ops.aten.reshape.default):
        if _STRIDED in node.meta:
            node.target = _reshape_by_strides
    in_traced_order(own)
    return fx.GraphModule(graph, own)


def _reshape_by_strides(tensor: Tensor, shape: Sequence[Any]) -> Tensor:
    strides = [product(shape[at + 1 :]) for at in range(len(shape))]
    return tensor.contiguous().as_strided(shape, strides)


def _strides(tensor: Tensor) -> list[Any]:
    return [expression_of(step) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _contiguous(tensor: Tensor) -> list[Any]:
    sizes = [expression_of(size) for size in tensor.shape]
    return [product(sizes[at + 1 :]) for at, size in enumerate(sizes) if size != 1]


def _numel(tensor: Tensor) -> Any:
    return sympy.sympify(product([expression_of(size) for size in tensor.shape]))


def _sizes_of(inputs: Sequence[Any]) -> tuple[list[tuple[int, int]], bool]:
    """Return where the symbols are that are no inputs themselves, and whether all of them have a place."""
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    parts = [expression_of(size) for each in tensors for size in (*each.shape, *each.stride())]
    symbols = {symbol for part in parts if isinstance(part, sympy.Expr) for symbol in part.free_symbols}
    places: list[tuple[int, int]] = []
    all_known = True
    for symbol in sorted(symbols, key=str):
        try:
            at, dim = _place(symbol, inputs)
        except CannotCompile:
            all_known = False
        else:
            if dim is not None:
                places.append((at, dim))
    return places, all_known


def _place(symbol: sympy.Basic, inputs: Sequence[Any]) -> tuple[int, int | None]:
    """Return the input, and its dimension, whose size a symbol is."""
    for at, each in enumerate(inputs):
        if isinstance(each, Tensor):
            for dim, size in enumerate(each.shape):
                if expression_of(size) == symbol:
                    return at, dim
        elif expression_of(each) == symbol:
            return at, None
    raise CannotCompile(f"it assumes something about a size, {symbol}, that no input has")
