"""The loss of a :class:`batchtrim.integrations.transformers.TrimmedTrainer`: found, trimmed and weighted.

Legend: W ranks, M micro-batches in a window (one optimizer step), n_rm entries in micro-batch m of rank r, N their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim.accumulation import first_pass, select_window, waits_in_forward
from batchtrim.choice import Choice
from batchtrim.engine.generators import GeneratorStates
from batchtrim.engine.wrappers import sync_buffers
from batchtrim.integrations import follow
from batchtrim.integrations._engine_step import EngineStep
from batchtrim.integrations._labels import Counting, count, loss_of, plain_sums, shares
from batchtrim.integrations._model_losses import FlatLosses, ModelLosses
from batchtrim.integrations._row_numbers import IDS
from batchtrim.keeplog.batch import logits_of
from batchtrim.reduction import reduce
from batchtrim.selection import Selection
from batchtrim.unreduced import Losses

__all__ = ["TrainerLoss"]


class TrainerLoss:
    """The loss that a TrimmedTrainer trains on.

    Args:
        trainer: a TrimmedTrainer.
        per_sample_loss, over, engine: its arguments.
    """

    def __init__(
        self, trainer: Any, per_sample_loss: Callable[[Any, Any], Any] | None, over: str, engine: str | None
    ) -> None:
        self.trainer, self.over, self.engine = trainer, over, engine
        self.model_losses = ModelLosses(trainer, per_sample_loss)
        self.evaluated: list[Tensor] = []
        self.start_training()

    def start_training(self) -> None:
        """Discard what an interrupted training left behind."""
        self.waits = False  # so that compute_loss is called
        self._countings: list[Counting] = []
        self._step: EngineStep | None = None
        self.end_training()

    def end_training(self) -> None:
        """Discard the window: a loss that is computed outside of training has no share of one."""
        self._batches: list[Any] = []  # the window's micro-batches, until the choice is made
        self._window: list[tuple[Selection, GeneratorStates]] = []
        self._shares: list[Tensor] | None = None  # of the micro-batches to come; None outside of training
        self._current: tuple[Tensor, Selection | None] | None = None  # share and choice of the micro-batch being run

    def start_window(self, batches: list[Any]) -> None:
        """Set the clock and compute each micro-batch's weight, before the first one in an optimizer step."""
        trainer, trim = self.trainer, self.trainer.trim
        source, names = self.model_losses, trainer.label_names
        self._countings = self._countings or source.prove(batches[0])
        follow(trim, trainer.state.global_step if trainer.clock == "step" else int(trainer.state.epoch or 0))
        prove = None if waits_in_forward(source.inner(trainer.model_wrapped)) else source.prove
        counts, self._countings = count(batches, names, self._countings, prove)
        across = trainer.args.average_tokens_across_devices
        self._shares = shares(counts.to(trainer.args.device), self.over, trim.scope, across)
        self._current = None
        self._batches = batches if self.over == "window" else []

    def start_micro_batch(self, model: nn.Module) -> None:
        """Before each micro-batch, choose from the window if not yet done, and set up its dropout again."""
        self.waits = True
        if self._batches:
            sync_buffers(model)
            self._choose_window(self.model_losses.inner(model))
        selection = None
        if self._window:
            selection, states = self._window.pop(0)
            states.restore()
        self._current = (self._shares.pop(0), selection) if self._shares else None

    def trimmed(self, model: nn.Module, inputs: Any, ids: Tensor | None) -> tuple[Tensor, Any]:
        """Return the loss of a micro-batch, times its share of the window and the window's length, and the outputs.

        A sum of terms that count differently has no such share: ranks are averaged as in plain training.
        A ``compute_loss`` that runs the model twice, as R-Drop does, asks for it twice.
        """
        self.waits = False
        trim = self.trainer.trim
        share, selection = self._share()
        if self.engine is not None:
            loss, outputs, terms = self._engine_step(model, inputs, ids)
        else:
            found = self.model_losses(model, inputs)
            outputs, terms = found.outputs, len(found.terms)
            if selection is not None:
                loss = reduce(found.losses, selection, trim.scale)
            else:
                loss = trim(found.losses, rank_by=found.scores)
                self._record(trim.last, ids, inputs, outputs)
        if terms and self.trainer.current_gradient_accumulation_steps > 1:
            raise ValueError(
                "expected `per_sample_loss` to return losses of one mean under gradient accumulation, got a sum of "
                f"{terms} terms that count differently, by which micro-batches have no common weight. Average them to "
                "one loss per sample, or set gradient_accumulation_steps=1."
            )
        if share is not None and not terms:
            loss = loss * (share * self.trainer.current_gradient_accumulation_steps).to(loss)
        return loss, outputs

    def _share(self) -> tuple[Tensor | None, Selection | None]:
        """Return the current micro-batch's share of the window, and its part of the window's choice."""
        if self._current is not None:
            return self._current
        if self._shares is None:
            return None, None
        # a training_step of the user's own, which does not call the Trainer's: one loss a micro-batch
        name = type(self.trainer).__name__
        if self.over == "window":
            raise TypeError(
                f"expected {name}.training_step to call super().training_step(...) with over='window', got one of its "
                "own. The window is chosen from there: leave `over` at 'micro', or call it."
            )
        if not self._shares:
            raise TypeError(
                f"expected {name}.training_step to compute one loss for each micro-batch, got a further one, whose "
                "micro-batch cannot be told. Call super().training_step(...), and compute both in compute_loss."
            )
        return self._shares.pop(0), None

    def plain(self, model: nn.Module, inputs: Any) -> tuple[Tensor, Any]:
        """Return the untrimmed loss and the model's outputs, for evaluation.

        The Trainer's number of items is not passed on: if it takes a shifted loss for an unshifted one, that number
        counts other labels.
        """
        source = self.model_losses
        if source.per_sample_loss is None and not source.smoothing:
            outputs = model(**inputs)
            return loss_of(outputs), outputs
        if source.per_sample_loss is None:
            found = source.find(model, inputs)
            return found.loss, found.outputs
        losses, outputs = source.own(model, inputs)
        self.evaluated.append(plain_sums(losses))
        loss = losses.mean()
        # the Trainer takes the first entry of a tuple as the loss
        return loss, (loss, *outputs) if type(outputs) is tuple else outputs

    def mean_evaluated(self) -> float:
        """Return the mean over all entries (not batches) that :meth:`plain` saw, on all ranks."""
        total = self.trainer.accelerator.reduce(torch.stack(self.evaluated).sum(0), reduction="sum")
        return float((total[:, 0] / total[:, 1].clamp(min=torch.finfo(total.dtype).tiny)).sum())

    def _engine_step(self, model: nn.Module, inputs: Any, ids: Tensor | None) -> tuple[Tensor, Any, int]:
        if self._step is None:
            self._step = EngineStep(self.model_losses, self.trainer.trim, self.engine or "auto")
        loss = self._step(model, dict(inputs))
        assert self._step.last is not None
        outputs = self._step.last.outputs
        self._record(self.trainer.trim.last, ids, inputs, outputs)
        return loss, outputs, len(self._step.last.selection.terms)

    def _choose_window(self, model: nn.Module) -> None:
        """Choose from all micro-batches of the window; training repeats the random numbers of the scoring pass."""
        trainer = self.trainer
        ids: list[Tensor] = []

        def score(batch: Any) -> FlatLosses:
            inputs = dict(trainer._prepare_inputs(batch))
            ids.extend([inputs.pop(IDS)] if IDS in inputs else [])
            with trainer.compute_loss_context_manager():
                return self.model_losses(model, inputs)._replace(outputs=None)

        parts, states = first_pass(model, self._batches, score)
        scores = [Losses(part.values if part.scores is None else part.scores).detach() for part in parts]
        chosen = select_window(trainer.trim, [part.losses for part in parts], scores)
        self._window = list(zip(chosen, states, strict=True))
        self._batches = []
        self._record(trainer.trim.last, torch.cat(ids) if ids else None, {}, None)

    def _record(self, choice: Choice | None, ids: Tensor | None, inputs: Any, outputs: Any) -> None:
        if self.trainer.keep_log is None:
            return
        labels = inputs.get("labels")
        classes = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
        logits = logits_of(outputs, len(labels)) if classes else None
        if logits is not None:
            self.trainer.keep_log.record(choice, ids=ids, outputs=logits.detach(), labels=labels)
        else:
            self.trainer.keep_log.record(choice, ids=ids)
