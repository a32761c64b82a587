"""Watching operators imports no compiler, and what it does is not compiled."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchtrim.engine.compilation import uncompiled_calls
from batchtrim.engine.cost import Machine, OperatorCount
from batchtrim.engine.forward import Forward
from batchtrim.engine.operator_mode import OperatorMode

# Plain SGD by hand, since torch's optimizers import the compiler.
TRAINED = """
import sys, torch, batchtrim
from torch import nn
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 3))
for engine in ("exact", "auto", "two_pass"):
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine)
    for _ in range(3):
        step(torch.randn(8, 4), torch.randint(0, 3, (8,))).backward()
        for parameter in model.parameters():
            parameter.data.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None
    print(engine, step.last.engine, "torch._dynamo" in sys.modules)
"""


class Watch(OperatorMode):
    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_watching_imports_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    forward = Forward(nn.Linear(2, 2), nn.CrossEntropyLoss())
    with Watch() as watch, uncompiled_calls(forward):
        torch.ones(2).exp()
    assert watch.seen == 2
    assert "torch._dynamo" not in sys.modules


@pytest.mark.slow
def test_a_program_that_compiles_nothing_imports_no_compiler() -> None:
    """Counting the first step of `auto` took 1.4 s, which a small model's first thousand steps take."""
    run = subprocess.run([sys.executable, "-c", TRAINED], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["exact exact False", "auto exact False", "two_pass two_pass False"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of a break in the graph
def test_what_a_mode_does_is_not_compiled() -> None:
    """Between two compiled parts of a function an operator runs by itself, and the mode's own Python with it."""
    model = nn.Linear(8, 8)

    def broken(x: Tensor) -> Tensor:
        y = model(x).sin()
        return y * y.max().item()

    machine, x = Machine(1e10, 1e10, 1e-6), torch.randn(4, 8)
    with OperatorCount(machine) as plain:
        broken(x)
    frames = []
    for watched in (False, True):
        torch._dynamo.reset()
        compiled, counted = torch.compile(broken, backend="eager"), OperatorCount(machine)
        torch._dynamo.utils.counters.clear()
        if watched:
            with counted:
                compiled(x).sum().backward()
        else:
            compiled(x).sum().backward()
        frames.append(dict(torch._dynamo.utils.counters["frames"]))
    assert frames[0] == frames[1]
    assert counted.operators >= plain.operators
