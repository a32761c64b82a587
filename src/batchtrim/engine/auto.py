"""Pick the cheapest engine that is right for a model, and say which it is and why."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchtrim.engine.batch import StepResult
from batchtrim.engine.batch_norm import LEAST_COSINE
from batchtrim.engine.compilation import compiled_part
from batchtrim.engine.cost import TRACED_BELOW, Forecast, OperatorCount, machine_of
from batchtrim.engine.exact import ExactEngine, is_training_step
from batchtrim.engine.forward import Forward
from batchtrim.engine.model_facts import device_of
from batchtrim.engine.protocol import Engine
from batchtrim.engine.two_pass import TwoPassEngine, redrawn
from batchtrim.errors import ApproximateGradient, EngineFallback, EngineRefused
from batchtrim.selection import Selection
from batchtrim.trimmer import Trimmer

__all__ = ["AutoEngine"]

_log = logging.getLogger("batchtrim.engine")

# A trace that does not pay at this keep fraction never pays.
_SMALLEST = 0.1
_JUDGE_EVERY = 300  # steps between two measurements of the error of BatchNorm's approximation


class AutoEngine:
    """Run "shared" if it pays, "two_pass" for compiled models that cannot be traced, otherwise "exact".

    The keep fraction and a count of operations and bytes decide what pays. No clock does, so that runs repeat. The
    first step that might pay runs with "exact" and is counted. A trace takes about a second, and what it imports up to
    another one; both happen as soon as 100 steps pay them back. On a GPU, cutting pays only if a step waits for the GPU
    and not for Python.

    BatchNorm runs in its approximate form while the measured cosine with the exact gradient is at least 0.95.
    """

    name = "auto"
    forecast: Forecast | None = None  # costs of a trace and of a step; None until a step has been counted

    def __init__(self, forward: Forward, trim: Trimmer) -> None:
        self.trim = trim
        self.exact = ExactEngine(forward, trim)
        self.saving: Engine | None = None  # the engine that cuts rows; None until it is made, or if none pays
        self._open = True  # whether an engine that cuts rows may still be made
        self._judged = 0
        self._explained = False
        self._warned = False
        self._warned_of_one_step = False
        compiled = compiled_part(forward.model) is not None
        if compiled or self.forecast is not None:
            self._prepare(compiled=compiled)

    def _prepare(self, *, compiled: bool = False, was_run: bool = False) -> None:
        """Make the engine that cuts rows. It imports torch's compiler, which takes up to two seconds."""
        from batchtrim.engine.shared import SharedEngine

        self._open = False
        try:
            self.saving = shared = SharedEngine(self.exact.forward, self.trim)
            shared.judge, shared.was_run = self._judge, was_run
            if compiled:
                self.forecast = Forecast(math.inf, 0.0)  # compared with the compilation, a trace costs nothing
        except EngineRefused as refused:
            self._switch(refused, stacklevel=5)

    def __call__(self, x: Any, y: Any, selection: Selection | None = None) -> StepResult:
        """Run one step; ``selection`` is given if the choice is already made."""
        if self._open and is_training_step() and (keep := self.trim.expected_keep) <= TRACED_BELOW:
            if self.forecast is None and compiled_part(self.exact.forward.model) is not None:
                self._prepare(compiled=True)  # it was compiled after the engine was made
            elif self.forecast is None:
                return self._counted(x, y, selection)
            elif self.forecast.pays(keep):
                self._prepare(was_run=True)
        if not self.pays(x, y):
            return self._watched(self.exact(x, y, selection))
        assert self.saving is not None
        try:
            step = self.saving(x, y, selection)
        except EngineRefused as error:
            refused = EngineRefused(str(error), error.selection)
        else:
            if not self._explained and self.saving.traces:
                self._explain()
            return self._watched(step)
        # Run it here, not in the handler: the error holds the model's frames, and with them hooks of checkpointing.
        step = self.exact(x, y, refused.selection if selection is None else selection)
        if getattr(self.saving, "refused", "") is None:
            self._warn_of_one_step(refused, stacklevel=4)
        else:
            self._switch(refused, stacklevel=4)
        return step

    @property
    def repeats_forward(self) -> bool:
        return self.running.repeats_forward

    @property
    def traces(self) -> bool:
        return self.running.traces

    @property
    def pays_below(self) -> float:
        return self.running.pays_below

    def train_on_kept(self, x: Any, y: Any, selection: Selection, first: Any = None) -> Tensor:
        """Return the loss, with a graph, of rows chosen earlier."""
        refused: EngineRefused | None = None
        if self.saving is not None and not self.saving.repeats_forward and self.pays(x, y):
            try:
                return self.saving.train_on_kept(x, y, selection, first)
            except EngineRefused as error:
                refused = EngineRefused(str(error))
        if first is not None:
            first[0].restore(batch=True)  # "exact" repeats the forward
        loss = self.exact(x, y, selection).loss
        if refused is not None:
            self._switch(refused, stacklevel=4)
        return loss

    def pays(self, x: Any, y: Any) -> bool:
        """True if the engine that cuts rows takes the step."""
        saving: Any = self.saving
        if saving is None or (keep := self.trim.expected_keep) > saving.pays_below:
            return False
        affordable = not saving.traces or saving.trace is not None or self.forecast is None or self.forecast.pays(keep)
        return affordable and saving.pays(x, y)

    def _counted(self, x: Any, y: Any, selection: Selection | None) -> StepResult:
        """Run an exact step, count its operations, and give up on a model for which no trace pays."""
        with OperatorCount(machine_of(device_of(self.exact.forward.model))) as count:
            step = self._watched(self.exact(x, y, selection))
        self.forecast = count.forecast(first=_first_trace())
        if not self.forecast.pays(_SMALLEST):
            self._open = False
            _log.info(
                "engine 'auto' continues with 'exact': a trace of this model takes about %.1f s, and 100 steps %.1f s; "
                "engine='shared' makes it anyway",
                self.forecast.trace,
                100 * self.forecast.step,
            )
        return step

    def _watched(self, step: StepResult) -> StepResult:
        """Return a step that notes whether second derivatives are asked of it, for which a trace runs twice."""
        if (self._open or step.engine == "shared") and step.loss.requires_grad:
            step.loss.register_hook(self._note_backward)
        return step

    def _note_backward(self, _: Tensor) -> None:
        # in a backward, grad mode means create_graph=True
        if torch.is_grad_enabled() and (self._open or self.saving is not None):
            self._open, self.saving = False, None
            _log.info("engine 'auto' continues with 'exact': backward runs with create_graph=True")

    @property
    def running(self) -> Engine:
        """The engine that runs a step if cutting pays."""
        return self.exact if self.saving is None else self.saving

    def _explain(self) -> None:
        """Log once what runs and why; give up for good if cutting never pays."""
        shared: Any = self.saving
        if shared.trace is None:
            return
        self._explained = True
        cost = shared.trace.cost(shared.approximate)
        mixing = shared.trace.mixing(shared.approximate)
        below = f"; on all rows from {mixing[0]} on, since {mixing[1]}" if mixing else ""
        _log.info("engine 'auto' runs 'shared': %.0f %% of the backward on the kept rows%s", 100 * cost.share, below)
        if cost.ratio(_SMALLEST) > 1.0:
            self.saving = None
            why = "this model is too small for cutting to pay"
            if cost.waits_for_python(_SMALLEST):
                why = "a step on batches of this size waits for Python, not for the device; engine='shared' cuts anyway"
            _log.info("engine 'auto' continues with 'exact': %s", why)

    def _judge(self, measure: Callable[[], float]) -> bool:
        """Return True if BatchNorm's backward may take its means over the kept rows in this step."""
        shared: Any = self.saving
        self._judged += 1
        if self._judged % _JUDGE_EVERY != 1:
            return shared.approximate
        cosine = measure()
        near = cosine >= LEAST_COSINE
        if not self._warned or near != shared.approximate:
            self._warned = True
            done = "continues on the kept rows alone" if near else "is whole from the last BatchNorm on, which is exact"
            warnings.warn(
                f"taking the means of BatchNorm's backward over the kept rows gives a gradient of cosine {cosine:.3f} "
                f"with the exact one: backward {done}.",
                ApproximateGradient,
                stacklevel=6,
            )
        return near

    def _warn_of_one_step(self, refused: EngineRefused, stacklevel: int) -> None:
        """Warn once that a step cannot be traced at the place it is called from; called elsewhere, it may be."""
        if not self._warned_of_one_step:
            self._warned_of_one_step = True
            warnings.warn(f"{refused}. This step runs with engine='exact'.", EngineFallback, stacklevel=stacklevel)

    def _switch(self, refused: EngineRefused, stacklevel: int) -> None:
        """Switch to another engine for good, and warn once, at the user's line."""
        forward = self.exact.forward
        compiled = self.trim.unit == "sample" and compiled_part(forward.model) is not None
        reason = redrawn(forward) if compiled else None
        two_pass = compiled and reason is None and (self.saving is None or self.saving.traces)
        self.saving = TwoPassEngine(forward, self.trim, approximate=False) if two_pass else None
        also = f", and {reason}" if reason else ""
        going_on = "two_pass" if two_pass else "exact"
        warnings.warn(f"{refused}{also}. Continuing with engine={going_on!r}.", EngineFallback, stacklevel=stacklevel)


def _first_trace() -> bool:
    """True if no trace was made in this process yet. Imports nothing."""
    capture = sys.modules.get("batchtrim.engine.capture")
    return capture is None or not capture.Capture.traced
