"""Compare methods on text: classify TREC's questions with a small transformer in the Hugging Face Trainer.

    python -m studies.text_runs records/2026-11-24-trec/config.toml --out runs/trec [--data-dir DIR]

It writes records as the lab does, so that ``batchtrim report`` and ``batchtrim claims`` can read them. The same command
continues where it stopped; two processes with the same command share the work. ``full`` is transformers' own Trainer;
``studies/trainer_methods.py`` runs all other methods of the lab in it.

``batchtrim compare --task examples/17_own_text.py:train`` compares, on the same data and network, the methods that need
a trimmer only. Methods that need more, such as ``full_equal_compute`` and ``infobatch``, are in this study only.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from batchtrim.lab import records
from batchtrim.lab.files import load_toml
from batchtrim.lab.methods.base import Method, RunInfo
from batchtrim.lab.methods.table import find_method, make_schedule
from batchtrim.lab.run import environment
from batchtrim.lab.run.config import RunConfig
from studies.trainer_methods import count_samples, make_trainer

PADDING, UNKNOWN, WORDS = 0, 1, 2
SETTINGS = ("methods", "seeds", "epochs", "batch_size", "lr", "layers", "size", "length", "keep_end")


@cache
def texts(folder: str, split: str) -> tuple[list[list[str]], list[int]]:
    """Return the words and kinds (6) of the questions of a split."""
    (path,) = Path(folder, "trec").glob(f"{split}-*.parquet")
    table = pyarrow.parquet.read_table(path)
    return [re.findall(r"\w+|[^\w\s]", text.lower()) for text in table["text"].to_pylist()], table[
        "coarse_label"
    ].to_pylist()


@cache
def vocabulary(folder: str) -> dict[str, int]:
    """Return the words that the training questions use at least twice."""
    counts = Counter(word for words in texts(folder, "train")[0] for word in words)
    return {word: WORDS + row for row, word in enumerate(sorted(word for word, n in counts.items() if n > 1))}


def questions(folder: str, split: str, length: int) -> list[dict[str, Tensor]]:
    """Return questions as a Hugging Face data set does: ``input_ids``, ``attention_mask`` (length,), ``labels`` ()."""
    words, labels = texts(folder, split)
    known = vocabulary(folder)
    rows = []
    for line, label in zip(words, labels, strict=True):
        ids = [known.get(word, UNKNOWN) for word in line[:length]]
        padding = length - len(ids)
        rows.append(
            {
                "input_ids": torch.tensor(ids + [PADDING] * padding),
                "attention_mask": torch.tensor([1] * len(ids) + [0] * padding),
                "labels": torch.tensor(label),
            }
        )
    return rows


def new_model(settings: dict[str, Any], words: int, width: int) -> BertForSequenceClassification:
    """Return an untrained BERT for the six kinds."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=words, hidden_size=width, num_hidden_layers=settings["layers"], num_attention_heads=4,
            intermediate_size=4 * width, max_position_embeddings=settings["length"], num_labels=6,
        )
    )  # fmt: skip


def method_of(config: RunConfig, samples: int, width: int) -> Method:
    """Return the lab's method of a run."""
    keep = make_schedule(config.schedule or "constant", config.keep_start or 1.0, config.keep_end or 1.0)
    info = RunInfo(samples, 6, config.epochs, config.batch_size, config.seed, keep, width)
    spec = find_method(config.method)
    return spec.build(info, spec.check_params(config.method_params))


def run(config: RunConfig, settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Do one run; return its row for ``runs.jsonl``."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    torch.manual_seed(config.seed)
    size, length = settings["size"], settings["length"]
    build = partial(new_model, settings, WORDS + len(vocabulary(folder)))
    model = build(size)
    learn = questions(folder, "train", length)
    method = method_of(config, len(learn), size)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=config.batch_size, learning_rate=config.lr or 0.0,
            weight_decay=config.weight_decay or 0.0, lr_scheduler_type="cosine", seed=config.seed, report_to=[],
            save_strategy="no", logging_steps=10**9, disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        common = {"model": model, "args": arguments, "train_dataset": learn}
        trainer = make_trainer(method, config.method == "full", build, size, **common)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        found = trainer.predict(questions(folder, "test", length))
    error = float((found.predictions.argmax(1) != found.label_ids).mean())
    forward, backward = count_samples(trainer)
    return {
        "schema": records.SCHEMA,
        "key": config.key,
        "config": config.to_dict() | {"model": f"bert-{settings['layers']}x{size}"},
        "status": "finished",
        "test_error": error,
        "seconds": seconds,
        "seconds_eval": time.perf_counter() - start - seconds,
        "samples_forward": forward,
        "samples_backward": backward,
        "steps": trainer.state.global_step,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "curve": {"epoch": [math.ceil(method.epochs) - 1], "test_error": [error]},
        "environment": environment.environment(config),
        "started": started,
    }


def configs(settings: dict[str, Any]) -> list[RunConfig]:
    """Return the runs, seeds varying slowest.

    Raises:
        ValueError: a setting is missing, or no such method is known.
    """
    if missing := [name for name in SETTINGS if name not in settings]:
        raise ValueError(f"expected settings {', '.join(SETTINGS)}, got none called {', '.join(missing)}.")
    keep = {"keep_start": 1.0, "keep_end": settings["keep_end"], "schedule": "linear"}
    shared = {"dataset": "trec", "model": "bert", "optimizer": "adamw", "weight_decay": 0.01, "momentum": 0.0}
    shared |= {"lr_schedule": "cosine", "augment": "none", "device": "cpu"}
    shared |= {name: settings[name] for name in ("lr", "epochs", "batch_size")}
    seeds = settings["seeds"]  # how many, or a list
    return [
        RunConfig(
            **shared,
            **(keep if find_method(method).uses_schedule else dict.fromkeys(keep)),
            method=method,
            method_params={"skip": 0.1} if method == "two_sided" else {},
            seed=seed,
        )
        for seed in (range(seeds) if isinstance(seeds, int) else seeds)
        for method in settings["methods"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="TOML file with the settings of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs.jsonl")
    parser.add_argument(
        "--data-dir", default=os.environ.get("BATCHTRIM_DATA"), help="folder with trec [BATCHTRIM_DATA]"
    )
    given = parser.parse_args()
    if not given.data_dir or not Path(given.data_dir, "trec").is_dir():
        parser.error(f"expected --data-dir with a folder trec in it, got {given.data_dir}.")
    try:
        settings = load_toml(given.settings)
        wanted = configs(settings)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    kept = records.Records(given.out)
    for config in wanted:
        with kept.claim(config.key) as mine:
            if mine:
                row = run(config, settings, given.data_dir)
                kept.append(row)
                print(
                    f"{config.method} seed {config.seed}: error {row['test_error']:.3f}, {row['seconds']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
