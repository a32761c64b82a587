"""Tiny models and batches for the Hugging Face tests, and the gradient of one optimizer step worked out by hand.

Runs in the test's own process (one rank) and as ``hf_cases.py RANK RANKS STORE`` in several.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from batchtrim import keep_count
from batchtrim.integrations.transformers import TrimmedTrainer

KEEP = 0.4
VOCABULARY = 32


def new_model(task: str, dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    if task == "causal":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=3,
    )  # fmt: skip
    return (BertForSequenceClassification if task == "sequence" else BertForTokenClassification)(config)


def data(task: str, n: int) -> list[dict[str, Any]]:
    """Return sequences of 4 to 9 tokens padded to 9; padding is no label."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(n):
        length = int(torch.randint(4, 10, (1,), generator=draw))
        tokens = torch.zeros(9, dtype=torch.int64)
        tokens[:length] = torch.randint(1, VOCABULARY, (length,), generator=draw)
        counted = torch.arange(9) < length
        labels = tokens if task == "causal" else torch.randint(0, 3, (9,), generator=draw)
        labels = labels[0] % 3 if task == "sequence" else torch.where(counted, labels, -100)
        rows.append({"input_ids": tokens, "attention_mask": counted.long(), "labels": labels})
    return rows


def arguments(folder: str, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = dict(
        per_device_train_batch_size=5, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False,
    )  # fmt: skip
    return TrainingArguments(folder, **{**defaults, **options})


class Gradient(TrainerCallback):
    """Record the gradient that the optimizer is about to step on."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.value = flat_gradient(model)


class Recording(TrimmedTrainer):
    """Remembers the micro-batches of the last window."""

    def get_batch_samples(self, *args: Any) -> Any:
        found = super().get_batch_samples(*args)
        self.seen = [{name: tensor.clone() for name, tensor in batch.items()} for batch in found[0]]
        return found


def flat_gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def losses_of(model: Any, batch: dict[str, Tensor], task: str, unit: str) -> tuple[Tensor, Tensor]:
    """Return the losses to choose from, (n,), and how many tokens each is the mean of, (n,)."""
    labels = batch["labels"]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    if task == "sequence":
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses, torch.ones_like(losses)
    if task == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    counted = labels != -100
    if unit == "element":
        return losses[counted], torch.ones_like(losses[counted])
    return (losses * counted).sum(1) / counted.sum(1), counted.sum(1).float()


def expected(model: Any, windows: list[list[dict[str, Tensor]]], task: str, options: dict[str, Any]) -> Tensor:
    """Return the loss of one optimizer step; ``windows[rank][micro]`` are batches."""
    unit, scope, over = (options.get(name, default) for name, default in DEFAULTS)
    grid = [[torch.stack(losses_of(model, batch, task, unit)) for batch in window] for window in windows]
    if scope == "global":  # ranks side by side are one batch
        grid = [[torch.cat(column, 1) for column in zip(*grid, strict=True)]]
    if over == "window":
        grid = [[torch.cat(row, 1)] for row in grid]
    if not options.get("across", True):  # each rank by itself, then the mean over ranks
        return sum(_weighted([row], options) for row in grid) / len(grid)  # type: ignore[return-value]
    return _weighted(grid, options)


DEFAULTS = (("unit", "sample"), ("scope", "local"), ("over", "micro"))


def _weighted(grid: list[list[Tensor]], options: dict[str, Any]) -> Tensor:
    """Return the mean over the kept tokens, each part weighted by its share of all tokens."""
    total = sum(counts.sum() for row in grid for _, counts in row)
    loss = torch.zeros(())
    for losses, counts in itertools.chain(*grid):
        kept = losses.topk(keep_count(KEEP, len(losses))).indices
        divisor = counts.sum() if options.get("scale") == "batch" else counts[kept].sum()
        loss = loss + counts.sum() / total * (losses * counts)[kept].sum() / divisor
    return loss


def check(task: str, accumulation: int, folder: str, **options: Any) -> None:
    """Compare one optimizer step of the trainer with the gradient and loss worked out by hand."""
    torch.manual_seed(1)
    gradient = Gradient()
    trainer = Recording(
        model=new_model(task),
        args=arguments(
            folder, gradient_accumulation_steps=accumulation, average_tokens_across_devices=options.get("across", True)
        ),
        train_dataset=data(task, 47),
        callbacks=[gradient],
        keep=KEEP,
        over=options.get("over", "micro"),
        engine=options.get("engine"),
        trim_options={name: options[name] for name in ("unit", "scope", "scale") if name in options},
    )
    trainer.train()
    windows: list[Any] = [trainer.seen]
    if dist.is_initialized():
        windows = [None] * dist.get_world_size()
        dist.all_gather_object(windows, trainer.seen)
    assert len(windows[0]) == accumulation
    model = new_model(task)
    loss = expected(model, windows, task, options)
    loss.backward()
    torch.testing.assert_close(gradient.value, flat_gradient(model), rtol=1e-4, atol=1e-7)
    logged = trainer.state.log_history[0]
    torch.testing.assert_close(torch.tensor(logged["loss"]), loss.detach(), rtol=1e-4, atol=1e-5)
    assert logged["trim/keep"] == KEEP


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sequence", {}),
    ("token", {"unit": "sample"}),
    ("token", {"unit": "element", "scale": "batch"}),
    ("causal", {"unit": "sample", "scale": "batch", "over": "window"}),
    ("causal", {"unit": "sample", "over": "window"}),
    ("causal", {"unit": "sample"}),
    ("causal", {"unit": "element"}),
    ("sequence", {"over": "window"}),
    ("causal", {"unit": "element", "over": "window"}),
    ("causal", {"unit": "element", "engine": "shared"}),
]
RANK_CASES: list[tuple[str, dict[str, Any]]] = [
    ("sequence", {}),
    ("token", {"unit": "sample", "across": False}),
    ("token", {"unit": "sample", "scope": "global", "scale": "batch"}),
    ("causal", {"unit": "element"}),
    ("causal", {"unit": "element", "scope": "global"}),
    ("causal", {"unit": "element", "scope": "global", "over": "window"}),
    ("causal", {"unit": "element", "over": "window"}),
    ("causal", {"unit": "sample", "over": "window", "across": False}),
    ("sequence", {"engine": "shared"}),
    ("causal", {"unit": "sample", "engine": "shared"}),
    ("causal", {"unit": "element", "engine": "shared"}),
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as output:
        for number, (each_task, each) in enumerate(RANK_CASES):
            steps = 4 if "over" in each or number % 2 else 1
            print(each_task, each, steps, file=sys.stderr, flush=True)
            check(each_task, steps, output, **each)
            assert dist.get_world_size() == int(sys.argv[2])
