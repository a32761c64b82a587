"""Run one forward on the whole batch and backward on the kept rows, by a traced graph that proves this right.

See :mod:`batchtrim.engine` for a tour.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchtrim.engine.batch import StepResult, map_tensors, padded_rows
from batchtrim.engine.batch_norm import cosine_of
from batchtrim.engine.capture import (
    CannotCapture,
    Capture,
    OneBatchSize,
    TooManyTraces,
    dynamic,
    hindrance,
    no_new_traces,
    unfit,
)
from batchtrim.engine.cost import TRACED_BELOW
from batchtrim.engine.eager import EagerStep, is_large
from batchtrim.engine.exact import ExactEngine, is_training_step
from batchtrim.engine.forward import Forward
from batchtrim.engine.generators import GeneratorStates
from batchtrim.engine.inductor import inductor_of
from batchtrim.engine.model_facts import device_of, is_lazy, is_sharded, no_values
from batchtrim.engine.reachable import Reachable
from batchtrim.engine.reasons import failure
from batchtrim.engine.rerun import OwnPython
from batchtrim.engine.rows import batch_size, tensors_of
from batchtrim.engine.sliced import NewTrace, SlicedStep
from batchtrim.engine.speech_models import speech_encoders, without_input_gradient
from batchtrim.engine.tape import Tape
from batchtrim.engine.traced_function import OF_TERMS, row_sizes, traced_function
from batchtrim.engine.unguarded import Unguarded
from batchtrim.engine.wrappers import check_backward, hooks_on_wrapper, in_wrapper, inside_join, runs_again
from batchtrim.errors import EngineFallback, EngineRefused
from batchtrim.losses import Losses
from batchtrim.reduction import reduce_kept
from batchtrim.selection import Selection
from batchtrim.selection.base import asks_for_all
from batchtrim.trimmer import Trimmer

__all__ = ["WORTH", "SharedEngine"]

_logger = logging.getLogger("batchtrim")

WORTH = 0.96  # of a plain step's estimated cost; above it, the saving is too small
_TRIES = 4  # how often one step is traced before the model is refused
_LASTS = 20  # steps per trace: if they are more, training changes in phases, and new traces replace the old ones
_CANNOT = "the shared engine cannot run this model: {}"
_FEWEST = 4  # rows: smaller batches are not worth a trace (torch makes a separate one for a batch of 1)

_NESTED = (
    "its batch holds a nested tensor, whose number of samples torch's tracer takes for a constant. Pass a padded "
    "tensor with a mask"
)
_KEPT_MEANS = "the means of BatchNorm's backward are taken over the kept rows"


class _TraceFails(CannotCapture):
    """A trace raises an error where the model does not, perhaps because the model catches it."""


class _SetsUp(Exception):
    """The model makes its layers in its first forward."""


class SharedEngine:
    """Run forward on B rows and backward on k. Costs (1 + 2q) / 3 of a plain step if no operator mixes rows.

    The first step traces model and loss together, and proves from the graph which operators of the backward give the
    same result on the kept rows alone. Backward runs on the kept rows from the loss down to the first operator that
    does not, and on all rows from there on. Only BatchNorm is approximate, and only if ``approximate`` is True.

    Args:
        approximate: take the means of BatchNorm's backward over the kept rows, and continue on these rows. Otherwise
            BatchNorm mixes rows like any other operator, and backward runs on all rows from there on.

    Raises:
        EngineRefused: on call, before anything has run: the model cannot be traced as one graph, or its loss mixes
            rows.
    """

    name = "shared"
    repeats_forward = True
    traces = True
    pays_below = TRACED_BELOW

    def __init__(self, forward: Forward, trim: Trimmer, *, approximate: bool = True) -> None:
        reason = refusal(forward)
        if reason is not None:
            raise EngineRefused(_CANNOT.format(reason))
        self.forward = forward
        self.trim = trim
        self.approximate = approximate
        self.exact = ExactEngine(forward, trim)
        self.refused: str | None = None
        self.was_looked_at = False
        self.was_run = False  # True once the model's own Python has run, before the first trace
        self.speech = speech_encoders(forward.inner)
        self.equates = True  # a trace treats sizes that are equal as one number
        self.failures = 0  # how often a trace failed where the model itself runs
        self.resets = -1  # how often all traces were discarded because something changed that no guard sees
        self._reset()
        self.judge: Callable[[Callable[[], float]], bool] | None = None  # decides whether to approximate, by a cosine
        self.logged = False  # True once the log says that it is approximate; a judge warns by itself
        self.trace: SlicedStep | None = None  # the trace that ran last
        self.untraced: set[int] = set()  # batch sizes that would each need a trace of their own
        self._tape: Tape | None = None

    def __call__(self, x: Any, y: Any, selection: Selection | None = None) -> StepResult:
        size = batch_size(x, self.forward.batch_dim)
        if size is None:
            reason = f"it finds no tensor of the batch in {type(x).__name__}. Pass the tensors in a tuple or dict"
            raise EngineRefused(_CANNOT.format(reason))
        whole = asks_for_all(self.trim.rule, self.trim.keep) or size < _FEWEST or size in self.untraced
        lazy = self.trace is None and is_lazy(self.forward.inner)  # never again after a trace
        if whole or lazy or not is_training_step():
            return self.exact(x, y, selection)
        if selection is not None and selection.terms:
            raise EngineRefused(_CANNOT.format(OF_TERMS))
        found = self._forward(x, y)
        if found is None:
            return self.exact(x, y, selection)
        tape, losses, outputs = found
        if selection is None:
            detached = losses.detach()
            selection = self.trim.select(detached, rank_by=self.forward.scores(detached, outputs, y)).rising()
        batch = tape.size = losses.values.shape[0]
        rows = padded_rows(selection)
        values = losses.values if selection.everything else losses.values.index_select(0, selection.indices)
        loss = reduce_kept(values, selection, self.trim.scale)
        approximate = None
        if tape.step is not None and rows.shape[0] < batch:
            self._cut(tape, loss, rows.sort().values)
            approximate = _KEPT_MEANS if self.approximate and tape.step.batch_norms else None
        check_backward(self.forward.model, loss)
        if approximate and self.judge is None and not self.logged:
            self.logged = True
            _logger.warning("engine='shared' is approximate for this model: %s.", approximate)
        name = self.exact.name if tape.step is None else self.name  # compilation is switched off (set_stance)
        return StepResult(loss, losses.values.detach(), outputs, selection, engine=name, approximate=approximate)

    def train_on_kept(self, x: Any, y: Any, selection: Selection, first: Any = None) -> Tensor:
        """Return the loss of rows that were selected before."""
        return self(x, y, selection).loss

    def pays(self, x: Any, y: Any) -> bool:
        """True if the trace saves enough or is not made yet; False once the model was refused."""
        if self.refused is not None:
            return False
        return self.trace is None or self.trace.cost(self.approximate).ratio(self.trim.expected_keep) < WORTH

    def _cut(self, tape: Tape, loss: Tensor, rows: Tensor) -> None:
        assert tape.step is not None
        self.trace = tape.step
        if self.judge is not None and tape.step.batch_norms:
            parameters = [each for each in self.forward.inner.parameters() if each.requires_grad]
            self.approximate = self.judge(lambda: cosine_of(tape, loss, rows, parameters))
        tape.cut(rows, self.approximate)

    def _reset(self) -> None:
        """Discard all traces."""
        self.resets += 1
        self.unguarded = Unguarded(self.forward)
        self.compiler = inductor_of(self.forward.model)
        self.capture = self._capture()

    def _capture(self, counts: bool = False) -> Capture:
        return Capture(
            traced_function(self.forward, self.equates, self.trim.scope),
            self._planner,
            compiler=self.compiler,
            counts=counts,
        )

    def _planner(self) -> SlicedStep:
        held = weakref.proxy(self)  # as a capture holds itself
        return SlicedStep(lambda: held._tape, self.approximate, self.forward.unit, self.compiler)

    def _forward(self, x: Any, y: Any) -> tuple[Tape, Losses, Any] | None:
        """Run the traced step; return its tape, the losses with their graph, and the model's outputs.

        Returns:
            None if there is a trace for other batch sizes and this one would need its own, or if the model makes its
            layers in this step.
        """
        if self.refused is not None:
            raise EngineRefused(self.refused)
        model = self.forward.model
        reason = hindrance() or hooks_on_wrapper(model) or no_values(self.forward.inner)
        if inside_join(model):
            reason = "inside DistributedDataParallel.join() it could not run a forward again. Use engine='exact'"
        if reason is not None:
            raise EngineRefused(_CANNOT.format(reason))
        if (changed := self.unguarded.changed()) is not None:
            if self.resets == _TRIES:
                self._refuse(f"{changed} changes from step to step, and torch's guards do not see it")
            self._reset()
        x = dict(x) if isinstance(x, Mapping) else x  # such as a BatchEncoding; the model gets its entries
        refused: EngineRefused | None = None
        try:
            with torch.enable_grad(), in_wrapper(model, self._traced) as call:
                parts, outputs, tape, eager = call(x, y)
        except _SetsUp:
            runs_again(model)
            return None
        except CannotCapture as error:
            runs_again(model)
            if (refused := self._without_trace(error, x, y)) is None:
                return None
        if refused is not None:  # raised here: in the handler, it would hold the model's frames
            raise refused
        coarse = tape.step is not None and tape.step.coarse
        differs = None if eager is None else eager.difference(parts[0], outputs, coarse)
        if eager is not None and differs is not None:
            eager.restore()
            runs_again(model)
            self._refuse(f"its trace differs from the model: {differs}")
        if tape.step is not None and eager is not None:
            tape.step.compared(again=eager.counts)
        return tape, Losses(*parts), map_tensors(Tensor.detach, outputs)

    def _without_trace(self, error: CannotCapture, x: Any, y: Any) -> EngineRefused | None:
        """Return the error of a step that cannot be traced, or None if only its batch size cannot."""
        one_size = isinstance(error, OneBatchSize)
        if one_size and self.trace is not None and len(self.untraced) < _TRIES:
            self.untraced.add(batch_size(x, self.forward.batch_dim) or 0)
            return None
        nested = one_size and any(each.is_nested for each in tensors_of((x, y)))
        refused = EngineRefused(_CANNOT.format(_NESTED if nested else error))
        fails = isinstance(error, _TraceFails)
        self.failures += fails
        if not (fails and self.failures < _TRIES) and not no_new_traces():
            self.refused = str(refused)  # for good
        return refused

    def _traced(self, x: Any, y: Any) -> Any:
        """Run the trace. Before a trace's first run, run the model's own Python to compare."""
        if self.trace is None and not self.was_looked_at:
            if self.compiler is None and (compiler := inductor_of(self.forward.model)) is not None:
                self.compiler = compiler  # it was compiled after the engine was made
                self.capture = self._capture()
            self._look_for_large_changes(x, y)
        eager: EagerStep | None = None
        device, made = device_of(self.forward.inner), False
        for _ in range(_TRIES):
            drawn, failed = GeneratorStates(device, of_numpy=False), ""  # no trace draws from NumPy's
            again = OwnPython(self.forward, self.trim.scope, x, y, drawn)
            self._tape = tape = Tape(compares=made, python=again)
            try:
                with without_input_gradient(self.speech), dynamic(row_sizes(x, y, self.forward)):
                    found = self.capture(x, y)
            except NewTrace:
                drawn.restore()  # a trace draws Python's random numbers before its graph runs
                self.unguarded.look()
                made = True
            except CannotCapture as error:
                lasting = self.capture.calls > _LASTS * self.capture.traces
                if isinstance(error, TooManyTraces) and (lasting or not self.capture.counts):
                    self.capture = self._capture(counts=True)
                    continue
                if isinstance(error, OneBatchSize) and self.trace is not None:
                    raise
                if isinstance(error, OneBatchSize) and self.equates:
                    # A size that the model's Python treats as a constant, such as that of its images, may only equal
                    # the batch size by chance.
                    self.equates = False
                    self.capture = self._capture()
                    continue
                # Perhaps only the set-up in a model's first forward (hooks, tables) prevented the trace. A faulty model
                # or loss raises its own error when it runs.
                if eager is not None or self.was_run:
                    raise
            except (torch.OutOfMemoryError, EngineFallback):  # the second where warnings are errors: Inductor fails
                raise
            except Exception as error:
                drawn.restore()
                failed = failure(error)
            else:
                again.losses = found[0][0].detach()
                return *found, tape, eager
            finally:
                self._tape = None
            # where the model is at fault, it raises its own error here, and leaves the state as it does
            if eager is None or not failed:
                eager = EagerStep(self.forward, x, y, gradients=made)
                if eager.sets_up and not self.was_run:
                    self.was_run = True
                    raise _SetsUp
            if failed:
                eager.restore()
                kind = CannotCapture if made else _TraceFails  # where it once ran, it may run again
                raise kind(f"its trace fails where the model itself has just run ({failed})")
        raise CannotCapture("its Python changes from run to run, so that no trace lasts")

    def _look_for_large_changes(self, x: Any, y: Any) -> None:
        """Refuse a forward that changes a container of many entries: every trace would rebuild it, for a minute."""
        self.was_looked_at = True
        held = Reachable(self.forward.inner, self.forward.per_sample_loss)
        if any(map(is_large, held.contents)):
            changed = EagerStep(self.forward, x, y).large_change()
            if changed is not None:
                raise CannotCapture(
                    f"its forward changes a {changed}, which torch's tracer would take too long to rebuild"
                )

    def _refuse(self, reason: str) -> NoReturn:
        self.refused = _CANNOT.format(reason)
        raise EngineRefused(self.refused)


def refusal(forward: Forward) -> str | None:
    """Return the reason why the engine cannot run a model, as far as is visible without running it, or None."""
    reason = unfit()
    if reason is not None:
        return reason
    if forward.unit == "element" and forward.batch_dim != 0:
        return "tokens are rows of a batch that comes first (batch_dim=0)"
    for name, module in forward.model.named_modules():
        what = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{what} is a script module, whose operators cannot be seen"
        if isinstance(module, nn.SyncBatchNorm):
            return f"{what} shares statistics between processes inside the forward"
        if isinstance(module, nn.DataParallel):
            return f"{what} splits the batch over devices itself; use DistributedDataParallel"
        if isinstance(module, DistributedDataParallel) and module.static_graph:
            return f"{what} has static_graph=True: it would take the check of the first trace for its first backward"
        if is_sharded(module):
            return f"{what} gathers its parameters in every forward"
    return None
