"""One side of a comparison: a copy of a model, with a loss, an engine and a trimmer of its own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim.engine.contents import in_double
from batchtrim.engine.copies import twins
from batchtrim.engine.gradients import dense
from batchtrim.engine.model_facts import modules_of, parameters_of
from batchtrim.engine.state import ModelState
from batchtrim.engine.trimmed_forward import TrimmedForward
from batchtrim.errors import EngineFallback, EngineRefused
from batchtrim.trimmer import Trimmer

__all__ = ["Side"]


class _SetKeep:
    """A schedule whose keep is set from outside."""

    needs_total = False

    def __init__(self) -> None:
        self.now = 1.0

    def __call__(self, progress: float) -> float:
        return self.now


@dataclass
class Side:
    """One of the two copies, with its own loss and trimmer.

    Attributes:
        refused: the error of an engine that refused the model at once; ``step`` then has the engine "exact".
        named: what :meth:`named_parameters` found since the model ran.
        passed: the modules of the other side. A registry of all models leads to them, and they are left out.
    """

    step: TrimmedForward
    schedule: _SetKeep
    refused: EngineRefused | None = None
    named: dict[str, nn.Parameter] | None = None
    passed: list[nn.Module] = field(default_factory=list)

    @classmethod
    def copied(cls, model: nn.Module, loss: Any, engine: str, batch_dim: int) -> Side:
        """Return a side with copies of a model and its loss."""
        own, own_loss = twins(model, loss)
        schedule = _SetKeep()
        refused = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EngineFallback)
            try:
                step = TrimmedForward(own, own_loss, Trimmer(schedule), engine, batch_dim=batch_dim)
            except EngineRefused as error:
                refused, step = error, TrimmedForward(own, own_loss, Trimmer(schedule), "exact", batch_dim=batch_dim)
        return cls(step, schedule, refused)

    @property
    def model(self) -> nn.Module:
        """The copy of the model."""
        return self.step.forward.inner

    def zero_grad(self) -> None:
        """Remove all gradients."""
        for parameter in self.named_parameters().values():
            parameter.grad = None

    def keep(self, fraction: float) -> None:
        """Keep this fraction from now on."""
        self.schedule.now = fraction
        self.step.trim.step()

    def state(self) -> ModelState:
        """Return a copy of what a forward may change."""
        return ModelState(self.model, self.step.forward.per_sample_loss, passed=self.passed)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the model, of its loss, and of modules that are not submodules."""
        if self.named is None:
            self.named = self._find_parameters()
        return self.named

    def _find_parameters(self) -> dict[str, nn.Parameter]:
        held = modules_of(self.model, self.step.forward.per_sample_loss, passed=self.passed)
        beside = ((f"{type(module).__name__} {number}", module) for number, module in enumerate(held))
        return dict(parameters_of(self.model, beside))

    def parameters(self) -> dict[str, Tensor]:
        """Return a copy of every parameter: a forward may move some (a momentum encoder). Lazy ones have no value."""
        held = self.named_parameters().items()
        return {name: p.detach().clone() for name, p in held if not nn.parameter.is_lazy(p)}

    def gradients(self) -> dict[str, Tensor]:
        """Return each parameter's gradient, zeros if it has none."""
        found = {}
        for name, p in self.named_parameters().items():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad.detach()
            found[name] = in_double(dense(gradient))
        return found
