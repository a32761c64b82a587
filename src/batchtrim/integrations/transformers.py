"""Hugging Face Trainer (transformers 5) with a trimmed loss; models stay unpatched.

::

    trainer = TrimmedTrainer(model=model, args=args, train_dataset=data, keep=batchtrim.linear(1.0, 0.2))

The loss is the one that the model computes from its labels. It is found and proven by
:class:`batchtrim.integrations._loss_finder.LossFinder`. Micro-batch m of rank r, trimmed to the loss L_rm of n_rm
samples (or tokens), is weighted by its share of the N in the window of all ranks:

    ``L = sum_rm (n_rm / N) * L_rm``

Legend: W ranks, M micro-batches in a window, B batch, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim._checks import check_choice, check_criterion, import_extra
from batchtrim.accumulation import OVER
from batchtrim.integrations import CLOCKS, build, check_resume_length, log_values
from batchtrim.integrations._row_numbers import IDS, numbered_rows
from batchtrim.keeplog import KeepLog
from batchtrim.schedules import linear
from batchtrim.trimmer import Trimmer
from batchtrim.unreduced import Losses

import_extra("transformers", "transformers", "TrimmedTrainer")

from transformers import Trainer  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402
from transformers.utils import logging  # noqa: E402

from batchtrim.integrations._trainer_loss import TrainerLoss  # noqa: E402
from batchtrim.integrations._trainer_state import StateKeeper, check_arguments, check_bases, check_smoothing  # noqa: E402

__all__ = ["TrimmedTrainer"]

logger = logging.get_logger(__name__)

# this makes the Trainer divide by the number of micro-batches, in every release
_DIVISION = {"model_accepts_loss_kwargs": False, "loss_is_scaled_for_ga": False}


class TrimmedTrainer(Trainer):
    """``transformers.Trainer`` with mini-batch trimming. Evaluation uses the model's own, untrimmed loss.

    Args:
        keep: the schedule.
        args, kwargs: passed to the Trainer.
        clock: "epoch" or "step" (optimizer steps); by default steps if ``max_steps`` is set, otherwise epochs.
        over: "micro" trims each micro-batch; "window" trims those of an optimizer step together, for one more forward.
        per_sample_loss: ``(outputs, labels) -> losses``, un-reduced, in place of the model's own loss. The labels are
            those called "labels", else those of ``label_names``, a tuple if there are several; the model gets the rest.
        trim_options: further arguments of :class:`batchtrim.Trimmer`; ``unit="element"`` chooses tokens, not samples.
        keep_log: a :class:`batchtrim.KeepLog` of ``train_dataset``; the batches carry their row numbers automatically.
        engine: as for :class:`batchtrim.TrimmedForward`, for a cheaper backward; without one, the plain graph is used.
        resume_length: "stretch" or "saved", for a checkpoint from a training of another length; see
            :meth:`batchtrim.Trimmer.load_state_dict`.

    Raises:
        ValueError: when training starts, if the model's loss is not a mean of per-sample losses that can be found.

    Notes:
        ``trainer.trim`` is made when training starts, and saved by each rank in the checkpoint's folder. Logs contain
        what :func:`batchtrim.integrations.log_values` returns. Data parallel only.
    """

    def __init__(
        self,
        *args: Any,
        keep: Callable[[float], float] | float = linear(1.0, 0.2),  # noqa: B008  (frozen)
        clock: str | None = None,
        over: str = "micro",
        per_sample_loss: Callable[[Any, Any], Tensor | Losses] | None = None,
        trim_options: Mapping[str, Any] | None = None,
        keep_log: KeepLog | None = None,
        engine: str | None = None,
        resume_length: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("over", over, OVER)
        self.keep, self.keep_log = keep, keep_log
        self.trim_options = dict(trim_options or {})
        self.resume_length = check_resume_length(resume_length)
        self.explained = False  # True once the log has explained its loss
        for name in kwargs.keys() & inspect.signature(Trimmer).parameters.keys():
            raise TypeError(
                f"expected `{name}` among `trim_options`, got it by itself. Pass trim_options={{'{name}': ...}}."
            )
        check_arguments(kwargs.get("compute_loss_func"), over, engine, self.trim_options, keep_log)
        if per_sample_loss is not None:
            check_criterion("per_sample_loss", per_sample_loss)
        check_bases(type(self), TrimmedTrainer, per_sample_loss)
        build(keep, 2, self.trim_options)  # report a wrong argument now, not when training starts
        super().__init__(*args, **kwargs)
        check_arguments(self.compute_loss_func, over, engine, self.trim_options, keep_log)
        check_smoothing(self.args.label_smoothing_factor, per_sample_loss)
        if self.args.n_gpu > 1:
            raise ValueError(f"expected one device per process, got n_gpu={self.args.n_gpu}. Use torchrun.")
        if per_sample_loss is None and getattr(self.args, "ddp_static_graph", None) and self.args.world_size > 1:
            raise ValueError(
                "expected `args` without ddp_static_graph, got it: DDP would take the gradient that finds the losses "
                "of a batch for its first backward. Leave it out, or pass per_sample_loss=(outputs, labels) -> losses."
            )
        self.clock = check_choice("clock", clock or ("step" if self.args.max_steps > 0 else "epoch"), CLOCKS)
        self.losses = TrainerLoss(self, per_sample_loss, over, engine)
        self.trim: Trimmer | None = None
        self._checkpoint: str | None = None
        self.keeper = StateKeeper(self)
        self.add_callback(self.keeper)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        path = get_last_checkpoint(self.args.output_dir or ".") if resume_from_checkpoint is True else None
        self._checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else path
        self.keeper.mark_log()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        if self.keep_log is None:
            return super().get_train_dataloader()
        with numbered_rows(self):
            return super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any) -> Any:
        found = super().get_batch_samples(epoch_iterator, num_batches, *args)
        if self.trim is not None and found[0]:
            self.losses.start_window(found[0])
        return found

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.losses.start_micro_batch(model.train())
        # compute_loss returns a micro-batch's loss, and the Trainer divides by their number whatever the model accepts:
        # what a subclass adds to it is then averaged too
        before = {name: getattr(self, name, None) for name in _DIVISION}
        chosen = self.trim and self.trim.last
        vars(self).update(_DIVISION)
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        finally:
            vars(self).update(before)
        if self.losses.waits:
            itself = self.trim is not None and self.trim.last is not chosen
            got = "calls self.trim, whose loss is not divided over the window" if itself else "trims nothing"
            raise TypeError(
                f"expected {type(self).__name__} to leave `compute_loss` alone, got one that {got}. "
                "Pass per_sample_loss=(outputs, labels) -> un-reduced losses in its place."
            )
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs.pop(IDS, None)
        if self.trim is not None and model.training and torch.is_grad_enabled():
            loss, outputs = self.losses.trimmed(model, inputs, ids)
        else:
            loss, outputs = self.losses.plain(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the Trainer does; with ``per_sample_loss`` the loss is the (weighted) mean over the data set."""
        self.losses.evaluated = []
        found = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        if self.losses.evaluated and found.metrics and f"{prefix}_loss" in found.metrics:
            found.metrics[f"{prefix}_loss"] = self.losses.mean_evaluated()
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, and add the values of :func:`batchtrim.integrations.log_values`.

        ``loss`` is the mean over the kept samples alone, so it may rise as keep falls. To judge training, use
        ``trim/mean_loss`` (over all samples) and ``eval_loss``.
        """
        if "loss" in logs and self.trim is not None:
            logs.update(log_values(self.trim, self._mean_over_ranks))
            if not self.explained and self.trim.keep < 1.0:
                self.explained = True
                logger.warning(
                    "`loss` is the mean over the kept samples, so it rises as keep falls; `trim/mean_loss` is over all."
                )
        super().log(logs, *args, **kwargs)

    def _mean_over_ranks(self, numbers: Tensor) -> Any:
        return self.accelerator.reduce(numbers.to(self.args.device), reduction="mean")
