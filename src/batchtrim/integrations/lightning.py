"""Lightning 2: a callback that gives the module a trimmer and keeps its clock, log and checkpoint.

::

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.trim(F.cross_entropy(self(x), y, reduction="none"))

    trainer = Trainer(max_epochs=30, callbacks=[TrimmingCallback(batchtrim.linear(1.0, 0.2))])

or, to leave the module unchanged, if its ``training_step`` returns the mean::

    trainer = Trainer(max_epochs=30, callbacks=[TrimmingCallback(batchtrim.linear(1.0, 0.2), intercept=True)])

Lightning divides by ``accumulate_grad_batches`` and averages over ranks: each micro-batch is trimmed by itself.
To trim a whole window, use manual optimization and :func:`batchtrim.accumulate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchtrim._by_name import by_name
from batchtrim._checks import check_choice, import_extra
from batchtrim.integrations import CLOCKS, build, check_resume_length
from batchtrim.integrations import _lightning_checks as checks
from batchtrim.keeplog import KeepLog
from batchtrim.schedules import linear
from batchtrim.trimmer import Trimmer

import_extra("lightning.pytorch", "lightning", "the Lightning callback")

from lightning.pytorch import Callback, LightningModule  # noqa: E402
from lightning.pytorch import Trainer as LightningTrainer  # noqa: E402

from batchtrim.integrations._lightning_clock import LightningClock  # noqa: E402
from batchtrim.integrations._lightning_log import LightningLog  # noqa: E402
from batchtrim.integrations._lightning_step import Interception  # noqa: E402

__all__ = ["TrimmingCallback"]


class TrimmingCallback(Callback):
    """Mini-batch trimming in a LightningModule: ``self.trim(losses)`` in place of their mean.

    It makes a :class:`batchtrim.Trimmer` when training starts and sets it on the module as ``trim``; a
    :class:`batchtrim.TrimmedForward` can be made from it in the module's ``on_train_start``. Before that, under a tuner
    (``lr_find``, ``scale_batch_size``), and in every validation and test, ``trim`` is a trimmer that keeps everything.

    Args:
        keep: the schedule.
        clock: "epoch" or "step"; by default steps if ``max_steps`` is set, otherwise epochs. A step is an
            optimizer step; under manual optimization it is a training batch, and with ``max_steps`` the steps that
            several optimizers make in one batch count as one.
        log: log ``trim/keep``, ``trim/kept``, ``trim/threshold``, ``trim/kept_loss``, ``trim/mean_loss`` and
            ``trim/ratio`` every ``log_every_n_steps`` and at the end of an epoch, averaged over ranks: the values since
            they were last logged. At the end of an epoch, ``callback_metrics`` has those of the whole epoch.
        attribute: the trimmer's name on the module. Several callbacks need one each, and log under it.
        intercept: trim the loss that an unchanged ``training_step`` returns (itself, or as "loss" in a dict); see
            :class:`batchtrim.integrations._lightning_step.Interception` for what it cannot do.
        keep_log: a :class:`batchtrim.KeepLog` that the module records into,
            ``self.keep_log.record(self.trim.last, ids=ids)``. The callback sets it on the module, saves it in the
            checkpoint and ends its epochs.
        resume_length: "stretch" or "saved", for a checkpoint from a training of another length, and for a further
            ``trainer.fit`` with more epochs; see :meth:`batchtrim.Trimmer.load_state_dict`.
        options: further arguments of :class:`batchtrim.Trimmer`: ``select``, ``scale``, ``unit``, ``scope``, ``seed``.

    Raises:
        ValueError: when training starts, if the length of training is unknown and the schedule needs it; at the end
            of the first epoch, if nothing was recorded into ``keep_log``.

    Warns:
        UserWarning: at the end of the first epoch, if the module never called its trimmer; at the end of training,
            if that came before the schedule's end and nothing stopped training early.

    Notes:
        A checkpoint holds the trimmer's state, that of rank 0 if there are several; with ``scope="local"`` and a rule
        that draws or has state, the other ranks continue from it.
    """

    @by_name
    def __init__(
        self,
        keep: Callable[[float], float] | float = linear(1.0, 0.2),  # noqa: B008  (frozen)
        *,
        clock: str | None = None,
        log: bool = True,
        attribute: str = "trim",
        intercept: bool = False,
        keep_log: KeepLog | None = None,
        resume_length: str | None = None,
        **options: Any,
    ) -> None:
        if clock is not None:
            check_choice("clock", clock, CLOCKS)
        checks.check_arguments(log, keep_log, attribute, intercept, options)
        build(keep, 2, options)  # report a wrong argument now, not when training starts
        self.keep, self.attribute, self.options = keep, attribute, options
        self.keep_log, self.resume_length = keep_log, check_resume_length(resume_length)
        self.clock = LightningClock(clock)
        self.interception = Interception(options) if intercept else None
        self.trim: Trimmer | None = None
        self._restored: dict[str, Any] | None = None
        self.logging = LightningLog(log)  # not `log`, which Lightning sets to a function
        self._before: Trimmer | None = None  # what the module has until training starts
        self._epochs, self._epoch = 0, 0

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # a tuner runs without callbacks, and the sanity check runs before training
            self.clock.max_epochs = trainer.max_epochs
            # a further fit of a trainer continues; a state from a checkpoint comes later, in place of this one
            restored = self._own_state(self.trim) if self.trim is not None and trainer.global_step > 0 else None
            self._restored, self.trim = restored, None
            checks.check_free(pl_module, self.attribute)
            if self.keep_log is not None:
                pl_module.keep_log = self.keep_log  # type: ignore[assignment]
        self._before = checks.keep_all(pl_module, self.attribute, self.options)

    def teardown(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        if self.trim is not None and checks.marked(getattr(pl_module, self.attribute, None)):
            setattr(pl_module, self.attribute, self.trim)  # the one it trains with

    def on_validation_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        checks.keep_all(pl_module, self.attribute, self.options)

    def on_validation_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        self.teardown(trainer, pl_module, "validate")

    # Not on_fit_start: asking for the number of steps there would set up the loader before its state is restored.
    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        self.trim = checks.mark(build(self.keep, self.clock.total(trainer, pl_module), self.options))
        self.logging.start(trainer)
        if (state := self._restored) is not None:
            if self.keep_log is not None and "keep_log" in state:
                self.keep_log.load_state_dict(state["keep_log"])
            self.logging.logged = state.get("logged")
            self.clock.load(self.trim, state, self.resume_length, trainer)
            if state.get("epoch", trainer.current_epoch) < trainer.current_epoch:
                self._end_epoch(trainer, pl_module)  # saved after its last batch, where Lightning does not end it
            self._restored = None
        self._epochs = 0
        setattr(pl_module, self.attribute, self.trim)
        if self.interception is not None:
            self.interception.start(self.trim, pl_module)

    def on_train_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        if self.interception is not None:
            self.interception.end()
        if self.trim is not None and not self.clock.kept:
            checks.check_over(self.trim, trainer, self.clock.unit)

    def on_exception(self, trainer: LightningTrainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.interception is not None:
            self.interception.end()

    def on_train_epoch_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        if self.trim is not None and self.clock.unit == "epoch":
            self.clock.follow(self.trim, trainer, pl_module)

    def on_train_batch_start(self, trainer: LightningTrainer, pl_module: LightningModule, *_: Any) -> None:
        self._epoch = trainer.current_epoch
        if self.trim is not None:  # by epochs too: resumed after an epoch's last batch, the next epoch has no start
            self.clock.follow(self.trim, trainer, pl_module)

    def on_train_batch_end(self, trainer: LightningTrainer, pl_module: LightningModule, *_: Any) -> None:
        self.logging.after_batch(self.trim, trainer, pl_module, self._log_name(trainer))

    def on_train_epoch_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        self._epochs += 1
        if self._epochs == 1:
            checks.check_used(pl_module, self.attribute, self.trim, self.keep_log, self._before)
        self._end_epoch(trainer, pl_module)

    def _end_epoch(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        self.logging.end_epoch(self.trim, trainer, pl_module, self._log_name(trainer))
        if self.keep_log is not None:
            self.keep_log.end_epoch()

    def _log_name(self, trainer: LightningTrainer) -> str:
        several = sum(isinstance(each, TrimmingCallback) for each in trainer.callbacks) > 1  # type: ignore[attr-defined]
        return self.attribute if several else "trim"

    @property
    def state_key(self) -> str:
        """The name of the state in a checkpoint; it depends on ``attribute``, so that several callbacks can be used."""
        own = super().state_key
        return own if self.attribute == "trim" else f"{own}[{self.attribute}]"

    def state_dict(self) -> dict[str, Any]:
        log = {} if self.keep_log is None else {"keep_log": self.keep_log.state_dict()}
        return {} if self.trim is None else {**self._own_state(self.trim), **log}

    def _own_state(self, trim: Trimmer) -> dict[str, Any]:
        return {**trim.state_dict(), **self.clock.state_dict(), "logged": self.logging.logged, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:  # before training; on_train_start continues from it
            self._restored = state_dict
