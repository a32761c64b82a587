"""What an engine leaves in ``.grad``, besides its values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import compiled, seeded, stepper
from torch import Tensor, nn

from tiers import few


class Sums(nn.Module):
    """Weights that are sums, of parameters of several shapes: the gradient of each is that of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.turned = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 6))
        self.flat, self.layers = nn.Parameter(torch.randn(48)), nn.ParameterList(torch.randn(6, 8) for _ in range(2))
        self.parts = nn.ParameterList(torch.randn(4) for _ in range(2))
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.one + self.turned.t() + self.flat.view(6, 8) + sum(self.layers)
        return self.last((x @ weight + torch.cat([part for part in self.parts])).tanh())


class MixedSums(Sums):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0) + 0 * self.one.sum())


def accumulated(model: nn.Module, engine: str) -> dict[str, Any]:
    """Clip the gradient of two batches, as training programs do: both change gradients in place."""
    step = stepper(model, engine)
    for number in range(3):
        model.zero_grad()
        for part in range(2):
            torch.manual_seed(2 * number + part)
            step(torch.randn(12, 6), torch.randint(0, 5, (12,))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    return {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.filterwarnings("ignore")  # torch's own, when it compiles
@pytest.mark.parametrize(("kind", "compiles"), few([(Sums, False), (MixedSums, False), (Sums, True)], [(Sums, False)]))
def test_no_two_gradients_share_memory(kind: type[nn.Module], compiles: bool) -> None:
    exact = accumulated(seeded(kind), "exact")
    shared = accumulated(compiled(kind) if compiles else seeded(kind), "shared")
    torch.testing.assert_close(shared, exact, rtol=1e-4, atol=1e-6)
