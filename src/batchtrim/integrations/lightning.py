"""Lightning 2: a callback that gives the module a trimmer and keeps its clock, log and checkpoint.

::

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.trim(F.cross_entropy(self(x), y, reduction="none"))

    trainer = Trainer(max_epochs=30, callbacks=[TrimmingCallback(batchtrim.linear(1.0, 0.2))])

Lightning divides by ``accumulate_grad_batches`` and averages over ranks by itself: each micro-batch is trimmed alone.
To trim a whole window use manual optimization and :func:`batchtrim.accumulate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batchtrim._checks import check_choice, import_extra
from batchtrim.integrations import CLOCKS, build, follow, log_values, total_of
from batchtrim.schedules import linear
from batchtrim.trimmer import Trimmer

import_extra("lightning.pytorch", "lightning", "the Lightning callback")

from lightning.pytorch import Callback, LightningModule  # noqa: E402
from lightning.pytorch import Trainer as LightningTrainer  # noqa: E402

__all__ = ["TrimmingCallback"]


class TrimmingCallback(Callback):
    """Mini-batch trimming in a LightningModule: ``self.trim(losses)`` in place of their mean.

    Makes a :class:`batchtrim.Trimmer` when training starts and sets it on the module as ``trim``; a
    :class:`batchtrim.TrimmedForward` can be made with it in the module's ``on_train_start``.

    Args:
        keep: the schedule.
        clock: "epoch" or "step" (optimizer steps); by default steps where ``max_steps`` is set, otherwise epochs.
        log: log ``trim/keep``, ``trim/kept``, ``trim/threshold``, ``trim/kept_loss``, ``trim/mean_loss`` and
            ``trim/ratio`` every ``log_every_n_steps`` and at the end of an epoch, averaged over ranks.
        attribute: the name on the module.
        options: what else :class:`batchtrim.Trimmer` takes: ``select``, ``scale``, ``unit``, ``scope``, ``seed``.

    Raises:
        ValueError: when training starts, where the length of training is unknown and the schedule needs it.

    Notes:
        A checkpoint holds the trimmer's state, rank 0's where there are several; with ``scope="local"`` and a rule that
        draws or remembers, the other ranks go on with that.
    """

    def __init__(
        self,
        keep: Callable[[float], float] | float = linear(1.0, 0.2),  # noqa: B008  (frozen)
        *,
        clock: str | None = None,
        log: bool = True,
        attribute: str = "trim",
        **options: Any,
    ) -> None:
        if clock is not None:
            check_choice("clock", clock, CLOCKS)
        build(keep, 2, options)  # a wrong argument shows here and not when training starts
        self.keep, self.clock, self.log, self.attribute, self.options = keep, clock, log, attribute, options
        self.trim: Trimmer | None = None
        self._restored: dict[str, Any] | None = None
        self._logged_at = 0

    # Not on_fit_start: to ask for the number of steps there would set up the loader before its state is restored.
    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        if self.clock is None:
            self.clock = "step" if trainer.max_steps > 0 else "epoch"
        steps = trainer.estimated_stepping_batches if self.clock == "step" else None
        self.trim = build(self.keep, total_of(self.clock, trainer.max_epochs, steps), self.options)
        if self._restored is not None:
            self.trim.load_state_dict(self._restored)
            self._restored = None
        self._logged_at = trainer.global_step
        setattr(pl_module, self.attribute, self.trim)

    def on_train_epoch_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        if self.trim is not None and self.clock == "epoch":
            follow(self.trim, trainer.current_epoch)

    def on_train_batch_start(self, trainer: LightningTrainer, *_: Any) -> None:
        if self.trim is not None and self.clock == "step":
            follow(self.trim, trainer.global_step)

    def on_train_batch_end(self, trainer: LightningTrainer, pl_module: LightningModule, *_: Any) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  (set outside its class)
        if every and trainer.global_step - self._logged_at >= every:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module)

    def _log(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        self._logged_at = trainer.global_step
        if not self.log or self.trim is None:
            return
        strategy, device = trainer.strategy, pl_module.device
        values = log_values(self.trim, lambda numbers: strategy.reduce(numbers.to(device), reduce_op="mean"))
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    def state_dict(self) -> dict[str, Any]:
        return {} if self.trim is None else self.trim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        if self.trim is not None:  # restored in the middle
            self.trim.load_state_dict(state_dict)
        else:
            self._restored = state_dict
