"""Run a few steps of training, and record everything in which two engines must agree."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo
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


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().train()


def compiled(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    model = seeded(make)
    model.compile(**options)
    return model


def stepper(model: nn.Module, engine: str = "shared", keep: float = 0.4, **options: Any) -> batchtrim.TrimmedForward:
    return batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(keep), engine, **options)


def whole_and_kept(step: batchtrim.TrimmedForward, x: Any, y: Any, keep: float = 0.4) -> tuple[list[Tensor], ...]:
    """Gradients of one forward's kept losses: by backward on all rows, and by backward on the kept ones."""
    engine: Any = step.engine
    tape, losses, _ = engine._forward(x, y)
    tape.size = len(losses.values)
    k = batchtrim.keep_count(keep, tape.size)
    rows = losses.values.topk(k).indices.sort().values
    loss = losses.values[rows].mean()
    parameters = [p for p in step.forward.inner.parameters() if p.requires_grad]
    whole = torch.autograd.grad(loss, parameters, retain_graph=True)
    tape.cut(rows, engine.approximate)
    return list(whole), list(torch.autograd.grad(loss, parameters))


def near(whole: list[Tensor], kept: list[Tensor], tolerance: float = 1e-5) -> None:
    total = sum(float(each.norm()) ** 2 for each in whole) ** 0.5
    for exact, ours in zip(whole, kept, strict=True):
        assert float((exact - ours).norm()) <= tolerance * max(float(exact.norm()), 1e-2 * total)


def penalty(step: batchtrim.TrimmedForward, batch: tuple[Tensor, Tensor], **options: Any) -> list[Tensor]:
    """Return the gradient of the squared norm of a step's gradient."""
    parameters = list(step.forward.model.parameters())
    gradients = torch.autograd.grad(step(*batch), parameters, create_graph=True)
    return list(torch.autograd.grad(sum(each.square().sum() for each in gradients), parameters, **options))  # type: ignore[arg-type]


def vectors() -> tuple[Tensor, Tensor]:
    """Return a batch for ``zoo.Mlp(8)``."""
    return zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
