"""What runs beside every model keeps its state too: modes that are active around the step, hooks on all modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import batchtrim


class OfFunctions(TorchFunctionMode):
    n = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is nn.functional.linear
        return func(*args, **(kwargs or {}))


class OfOperators(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


def three_steps() -> None:
    step = batchtrim.TrimmedForward(nn.Linear(6, 5), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "two_pass")
    for _ in range(3):
        step(torch.randn(12, 6), torch.arange(12) % 5).backward()
        assert step.last is not None
        assert step.last.engine == "two_pass"


@pytest.mark.parametrize("mode", [OfFunctions, OfOperators])
def test_a_mode_counts_each_step_once(mode: Any) -> None:
    with mode() as counting:
        three_steps()
    assert counting.n == 3


def test_a_hook_on_all_modules_counts_each_step_once() -> None:
    seen: list[Any] = []
    hook = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        three_steps()
    finally:
        hook.remove()
    assert sum(type(module) is nn.Linear for module in seen) == 3
