"""The state that a ``TrimmedTrainer`` saves beside its checkpoints, and checks of its arguments."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from batchtrim._checks import check_choice, describe
from batchtrim.engine.trimmed_forward import ENGINES
from batchtrim.integrations import build, load_state, total_of
from batchtrim.keeplog import KeepLog

__all__ = ["StateKeeper", "check_arguments", "check_bases", "check_smoothing"]


def check_bases(found: type, ours: type, per_sample_loss: Any) -> None:
    """Refuse a class in which another trainer's ``compute_loss`` would never be called, so that its loss is lost."""
    behind = found.__mro__[found.__mro__.index(ours) + 1 :]
    owner = next(each for each in behind if "compute_loss" in vars(each))
    if owner is not Trainer and per_sample_loss is None:
        raise TypeError(
            f"expected `per_sample_loss` beside {owner.__name__}, which computes its loss itself, got None. "
            f"{ours.__name__} comes first in the bases of {found.__name__}, so its compute_loss is used, with the "
            "model's own loss. Pass per_sample_loss=(outputs, labels) -> un-reduced losses (for a causal model, "
            f"batchtrim.token_losses(outputs.logits, labels, shift=True)); or put {owner.__name__} first, if its "
            "compute_loss calls super().compute_loss and its __init__ passes further keywords on."
        )


def check_arguments(
    compute_loss_func: Any, over: str, engine: str | None, options: Mapping[str, Any], keep_log: Any
) -> None:
    """Refuse arguments of a TrimmedTrainer that cannot be combined."""
    if compute_loss_func is not None:
        raise ValueError(
            f"expected `per_sample_loss` in place of `compute_loss_func`, got {describe(compute_loss_func)}. "
            "It returns one number, from which nothing can be selected: pass "
            "per_sample_loss=(outputs, labels) -> un-reduced losses, such as "
            "lambda outputs, labels: F.cross_entropy(outputs.logits, labels, reduction='none')."
        )
    if engine is not None:
        check_choice("engine", engine, ENGINES)
        if over == "window":
            raise ValueError(
                f"expected `over` 'micro' with an engine, got 'window' and {engine!r}. "
                "A window is scored in a separate pass: leave `engine` out."
            )
    if keep_log is not None and not isinstance(keep_log, KeepLog):
        raise TypeError(f"expected `keep_log` to be a batchtrim.KeepLog, got {describe(keep_log)}.")
    if keep_log is not None and options.get("unit", "sample") != "sample":
        raise ValueError("expected `unit` 'sample' with a `keep_log`, got 'element'. It counts whole samples.")


def check_smoothing(factor: float, per_sample_loss: Any) -> None:
    """Refuse label smoothing that would have no effect."""
    if factor and per_sample_loss is not None:
        raise ValueError(
            f"expected `label_smoothing_factor` 0 with a `per_sample_loss`, got {factor}. Smooth in your function: "
            f"F.cross_entropy(..., reduction='none', label_smoothing={factor})."
        )


class StateKeeper(TrainerCallback):
    """Makes the trimmer when training starts, and saves its state beside the checkpoint, one file per rank."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._log: dict[str, Any] | None = None  # the keep log's state when training began

    def mark_log(self) -> None:
        """Remember the keep log before training, which may start again: ``auto_find_batch_size``, or a search's trials.

        With ``model_init`` every training has a new model, so the log begins as it was before the first.
        """
        trainer = self.trainer
        if trainer.keep_log is not None and (self._log is None or trainer.model_init is None):
            self._log = trainer.keep_log.state_dict()

    def _path(self, folder: str) -> str:
        return os.path.join(folder, f"trimmer_{self.trainer.args.process_index}.pt")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        endless = state.num_train_epochs > state.max_steps  # the data set has no length
        total = total_of(trainer.clock, None if endless else state.num_train_epochs, state.max_steps)
        trainer.trim = build(trainer.keep, total, trainer.trim_options)
        trainer.losses.start_training()
        trainer.accelerator.gradient_accumulation_steps = 1  # transformers 5.3 would divide by it a second time
        if self._log is not None:
            trainer.keep_log.load_state_dict(self._log)
        if trainer._checkpoint is None:
            return
        path = self._path(trainer._checkpoint)
        if os.path.isfile(path):
            self._load(torch.load(path, weights_only=True), state.epoch)
        else:  # the checkpoint was saved without trimming, or on fewer ranks
            warnings.warn(f"{path} is missing: the clock is restored, generators and statistics are not", stacklevel=2)

    def _load(self, state: dict[str, Any], epoch: float | None) -> None:
        trainer = self.trainer
        log = state.pop("keep_log", None)
        load_state(trainer.trim, state, trainer.resume_length, "TrimmedTrainer", trainer.clock)
        if trainer.keep_log is not None and log is not None:
            trainer.keep_log.load_state_dict(log)
            if epoch and epoch == int(epoch):  # saved after an epoch's last step, before its end
                trainer.keep_log.end_epoch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.keep_log is not None:
            self.trainer.keep_log.end_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.losses.end_training()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if trainer.trim is None or not os.path.isdir(folder):
            return
        saved = trainer.trim.state_dict()
        if trainer.keep_log is not None:
            saved["keep_log"] = trainer.keep_log.state_dict()
        torch.save(saved, self._path(folder))
