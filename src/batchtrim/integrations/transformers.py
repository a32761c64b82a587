"""Hugging Face Trainer (transformers 5) with a trimmed loss, and no model patched.

::

    trainer = TrimmedTrainer(model=model, args=args, train_dataset=data, keep=batchtrim.linear(1.0, 0.2))

The Trainer takes what ``compute_loss_func`` returns as normalised over the accumulation window and all ranks already:
a mean of the kept would come out (accumulation x ranks) times too large, with no error. Here micro-batch m of rank r,
trimmed to the loss L_rm of n_rm samples (or tokens), counts by its share of the N in the window of all ranks:

    ``L = sum_rm (n_rm / N) * L_rm``

Legend: W ranks, M micro-batches in a window, B batch, T tokens.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim._checks import check_choice, import_extra
from batchtrim.accumulation import OVER, Before, first_pass, select_window
from batchtrim.integrations import CLOCKS, build, follow, log_values, total_of
from batchtrim.integrations.labels import count_labels, per_sample_loss, plain_mean, shares
from batchtrim.losses import Losses, flatten
from batchtrim.reduction import reduce
from batchtrim.schedules import linear
from batchtrim.selection import Selection
from batchtrim.trimmer import Trimmer

import_extra("transformers", "transformers", "TrimmedTrainer")

from transformers import Trainer, TrainerCallback  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint  # noqa: E402

__all__ = ["TrimmedTrainer"]


class TrimmedTrainer(Trainer):
    """``transformers.Trainer`` with mini-batch trimming. Evaluation is the plain mean over samples or tokens.

    Args:
        keep: the schedule. args, kwargs: the Trainer's.
        clock: "epoch" or "step" (optimizer steps); by default steps where ``max_steps`` is set, otherwise epochs.
        over: "micro" trims each micro-batch, "window" all of an optimizer step's, for one more forward without a graph.
        per_sample_loss: ``(outputs, labels) -> losses``, un-reduced. By default cross-entropy (shifted for causal
            language models), squared error or binary cross-entropy, by the form of the labels.
        trim_options: what else :class:`batchtrim.Trimmer` takes; ``unit="element"`` chooses tokens, not samples.

    Notes:
        ``trainer.trim`` is made when training starts, and saved by each rank in the checkpoint's folder. Logs get
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
        **kwargs: Any,
    ) -> None:
        self.over = check_choice("over", over, OVER)
        self.keep, self.trim_options = keep, dict(trim_options or {})
        build(keep, 2, self.trim_options)  # a wrong argument shows here and not when training starts
        super().__init__(*args, compute_loss_func=self._trimmed_loss, **kwargs)
        if self.label_smoother is not None or self.args.n_gpu > 1:
            raise ValueError(
                "expected no label smoothing by the Trainer and one device a process, got label_smoothing_factor="
                f"{self.args.label_smoothing_factor}, n_gpu={self.args.n_gpu}. Smooth in per_sample_loss; use torchrun."
            )
        self.clock = check_choice("clock", clock or ("step" if self.args.max_steps > 0 else "epoch"), CLOCKS)
        model: Any = self.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._shift = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self.per_sample_loss = per_sample_loss or self._default_loss
        self.trim: Trimmer | None = None
        self._checkpoint: str | None = None
        self._batches: list[Any] = []  # the window's micro-batches, until it is chosen from
        self._window: list[tuple[Selection, Before]] = []
        self._shares: list[Tensor] = []
        self.add_callback(_StateKeeper(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        path = get_last_checkpoint(self.args.output_dir or ".") if resume_from_checkpoint is True else None
        self._checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else path
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any) -> Any:
        """Once a window, before its first micro-batch: set the clock, and work out what each weighs."""
        found = super().get_batch_samples(epoch_iterator, num_batches, *args)
        batches = found[0]
        if self.trim is not None and batches:
            follow(self.trim, self.state.global_step if self.clock == "step" else int(self.state.epoch or 0))
            counts = torch.stack([count_labels(each, self.trim.unit, shift=self._shift) for each in batches])
            across = self.args.average_tokens_across_devices
            self._shares = shares(counts.to(self.args.device), self.over, self.trim.scope, across)
            self._batches = batches if self.over == "window" else []
        return found

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        model.train()
        if self._batches:
            self._choose_window(model if self.is_fsdp_enabled else self.accelerator.unwrap_model(model))
        if self._window:
            self._window[0][1].generators.restore()  # the dropout this micro-batch was scored under
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.trim is not None:
            logs.update(log_values(self.trim, self._mean_over_ranks))
        super().log(logs, *args, **kwargs)

    def _mean_over_ranks(self, numbers: Tensor) -> Any:
        return self.accelerator.reduce(numbers.to(self.args.device), reduction="mean")

    def _default_loss(self, outputs: Any, labels: Tensor) -> Losses:
        return per_sample_loss(outputs, labels, shift=self._shift)

    def _unreduced(self, outputs: Any, labels: Any) -> Losses:
        losses = self.per_sample_loss(outputs, labels)
        return losses if isinstance(losses, Losses) else Losses(losses)

    def _trimmed_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        losses = self._unreduced(outputs, labels)
        if self.trim is None or not torch.is_grad_enabled():
            loss = plain_mean(losses)
        else:
            if self._window:
                flat = flatten(losses, self.trim.unit)
                loss = reduce(flat.values, self._window.pop(0)[0], self.trim.scale, flat.weights)
            else:
                loss = self.trim(losses)
            loss = loss * self._shares.pop(0).to(loss)
        multiplied = self.args.average_tokens_across_devices and num_items_in_batch is not None
        return loss / self.accelerator.num_processes if multiplied else loss

    def _choose_window(self, model: nn.Module) -> None:
        """From all of the window's micro-batches; what they are trained under is what they were scored under."""
        trim = self.trim
        assert trim is not None

        def score(batch: Any) -> Losses:
            inputs = self._prepare_inputs(batch)
            labels = inputs["labels"]
            with self.compute_loss_context_manager():
                outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            return flatten(self._unreduced(outputs, labels), trim.unit)

        parts, states = first_pass(model, self._batches, score)
        self._window = list(zip(select_window(trim, parts), states, strict=True))
        self._batches = []


class _StateKeeper(TrainerCallback):
    """Makes the trimmer when training starts and keeps its state beside the checkpoint, one file a rank."""

    def __init__(self, trainer: TrimmedTrainer) -> None:
        self.trainer = trainer

    def _path(self, folder: str) -> str:
        return os.path.join(folder, f"trimmer_{self.trainer.args.process_index}.pt")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        endless = state.num_train_epochs > state.max_steps  # a data set without a length
        total = total_of(trainer.clock, None if endless else state.num_train_epochs, state.max_steps)
        trainer.trim = build(trainer.keep, total, trainer.trim_options)
        trainer._window, trainer._batches, trainer._shares = [], [], []
        trainer.accelerator.gradient_accumulation_steps = 1  # transformers 5.3 has it divide what is divided already
        if trainer._checkpoint is None:
            return
        path = self._path(trainer._checkpoint)
        if os.path.isfile(path):
            trainer.trim.load_state_dict(torch.load(path, weights_only=True))
        else:  # saved without trimming, or on fewer ranks
            warnings.warn(f"{path} is missing: only the clock goes on, generators and statistics do not", stacklevel=2)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if self.trainer.trim is not None and os.path.isdir(folder):
            torch.save(self.trainer.trim.state_dict(), self._path(folder))
