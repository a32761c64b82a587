"""Run a micro-batch of a TrimmedTrainer through an engine."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from torch import Tensor, nn

from batchtrim.distributed import world_size
from batchtrim.engine import TrimmedForward
from batchtrim.engine.batch import StepResult
from batchtrim.engine.capture import without_logging
from batchtrim.errors import EngineFallback, EngineRefused
from batchtrim.integrations._forms import Form
from batchtrim.integrations._labels import without_labels
from batchtrim.integrations._model_losses import FlatLosses, ModelLosses
from batchtrim.trimmer import Trimmer

__all__ = ["EngineStep"]


class EngineStep:
    """Forward, choose, and a loss whose backward may cost the kept rows only.

    If the model's loss has a standard form (:mod:`batchtrim.integrations._forms`), the model itself runs in the
    engine, with its labels, and the losses are the form's. Otherwise its losses are recorded while it runs, and no
    graph can be traced: "shared" refuses, and "auto" continues with "exact".

    Args:
        losses: the losses trained on.
        trim: the trimmer.
        engine: a name, as for :class:`batchtrim.TrimmedForward`.
    """

    def __init__(self, losses: ModelLosses, trim: Trimmer, engine: str) -> None:
        self.losses, self.trim, self.engine = losses, trim, engine
        self.last: StepResult | None = None
        self._steps: dict[Form | None, TrimmedForward] = {}

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the loss; :attr:`last` holds the step, with the model's own outputs."""
        self.last = None
        if self.losses.per_sample_loss is not None:
            return self._own(model, inputs)
        if self.engine in ("shared", "auto"):
            form = self.losses.forms.of(model, inputs)
            loss = None if form is None else self._formed(model, inputs, form)
            if loss is not None:
                return loss
            self._refuse(model)
        return self._recorded(model, inputs)

    def _own(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Run the engine with the user's function, as in a plain loop."""
        step = self._steps.get(None)
        if step is None:
            step = TrimmedForward(model, self.losses.per_sample_loss, self.trim, self.engine)  # type: ignore[arg-type]
            self._steps[None] = step
        loss = step(*without_labels(inputs, self.losses.trainer.label_names))
        self.last = step.last
        return loss

    def _formed(self, model: nn.Module, inputs: dict[str, Any], form: Form) -> Tensor | None:
        step = self._steps.get(form)
        if step is None:
            rank_by = None if form.alike else form.scores
            step = self._steps[form] = TrimmedForward(model, form, self.trim, self.engine, rank_by=rank_by)
        with without_logging(logging.Logger.warning_once):  # type: ignore[attr-defined]  # transformers adds it
            loss = step(inputs, self.losses.forms.labels(inputs))
        last = step.last
        assert last is not None
        self.last = last
        if self.losses.forms.holds(form, last.losses, last.mask, last.outputs, inputs):
            return loss
        if world_size() > 1:  # an extra forward on a single rank would leave the others waiting
            self._refuse(model, always=True)
        return None

    def _refuse(self, model: nn.Module, always: bool = False) -> None:
        """Raise an error, or warn once, that the model's losses cannot be traced."""
        name = self.losses.name(model)
        said = f"the shared engine cannot run {name} with the loss that it computes: {self.losses.forms.reason}"
        if always or self.engine == "shared":
            raise EngineRefused(f"{said}. Pass per_sample_loss=(outputs, labels) -> un-reduced losses.")
        if None not in self._steps:
            warnings.warn(f"{said}. Continuing with engine='exact'.", EngineFallback, stacklevel=3)

    def _recorded(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        step = self._steps.get(None)
        if step is None:
            step = self._steps[None] = TrimmedForward(
                _WithLosses(self.losses, model),
                lambda found, _: found.losses,
                self.trim,
                "exact" if self.engine == "auto" else self.engine,
                rank_by=lambda found, _: found.values if found.scores is None else found.scores,
            )
        loss = step(inputs)
        assert step.last is not None
        self.last = step.last._replace(outputs=step.last.outputs.outputs)
        return loss


class _WithLosses(nn.Module):
    """The model, returning its losses beside its outputs."""

    def __init__(self, losses: ModelLosses, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._losses = losses

    def forward(self, **inputs: Any) -> FlatLosses:
        return self._losses(self.model, inputs)._replace(entries=None)  # a size is no output of a trace
