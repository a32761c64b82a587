"""Compare with your own trainer: a small transformer that classifies TREC's six kinds of questions.

    batchtrim compare --task examples/17_own_text.py:train --methods full,trim,random,two_sided --epochs 6 --seeds 5
    batchtrim show runs/17_own_text-train-6ep    # the questions that stayed hard: the folder is named by the first

Needs BATCHTRIM_DATA with TREC in it (trec/{train,test}-*.parquet); `questions` is the place for your own texts.
"""

import os
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pyarrow.parquet
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from _data import command_line
from batchtrim.integrations.transformers import TrimmedTrainer  # was: from transformers import Trainer
from batchtrim.lab import Run, compare

PADDING, UNKNOWN, WORDS = 0, 1, 2
KINDS = ("abbreviation", "entity", "description", "human", "location", "number")
LENGTH, WIDTH = 24, 64


@cache
def texts(split: str) -> tuple[list[list[str]], list[int]]:
    """Return the words and kinds (6) of the questions of a split."""
    folder = Path(os.environ.get("BATCHTRIM_DATA", "."), "trec")
    path = next(folder.glob(f"{split}-*.parquet"), None)
    if path is None:
        raise FileNotFoundError(f"no {folder}/{split}-*.parquet. Set BATCHTRIM_DATA to the folder that holds trec")
    found = pyarrow.parquet.read_table(path)
    words = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in found["text"].to_pylist()]
    return words, found["coarse_label"].to_pylist()


@cache
def vocabulary() -> dict[str, int]:
    """Return the words that the training questions use at least twice."""
    counts = Counter(word for words in texts("train")[0] for word in words)
    return {word: WORDS + row for row, word in enumerate(sorted(word for word, n in counts.items() if n > 1))}


def questions(split: str, rows: int | None = None) -> list[dict[str, Tensor]]:
    """Return questions as a Hugging Face data set does: ``input_ids``, ``attention_mask`` (24,), ``labels`` ()."""
    found = []
    for line, label in zip(*(part[:rows] for part in texts(split)), strict=True):
        ids = [vocabulary().get(word, UNKNOWN) for word in line[:LENGTH]]
        rest = LENGTH - len(ids)
        mask = torch.tensor([1] * len(ids) + [0] * rest)
        found.append({"input_ids": torch.tensor(ids + [PADDING] * rest), "attention_mask": mask,
                      "labels": torch.tensor(label)})  # fmt: skip
    return found


def train(run: Run) -> dict[str, float]:
    rows = int(os.environ.get("TREC_ROWS", "0")) or None
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS + len(vocabulary()), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=4 * WIDTH, max_position_embeddings=LENGTH, num_labels=6,
        )
    )  # fmt: skip
    args = TrainingArguments(
        str(run.out), num_train_epochs=run.epochs, per_device_train_batch_size=64, learning_rate=2e-3,
        weight_decay=0.01, lr_scheduler_type="cosine", report_to=[], save_strategy="no", logging_steps=1000,
        disable_tqdm=True, use_cpu=run.device == "cpu",
        seed=run.seed,  # not the Trainer's own 42 in every run
    )  # fmt: skip
    words, kinds = (part[:rows] for part in texts("train"))
    log = run.keep_log(len(words), classes=len(KINDS))  # for `batchtrim show`: what was kept of every question,
    run.show(rows=[" ".join(each) for each in words], labels=kinds, classes=KINDS)  # and what it is
    trainer = TrimmedTrainer(  # was: Trainer(
        model=model, args=args, train_dataset=questions("train", rows), keep_log=log,
        keep=run.keep, trim_options=run.trim_options,  # the method's schedule and rule; the Trainer steps them
    )  # fmt: skip
    trainer.train()
    found = trainer.predict(questions("test"))
    return {"error": float((found.predictions.argmax(1) != found.label_ids).mean())}


def main(
    epochs: int = 6, seeds: int = 5, methods: str = "full,trim,random,two_sided", out: str = "runs/own-text"
) -> float:
    summary = compare(train, methods, seeds, epochs=epochs, out=out)
    for arm in summary.groups[0].arms:
        print(f"{arm.label}: error {100 * (arm.moments.mean or 0.0):.2f} %")
    return float(summary.groups[0].arms[0].moments.mean or 0.0)


if __name__ == "__main__":
    command_line(main)
