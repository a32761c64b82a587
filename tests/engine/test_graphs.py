"""Graphs call operators through functions of torch: each must start the same operator and give the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from batchtrim.engine.graphs import FROM_PYTHON

aten = torch.ops.aten
x, w, b = torch.randn(4, 6), torch.randn(6, 4), torch.randn(4)
image, kernel = torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3)
CALLS: dict[Any, list[tuple[Any, ...]]] = {
    aten.add.Tensor: [(x, x), (x, 2), (x.int(), 0.5), (x, x, {"alpha": 3})],
    aten.addmm.default: [(b, x, w), (b, x, w, {"beta": 0.5})],
    aten.bmm.default: [(image[0], image[1])],
    aten.clone.default: [(x.t(),), (x.t(), {"memory_format": torch.contiguous_format})],
    aten.convolution.default: [(image, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)],
    aten.detach.default: [(x,)],
    aten.expand.default: [(b, [3, 4]), (b, [3, -1], {"implicit": True})],
    aten.mm.default: [(x, w)],
    aten.mul.Tensor: [(x, x), (x.half(), 2.5), (x.int(), 2)],
    aten.native_dropout.default: [(x, 0.5, True)],
    aten.native_group_norm.default: [(image, None, None, 2, 4, 25, 2, 1e-5)],
    aten.native_layer_norm.default: [(x, [6], None, None, 1e-5), (x.t(), [4], b, b, 1e-5)],
    aten.permute.default: [(image, [0, 2, 3, 1])],
    aten.select.int: [(x, 1, -1)],
    aten.sum.dim_IntList: [(x, [0], True), (x, None), (x.int(), [0, 1], {"dtype": torch.float64})],
    aten.t.default: [(x,), (b,)],
    aten.transpose.int: [(image, 1, -1)],
    aten.unsqueeze.default: [(x, -1)],
    aten.view.default: [(x, [-1]), (x, [2, 12]), (x.t(), [24])],
}


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _run(func: Any, call: tuple[Any, ...]) -> tuple[list[str], list[Any]]:
    torch.manual_seed(0)
    kwargs = call[-1] if isinstance(call[-1], dict) else {}
    with torch.no_grad(), _Names() as ran:
        found = func(*(call[:-1] if kwargs else call), **kwargs)
    return ran.names, [(each.dtype, each.stride(), each) for each in pytree.tree_leaves(found)]


@pytest.mark.parametrize("operator", FROM_PYTHON, ids=str)
def test_a_function_of_torch_starts_the_operator_itself(operator: Any) -> None:
    plain = aten.reshape.default if operator is aten.view.default else operator
    for call in CALLS[operator]:
        (names, expected), (ran, found) = _run(plain, call), _run(FROM_PYTHON[operator], call)
        assert ran == names
        for (*kind, value), (*other, result) in zip(expected, found, strict=True):
            assert (other, isinstance(result, Tensor)) == (kind, True)
            assert torch.equal(result, value)
