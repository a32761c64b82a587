"""Two passes of compiled models, which are checked with the compiler switched off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from harness import agree, train
from torch import nn

import batchtrim


def test_a_compiled_model_is_not_compiled_module_by_module() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Blocks(nn.Module):  # torch leaves an nn.Sequential as it is
        def __init__(self) -> None:
            super().__init__()
            blocks = (nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU()) for _ in range(3))
            self.blocks = nn.Sequential(*blocks)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x)

    torch._dynamo.reset()
    model = Blocks()
    model.compile(backend=backend)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "two_pass")
    for _ in range(2):
        step(torch.randn(12, 8), torch.arange(12) % 5).backward()
    assert 1 <= len(graphs) <= 3  # without gradients, for the kept samples, and for any number of samples


class NeedsCompiler(nn.Module):
    """Fails while compilation is switched off, as the operators with a body that compile themselves do (scan).

    Args:
        always: fail without a graph, too.
    """

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.layer, self.always = nn.Linear(8, 5), always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch._dynamo import eval_frame

        if eval_frame._stance.stance == "force_eager" and (self.always or torch.is_grad_enabled()):
            raise AssertionError("Please convert all Tensors to FakeTensors first")
        return self.layer(x)


@pytest.mark.parametrize("always", [True, False])
def test_what_runs_only_with_the_compiler_runs_with_it(always: bool) -> None:
    found = train(lambda: NeedsCompiler(always), zoo.vectors, "two_pass")
    agree(train(lambda: NeedsCompiler(always), zoo.vectors, "exact"), found)
    assert found.step.last.engine == "two_pass"


def test_a_model_at_fault_is_not_taken_for_one_that_needs_the_compiler() -> None:
    step = batchtrim.TrimmedForward(NeedsCompiler(False), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "two_pass")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        step(torch.randn(12, 7), torch.arange(12) % 5)
    assert step.forward.needs_compiler is False
