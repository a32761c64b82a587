"""Lightning's clock, and its training step intercepted: what ``TrimmingCallback`` needs of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from batchtrim.integrations import total_of
from batchtrim.integrations._decompose import LossFinder
from batchtrim.integrations._intercept import NotFound
from batchtrim.integrations._labels import tensors_in
from batchtrim.trimmer import Trimmer

__all__ = ["Interception", "LightningClock"]


class LightningClock:
    """Lightning's progress, counted in epochs or steps.

    Under automatic optimization a step is an optimizer's. ``trainer.global_step`` counts all optimizers' steps. Under
    manual optimization, where there may be several, training batches are counted instead, and with ``max_steps``
    whatever ends training first.

    Args:
        unit: "epoch" or "step"; None to be told by the trainer.
    """

    def __init__(self, unit: str | None) -> None:
        self._given = unit
        self.unit = unit or "epoch"
        self.max_epochs: int | None = None  # as it was before others lengthen it: averaging weights takes one more

    def total(self, trainer: Any, module: Any) -> int | None:
        """Return what is counted up to; None where it is unknown."""
        self.unit = self._given or ("step" if trainer.max_steps > 0 else "epoch")
        if self.unit == "epoch":
            return total_of("epoch", self.max_epochs, None)
        if not module.automatic_optimization:
            self._batches = self._all_batches(trainer)
            return total_of("step", None, trainer.max_steps if trainer.max_steps > 0 else self._batches)
        steps = trainer.estimated_stepping_batches
        epochs, scheduling = self.max_epochs, _accumulation(trainer)
        if scheduling is not None and epochs is not None and epochs > 0 and trainer.num_training_batches < math.inf:
            factors = [scheduling[max(start for start in scheduling if start <= epoch)] for epoch in range(epochs)]
            steps = sum(math.ceil(trainer.num_training_batches / factor) for factor in factors)
            steps = min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps
        elif trainer.max_epochs and self.max_epochs and trainer.max_epochs > self.max_epochs > 0:
            steps = min(steps, math.ceil(self._all_batches(trainer) / trainer.accumulate_grad_batches))
        return total_of("step", None, steps)

    def now(self, trainer: Any, module: Any) -> int:
        """Return how many epochs or steps are done."""
        if self.unit == "epoch":
            now, most = trainer.current_epoch, self.max_epochs
            return now if most is None or most < 1 else min(now, most - 1)
        if module.automatic_optimization:
            return trainer.global_step
        done = trainer.fit_loop.epoch_loop.total_batch_idx
        if trainer.max_steps <= 0:
            return done
        share = 0 if math.isinf(self._batches) else math.floor(done * trainer.max_steps / max(1, self._batches))
        return max(trainer.global_step, share)

    def _all_batches(self, trainer: Any) -> float:
        epochs = self.max_epochs if self.max_epochs is not None and self.max_epochs > 0 else math.inf
        return trainer.num_training_batches * epochs


def _accumulation(trainer: Any) -> dict[int, int] | None:
    """Return how many batches are accumulated from which epoch on, where that changes."""
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler) and len(callback.scheduling) > 1:
            return {0: 1, **callback.scheduling}
    return None


class Interception:
    """Trims the number that a module's own ``training_step`` returns, with the module left as it is.

    While training lasts, the module's ``training_step`` runs under :class:`batchtrim.integrations._intercept.Recorder`,
    which finds the un-reduced losses behind the number, and proves on the first batch that they add up to it. What the
    step logs by itself is the plain loss.

    Not with manual optimization, where the step runs backward by itself; where the number has terms that are no loss
    function of ``torch.nn.functional`` (a regulariser, a contrastive or CTC loss); where the step calls a compiled
    function that holds the loss; and where the batch has no tensor whose first dimension is the samples'. Each is
    refused.

    Args:
        options: the Trimmer's.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.finder = LossFinder(options.get("unit", "sample"))
        self._module: Any = None

    def start(self, trim: Trimmer, module: Any) -> None:
        """Put the step that trims before the module's own."""
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
        """Take it away again."""
        if self._module is not None:
            vars(self._module).pop("training_step", None)
            self._module = None

    def _trimmed(self, trim: Trimmer, own: Any, args: Any, kwargs: Any) -> Any:
        tensors = tensors_in((args, kwargs))
        if not tensors:
            raise ValueError("expected a batch with tensors, got none. Call self.trim(losses) in training_step.")
        try:
            found = self.finder(lambda: own(*args, **kwargs), _loss_of, len(tensors[0]), tensors)
        except _Skipped:
            return None
        except NotFound as reason:
            raise NotFound(
                f"expected a training_step whose loss is made of one loss a sample, got one where {reason}. "
                "Call self.trim(losses) in it, without `intercept`."
            ) from reason
        loss = trim(found.losses, rank_by=found.scores)
        return {**found.outputs, "loss": loss} if isinstance(found.outputs, Mapping) else loss


class _Skipped(NotFound):
    """The step returned None, at which Lightning leaves the batch out."""


def _loss_of(output: Any) -> Any:
    if output is None:
        raise _Skipped
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise NotFound(f"it returned {type(output).__name__} and no loss")
    return loss
