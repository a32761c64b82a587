"""Shared by the tests of engines on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import batchtrim
from batchtrim.testing import EngineReport, check_engine


def each_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Without an ignored label, whose mask has to be counted on the CPU."""
    return F.cross_entropy(outputs, y, reduction="none")


def moved(value: Any, device: torch.device) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda each: each.to(device), value)


def report_of(
    make: Callable[[], nn.Module], batch_of: Callable[[int], Any], device: torch.device, engine: str, **options: Any
) -> EngineReport:
    torch.manual_seed(0)
    model = make().to(device).train()
    batches = [moved((batch_of(size), torch.randint(0, 5, (size,))), device) for size in (12, 12, 7)]
    loss = options.pop("loss", nn.CrossEntropyLoss())
    return check_engine(model, batches[0], loss, engine=engine, more=batches[1:], verbose=False, **options)


def sequences(batch: int) -> Tensor:
    return torch.randn(batch, 24, 64)


class Cast(nn.Module):
    """A module within autocast, whose outputs are float32."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.inner(x).float()


def off_by(make: Callable[[], nn.Module], x: Tensor, dtype: torch.dtype, engine: str) -> float:
    """Return how far an engine's gradient is off the one that float32 and plain products give of the same rows."""
    y, gradients = torch.arange(len(x), device=x.device) % 5, []
    kept = None
    for name, precision in ((engine, dtype), ("reference", torch.float32)):
        torch.manual_seed(0)
        model = Cast(make(), precision).to(x.device).train()
        if name == "reference":
            with sdpa_kernel(SDPBackend.MATH):
                F.cross_entropy(model(x), y, reduction="none")[kept].mean().backward()
        else:
            step = batchtrim.TrimmedForward(model, each_loss, batchtrim.Trimmer(0.4), name)
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                step(x, y).backward()
            assert step.last is not None
            assert step.last.engine == name
            kept = step.last.selection.indices
        gradients.append(torch.cat([each.grad.flatten().double() for each in model.parameters()]))
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
