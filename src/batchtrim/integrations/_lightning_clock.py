"""Lightning's clock: the progress of a run, counted in epochs, steps or batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from batchtrim.integrations import follow, load_state, put, total_of
from batchtrim.trimmer import Trimmer

__all__ = ["LightningClock"]


class LightningClock:
    """Lightning's progress, counted in epochs or steps.

    Under automatic optimization a step is an optimizer step. Under manual optimization, several optimizers may step in
    one batch, and ``trainer.global_step`` counts all of their steps, so training batches are counted instead; with
    ``max_steps``, :class:`StepLimit` computes the progress.

    Args:
        unit: "epoch" or "step"; None leaves it to the trainer.
    """

    def __init__(self, unit: str | None) -> None:
        self._given = unit
        self.unit = unit or "epoch"
        self.max_epochs: int | None = None  # as first set: weight averaging adds an epoch
        self.limit: StepLimit | None = None
        self.kept = False  # whether the saved length of another training still applies

    def total(self, trainer: Any, module: Any) -> int | None:
        """Return the total to count to; None if it is unknown."""
        self.unit = self._given or ("step" if trainer.max_steps > 0 else "epoch")
        self.limit, self.kept = None, False
        if not module.automatic_optimization:
            if self.unit == "epoch":
                return total_of("epoch", self.max_epochs, None)
            batches = total_of("step", None, self._all_batches(trainer))
            if trainer.max_steps <= 0:
                return batches
            self.limit = StepLimit(trainer.max_steps, batches)
            return self.limit.at(trainer.global_step, _batches_done(trainer))[1]
        epochs, steps = self.max_epochs, self._all_steps(trainer)
        if self.unit == "step":
            return total_of("step", None, steps)
        known = steps < math.inf and trainer.num_training_batches < math.inf and _accumulation(trainer) is None
        if trainer.max_steps > 0 and known:
            each = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            most = math.ceil(steps / each)
            epochs = most if epochs is None or epochs < 1 else min(epochs, most)
        return total_of("epoch", epochs, None)

    def follow(self, trim: Trimmer, trainer: Any, module: Any) -> None:
        """Set a trimmer's clock, before an epoch or a batch."""
        if self.unit == "epoch":
            now, most = trainer.current_epoch, self.max_epochs
            follow(trim, now if most is None or most < 1 else min(now, most - 1))
        elif self.limit is not None:
            self.limit.count(trainer.global_step)
            put(trim, *self.limit.at(trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx))
        else:
            automatic = module.automatic_optimization
            follow(trim, trainer.global_step if automatic else trainer.fit_loop.epoch_loop.total_batch_idx)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.limit is None else {"limit": self.limit.state_dict()}

    def load(self, trim: Trimmer, state: Mapping[str, Any], length: str | None, trainer: Any) -> None:
        """Continue from a callback's state; ``length`` as for :func:`batchtrim.integrations.load_state`."""
        state = dict(state)
        saved, limit = state.pop("limit", None), None
        if saved is not None and self.unit == "step":
            steps, batches = trainer.global_step, _batches_done(trainer)
            limit = StepLimit.of(saved, steps)
            if self.limit is None:  # counts batches now
                state["steps"], state["total"] = batches, limit.rounds
            else:
                self.limit.learn(limit)
                put(trim, *self.limit.at(steps, batches))
                state["steps"], state["total"] = limit.at(steps, batches)
        ours = trim.total
        load_state(trim, state, length, "TrimmingCallback", self.unit)
        self.kept = trim.total != ours
        if self.kept and self.limit is not None and limit is not None:
            self.limit = limit

    def _all_steps(self, trainer: Any) -> float:
        steps = trainer.estimated_stepping_batches
        epochs, scheduling = self.max_epochs, _accumulation(trainer)
        if scheduling is not None and epochs is not None and epochs > 0 and trainer.num_training_batches < math.inf:
            factors = [scheduling[max(start for start in scheduling if start <= epoch)] for epoch in range(epochs)]
            steps = sum(math.ceil(trainer.num_training_batches / factor) for factor in factors)
            return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps
        if trainer.max_epochs and self.max_epochs and trainer.max_epochs > self.max_epochs > 0:
            steps = min(steps, math.ceil(self._all_batches(trainer) / trainer.accumulate_grad_batches))
        return steps

    def _all_batches(self, trainer: Any) -> float:
        epochs = self.max_epochs if self.max_epochs is not None and self.max_epochs > 0 else math.inf
        return trainer.num_training_batches * epochs


class StepLimit:
    """Progress towards ``max_steps`` under manual optimization, or towards the end of the last epoch if that is first.

    The number of steps per batch is known only while training runs: two optimizers make two, and a window accumulated
    by hand makes one in its last batch. Training ends with the batch that reaches M steps; it begins with M - N done:

        ``progress = g / (M - N)``,  or ``b / (T - 1)`` if that is larger

    If batches make different numbers of steps, the schedule reaches its end at the first batch that may be the last.

    Legend: g steps and b batches done, M ``max_steps``, N the most steps that a batch has made, T batches in all.

    Args:
        steps: M.
        batches: T, or None if it is unknown.
    """

    def __init__(self, steps: int, batches: int | None) -> None:
        self.steps, self.batches = steps, batches
        self.most, self.even = 0, True  # N, and whether every batch that made steps made N
        self._seen: int | None = None

    def count(self, steps: int) -> None:
        """Update N from the steps done: how many the last batch made."""
        made = 0 if self._seen is None else steps - self._seen
        self.even &= made in (0, self.most) or self.most == 0
        self.most, self._seen = max(self.most, made), steps

    def at(self, steps: int, batches: int) -> tuple[int, int]:
        """Return (now, total) for a trimmer's clock, after this many steps and batches."""
        most = max(1, self.most)
        last = (math.ceil(self.steps / most) * most if self.even else max(most, self.steps)) - most
        found = (min(steps, last), last + 1)
        if self.batches is None:
            return found
        other = (min(batches, self.batches - 1), self.batches)
        if (steps, batches) == (0, 0):
            return min(found, other, key=lambda each: each[1])
        return max(found, other, key=lambda each: each[0] / max(1, each[1] - 1))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "batches": self.batches, "most": self.most, "even": self.even, "seen": self._seen}

    @classmethod
    def of(cls, state: Mapping[str, Any], steps: int) -> StepLimit:
        """Return a limit saved after ``steps`` steps."""
        found = cls(state["steps"], state["batches"])
        found.most, found.even, found._seen = state["most"], state["even"], state["seen"]
        found.count(steps)
        return found

    def learn(self, other: StepLimit) -> None:
        """Take over what another limit knows of a batch's steps."""
        self.most, self.even, self._seen = other.most, other.even, other._seen

    @property
    def rounds(self) -> int:
        """The number of batches that make steps, as far as it is known."""
        return min(math.ceil(self.steps / max(1, self.most)), self.batches or self.steps)


def _batches_done(trainer: Any) -> int:
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def _accumulation(trainer: Any) -> dict[int, int] | None:
    """Return how many batches are accumulated from which epoch on, if that changes."""
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler) and len(callback.scheduling) > 1:
            return {0: 1, **callback.scheduling}
    return None
