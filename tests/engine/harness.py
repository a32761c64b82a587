"""Run a few steps of training, and record everything in which two engines must agree."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import batchtrim

BATCH = 12


@dataclass
class Run:
    step: batchtrim.TrimmedForward
    losses: list[Tensor] = field(default_factory=list)
    chosen: list[list[int]] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    buffers: list[list[Tensor]] = field(default_factory=list)
    generators: list[Tensor] = field(default_factory=list)
    python: list[Any] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The share of the backward's work on the kept rows in the last trace; 0 without a trace."""
        engine: Any = self.step.engine
        engine = getattr(engine, "saving", engine)
        trace = getattr(engine, "trace", None)
        return 0.0 if trace is None else trace.cost(engine.approximate).share


def train(
    make: Callable[[], nn.Module],
    data: Callable[[int], Any],
    engine: str,
    *,
    keep: float = 0.4,
    steps: int = 3,
    loss: Any = None,
    lr: float = 0.1,
    batch: int = BATCH,
    **options: Any,
) -> Run:
    """Train for a few steps from a fixed seed, noting everything two engines are to agree in."""
    torch.manual_seed(0)
    random.seed(0)
    model = make().train()
    run = Run(
        batchtrim.TrimmedForward(model, loss or nn.CrossEntropyLoss(), batchtrim.Trimmer(keep), engine, **options)
    )
    for number in range(steps):
        torch.manual_seed(100 + number)
        x, y = data(batch), torch.randint(0, 5, (batch,))
        model.zero_grad(set_to_none=True)
        value = run.step(x, y)
        value.backward()
        run.losses.append(value.detach())
        run.chosen.append(run.step.trim.last_selection.rising().indices.tolist())
        run.gradients.append(gradient(model))
        run.buffers.append([buffer.clone() for buffer in model.buffers()])
        run.generators.append(torch.get_rng_state())
        run.python.append(random.getstate())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
    return run


def gradient(model: nn.Module) -> Tensor:
    """All gradients in one vector, zeros where there is none."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in model.parameters()]
    )


def error(exact: Tensor, other: Tensor) -> float:
    return float((exact - other).norm() / exact.norm())


def agree(exact: Run, shared: Run, tolerance: float = 1e-5) -> None:
    """Two runs chose the same samples and trained on them alike, and left buffers and generators alike."""
    assert shared.chosen == exact.chosen
    torch.testing.assert_close(shared.losses, exact.losses, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(shared.gradients, exact.gradients, strict=True):
        assert error(theirs, ours) <= tolerance
    torch.testing.assert_close(shared.buffers, exact.buffers, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(shared.generators, exact.generators, strict=True):
        assert torch.equal(ours, theirs)
    assert shared.python == exact.python
