"""The standard form of a model's loss for each kind of batch, checked in every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim.engine.compilation import uncompiled
from batchtrim.engine.generators import GeneratorStates
from batchtrim.engine.model_facts import device_of
from batchtrim.engine.state import ModelState
from batchtrim.integrations._contributions import near
from batchtrim.integrations._form_search import find_form, fits
from batchtrim.integrations._forms import Form
from batchtrim.integrations._labels import loss_of, named_labels
from batchtrim.integrations._recorder import NotFound

__all__ = ["Forms", "left_as_found"]

_CHECK_EVERY = 100


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Restore buffers, plain attributes and random generators after an extra forward."""
    states, buffers = GeneratorStates(device_of(model)), ModelState(model)
    try:
        yield
    finally:
        states.restore()
        buffers.restore()


class Forms:
    """The forms of a model's loss.

    A form is proven on the first batch of each kind, and on every hundredth batch, in an extra forward. In every
    step the form's loss is also checked against the model's own.

    Args:
        losses: a :class:`batchtrim.integrations._model_losses.ModelLosses`.
    """

    def __init__(self, losses: Any) -> None:
        self.losses = losses
        self._known: list[Form] = []
        self._by_kind: dict[Any, Form | None] = {}
        self._calls = 0
        self.reason = ""  # why there is no form

    def labels(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return named_labels(inputs, self.losses.trainer.label_names)

    def of(self, model: nn.Module, inputs: Mapping[str, Any]) -> Form | None:
        """Return the form of a batch's losses, or None if there is none."""
        trainer, labels = self.losses.trainer, self.labels(inputs)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or not labels:
            self.reason = (
                "its parameters are sharded" if labels else "the batch has no labels under the Trainer's names"
            )
            return None
        kind = _kind(inputs)
        if kind in self._by_kind and self._by_kind[kind] is None:
            return None
        self._calls += 1
        if kind not in self._by_kind or self._calls % _CHECK_EVERY == 0:
            self._by_kind[kind] = self._prove(self.losses.inner(model), inputs, labels)
        return self._by_kind[kind]

    def holds(self, form: Form, values: Tensor, mask: Tensor | None, outputs: Any, inputs: Mapping[str, Any]) -> bool:
        """True if the form gives the model's own loss of a batch; otherwise the form is dropped.

        Args:
            values: the form's losses.
            mask: which of them count.
            outputs: the model's, with its loss.
        """
        true = loss_of(outputs).detach()
        ours = form.own_loss(values, mask, outputs, self.labels(inputs))
        if near(float(true), float(ours), true.dtype):
            return True
        self.reason = f"it was {float(true):.6g}, but its proven form gives {float(ours):.6g}"
        self._by_kind = {kind: None for kind in (*self._by_kind, _kind(inputs))}
        return False

    def _prove(self, model: nn.Module, inputs: Mapping[str, Any], labels: Mapping[str, Tensor]) -> Form | None:
        """Prove the form in an extra forward of the model's own Python code."""
        losses, eager = self.losses, uncompiled(model)
        parameters = [each for each in eager.parameters() if each.requires_grad]
        with left_as_found(eager), torch.enable_grad():
            try:
                found = losses.find(eager, inputs)
                for form in self._known:
                    if fits(form, found, labels, parameters):
                        return form
                form = find_form(found, labels, losses.unit, losses.smoothing, parameters)
            except NotFound as reason:
                self.reason = str(reason)
                return None
        if form is None:
            self.reason = "its loss has none of the standard forms"
            return None
        self._known.append(form)
        return form


def _kind(inputs: Mapping[str, Any]) -> Any:
    """Return the properties of a batch that may decide how a model computes its loss."""
    tensors = [(name, each.ndim, each.dtype, len(each) > 1) for name, each in inputs.items() if _is_batch(each)]
    return frozenset(tensors)


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
