"""Changes to a graph before and after Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx

from batchtrim.engine.inductor import Inductor, inductor_of, with_strides, without_strides


def strided(graph: fx.GraphModule) -> int:
    return sum("stride" in str(node.target) for node in graph.graph.nodes if node.op == "call_function")


@pytest.mark.slow
def test_a_norm_by_strides_is_proven_without_them_and_compiled_with_them() -> None:
    """Without strides, Inductor computes the scale of a GroupNorm anew for every pixel."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [torch.ops.aten.native_group_norm(x, weight, bias, x.shape[0], 8, 16, 4, 1e-5)[0]]

    table = decomposition_table[torch.ops.aten.native_group_norm.default]
    batches = [(torch.randn(rows, 8, 4, 4), torch.randn(8), torch.randn(8)) for rows in (6, 5)]
    graph = make_fx(norm, {torch.ops.aten.native_group_norm.default: table}, tracing_mode="symbolic")(*batches[0])
    assert strided(graph) == 2
    without_strides(graph)
    assert strided(graph) == 0, "of a scale and an offset"
    again = with_strides(graph)
    assert (strided(graph), strided(again)) == (0, 2)
    for batch in batches:
        torch.testing.assert_close(again(*batch), norm(*batch))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside its compiler
@pytest.mark.parametrize("in_place", [True, False])
def test_the_settings_of_a_model_compiled_as_one_graph_are_found(in_place: bool) -> None:
    """Torch keeps none beside the compiled model then, and it ran operator by operator."""
    for options, expected in (({}, {}), ({"options": {"max_fusion_size": 7}}, {"max_fusion_size": 7})):
        model: Any = torch.nn.Linear(3, 2)
        if in_place:
            model.compile(fullgraph=True, **options)
        else:
            model = torch.compile(model, fullgraph=True, **options)
        assert inductor_of(model) == Inductor(expected)
    other: Any = torch.compile(torch.nn.Linear(3, 2), fullgraph=True, backend="eager")
    assert inductor_of(other) is None
