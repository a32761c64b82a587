"""A stand-in for Inductor, which needs a C++ compiler, and seconds per graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.utils._sympy.printers import PythonPrinter

from batchtrim.engine.graphs import any_strides
from batchtrim.engine.inductor import without_strides
from batchtrim.engine.symbolic import expression_of


class Uncompiled:
    """A graph that Inductor would compile, as it is."""

    def __init__(self, graph: fx.GraphModule, *_: Any, **__: Any) -> None:
        without_strides(graph)
        assert any_strides(graph)
        (output,) = graph.graph.find_nodes(op="output")
        values = [node.meta.get("val") if isinstance(node, fx.Node) else None for node in output.args[0]]
        written = PythonPrinter().doprint
        self.graph = graph
        self.output_strides = [
            [written(expression_of(step)) for step in value.stride()] if isinstance(value, Tensor) else None
            for value in values
        ]

    def __call__(self, args: list[Any]) -> Any:
        given = list(args)
        args.clear()
        return self.graph(*given)
