"""The un-reduced losses of a Hugging Face batch: the model's own, or those of the user's function."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from batchtrim._checks import check_losses
from batchtrim.engine.compilation import is_compiled, nothing_compiled, uncompiled
from batchtrim.integrations._form_table import Forms, left_as_found
from batchtrim.integrations._labels import (
    Counting,
    check_own,
    countings_of,
    countings_of_own,
    labels_of,
    loss_of,
    without_labels,
)
from batchtrim.integrations._loss_finder import Found, LossFinder
from batchtrim.integrations._recorder import NotFound
from batchtrim.integrations._row_numbers import IDS
from batchtrim.unreduced import Losses, flatten

__all__ = ["FlatLosses", "ModelLosses"]


class FlatLosses(NamedTuple):
    """A batch's losses to choose from, as a module returns them."""

    outputs: Any
    values: Tensor
    mask: Tensor | None
    weights: Tensor | None
    counts: Tensor | None
    scores: Tensor | None
    entries: int | None = None
    terms: tuple[Losses, ...] = ()

    @property
    def losses(self) -> Losses:
        return Losses(self.values, self.mask, self.weights, self.counts, terms=self.terms, entries=self.entries)


class ModelLosses:
    """The losses that a TrimmedTrainer selects from.

    Args:
        trainer: a TrimmedTrainer.
        per_sample_loss: ``(outputs, labels) -> losses``, or None for the model's own loss.

    Attributes:
        ran_eager: True once a compiled model has run uncompiled.
    """

    def __init__(self, trainer: Any, per_sample_loss: Callable[[Any, Any], Any] | None) -> None:
        self.trainer, self.per_sample_loss = trainer, per_sample_loss
        self.smoothing = trainer.args.label_smoothing_factor if trainer.label_smoother is not None else 0.0
        self.unit = trainer.trim_options.get("unit", "sample")
        self.finder = LossFinder(self.unit, self.smoothing)
        self.forms = Forms(self)
        self.ran_eager = False

    def inner(self, model: nn.Module) -> nn.Module:
        return model if self.trainer.is_fsdp_enabled else self.trainer.accelerator.unwrap_model(model)

    def is_compiled(self, model: nn.Module) -> bool:
        """True if the whole model is compiled, so that calls in it cannot be recorded; not if parts of it are."""
        return is_compiled(model) or is_compiled(self.inner(model))

    def name(self, model: nn.Module) -> str:
        return type(uncompiled(self.inner(model))).__name__

    def find(self, model: nn.Module, inputs: Any) -> Found:
        labels = labels_of(inputs, self.trainer.label_names)
        eager = uncompiled(model)
        try:
            with nothing_compiled() if self.is_compiled(model) else nullcontext():
                return self.finder(lambda: eager(**inputs), loss_of, len(labels[0]), labels)
        except NotFound as reason:
            raise NotFound(
                f"expected a model whose loss is made of one loss per sample, got {self.name(model)}: "
                f"{reason}. Pass per_sample_loss=(outputs, labels) -> un-reduced losses."
            ) from reason

    def own(self, model: nn.Module, inputs: Any) -> tuple[Losses, Any]:
        assert self.per_sample_loss is not None
        rest, labels = without_labels(inputs, self.trainer.label_names)
        outputs = model(**rest)
        try:
            losses = self.per_sample_loss(outputs, labels)
        except Exception as error:
            error.add_note("TrimmedTrainer calls per_sample_loss(outputs, labels) with what the model returns.")
            raise
        losses = losses if isinstance(losses, Losses) else Losses(losses)
        check_losses(losses.values, "per_sample_loss(outputs, labels)", allow_empty=True)
        return losses, outputs

    def __call__(self, model: nn.Module, inputs: Any) -> FlatLosses:
        if self.per_sample_loss is not None:
            losses, outputs = self.own(model, inputs)
            flat, scores = self.one_mean(losses), None
        elif (formed := self._compiled(model, inputs)) is not None:
            flat, scores, outputs = formed
        else:
            found = self.find(model, inputs)
            outputs, flat, scores = found.outputs, found.losses, found.scores
        return FlatLosses(outputs, flat.values, flat.mask, flat.weights, flat.counts, scores, flat.entries, flat.terms)

    def one_mean(self, losses: Losses) -> Losses:
        """Return the losses as the vector to choose from.

        Raises:
            ValueError: their reduction is "sum".
        """
        flat = flatten(losses, self.unit)
        if any(each.reduction != "mean" for each in flat.terms or (flat,)):
            raise ValueError("expected `per_sample_loss` to return losses of a mean, got a sum. Average them.")
        return flat

    def _compiled(self, model: nn.Module, inputs: Any) -> tuple[Losses, Tensor | None, Any] | None:
        """Return a compiled model's losses from their standard form; None if the model has to run uncompiled."""
        if not self.is_compiled(model):
            return None
        form = self.forms.of(model, inputs)
        if form is not None:
            outputs = model(**inputs)
            losses, scores = form.with_scores(outputs, self.forms.labels(inputs))
            if self.forms.holds(form, losses.values, losses.mask, outputs, inputs):
                return losses, scores, outputs
        if not self.ran_eager:
            self.ran_eager = True
            warnings.warn(
                f"{self.name(model)} runs without torch.compile here: only its Python shows its "
                "losses. With per_sample_loss=(outputs, labels) -> un-reduced losses it runs compiled.",
                stacklevel=2,
            )
        return None

    def prove(self, batch: Any) -> list[Counting]:
        """Return the ways to count that fit a batch, from an extra forward before training: errors show early."""
        trainer = self.trainer
        model = self.inner(trainer.model_wrapped).train()
        inputs = {name: value for name, value in trainer._prepare_inputs(batch).items() if name != IDS}
        with trainer.compute_loss_context_manager(), left_as_found(model):
            if self.per_sample_loss is None:
                found = self.find(model, inputs)
                return countings_of(found, labels_of(inputs, trainer.label_names))
            losses = self.own(model, inputs)[0]
            self.one_mean(losses)
            check_own(losses, labels_of(inputs, trainer.label_names), self.unit)
            return countings_of_own(losses, inputs, self.unit, trainer.label_names)
