"""Lightning's training step intercepted, for ``TrimmingCallback(intercept=True)``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from batchtrim.integrations._labels import tensors_in
from batchtrim.integrations._loss_finder import LossFinder
from batchtrim.integrations._recorder import NotFound
from batchtrim.trimmer import Trimmer

__all__ = ["Interception"]


class Interception:
    """Trim the loss that a module's own ``training_step`` returns, and leave the module unchanged.

    During training, the module's ``training_step`` runs under :class:`batchtrim.integrations._recorder.Recorder`,
    which finds the un-reduced losses behind the loss, and proves on the first batch that they add up to it. If the
    step itself logs its loss, that is the plain one.

    It refuses manual optimization, in which the step runs backward by itself; a loss with terms that are not loss
    functions of ``torch.nn.functional`` (a regulariser, a contrastive or CTC loss); a step that calls a compiled
    function with the loss in it; and a batch without a tensor whose first dimension is the batch.

    Args:
        options: the Trimmer's.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.finder = LossFinder(options.get("unit", "sample"), apart=True)
        self._module: Any = None

    def start(self, trim: Trimmer, module: Any) -> None:
        """Wrap the module's own step in one that trims."""
        if not module.automatic_optimization:
            raise ValueError(
                f"expected automatic optimization with `intercept`, got {type(module).__name__} that runs backward by "
                "itself. Call self.trim(losses) in its training_step."
            )
        own = module.training_step

        @functools.wraps(own)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._trimmed(trim, own, args, kwargs)

        self._module = module
        module.training_step = training_step

    def end(self) -> None:
        """Restore the module's own step."""
        if self._module is not None:
            vars(self._module).pop("training_step", None)
            self._module = None

    def _trimmed(self, trim: Trimmer, own: Any, args: Any, kwargs: Any) -> Any:
        if not self._module.trainer.training:  # a validation_step calls it
            return own(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        if not tensors:
            raise ValueError("expected a batch with tensors, got none. Call self.trim(losses) in training_step.")
        try:
            found = self.finder(lambda: own(*args, **kwargs), _loss_of, len(tensors[0]), tensors)
        except _Skipped:
            return None
        except NotFound as reason:
            raise NotFound(
                f"expected a training_step whose loss is made of one loss per sample, got one where {reason}. "
                "Call self.trim(losses) in it, without `intercept`."
            ) from reason
        loss = trim(found.losses)
        return {**found.outputs, "loss": loss} if isinstance(found.outputs, Mapping) else loss


class _Skipped(NotFound):
    """The step returned None, so Lightning skips the batch."""


def _loss_of(output: Any) -> Any:
    if output is None:
        raise _Skipped
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise NotFound(f"it returned {type(output).__name__}, which is no loss")
    return loss
