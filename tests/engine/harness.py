"""What every engine test shares: one way to run a few steps of training and note what came out."""

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
    sliced: int = 0  # most operators that were to be taken from memory instead of being computed, over all plans

    def count_sliced(self) -> None:
        plans = getattr(self.step.engine, "plans", {}).values()
        self.sliced = max(self.sliced, sum(step.layouts is not None for plan in plans for step in plan.steps))


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
        run.count_sliced()
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


def prove_all(step: batchtrim.TrimmedForward, x: Any, y: Tensor) -> Tensor:
    """Steps on one batch until each operator was proven, or one was found not to be right; the last step's loss."""
    engine: Any = step.engine
    (plan,) = engine.plans.values()
    engine.prove_every = 1
    for _ in plan.provable():
        loss = step(x, y)
        if engine._failures:
            break
    return loss


def gradient(model: nn.Module) -> Tensor:
    """All gradients in one vector, zeros where there is none."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in model.parameters()]
    )


def error(exact: Tensor, other: Tensor) -> float:
    return float((exact - other).norm() / exact.norm())
