"""Measure how much trimming adds to a step of each trainer.

    python -m benchmarks.bench_overhead [--rounds N] [--json FILE]

The time that trimming adds does not depend on the network, so it is measured with a network so small that a step is
mostly the trainer's own work. Short runs with and without trimming take turns, and a round gives the difference of
their median steps. It is divided by a step of a small real network (resnet8 on 64 images of 32 x 32; two layers of BERT
on 32 texts of 64 tokens) in the same trainer, measured in the same minutes. Half of each batch is kept, without an
engine, so nothing is saved in return. Goal: at most 2 %.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import batchtrim
from batchtrim.lab.task import models
from benchmarks import timing

KEEP, BATCH, LIMIT = 0.5, 64, 0.02
STEPS = {"tiny": 100, "real": 6}


def network(size: str) -> nn.Module:
    torch.manual_seed(0)
    if size == "tiny":
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    return models.build("resnet8", (3, 32, 32), 10)


def images(size: str) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    rows, width = STEPS[size] * BATCH, 4 if size == "tiny" else 32
    x, y = torch.randn(rows, 3, width, width, generator=draw), torch.randint(0, 10, (rows,), generator=draw)
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def plain_loop(size: str, trimmed: bool) -> list[float]:
    model, trim = network(size), batchtrim.Trimmer(KEEP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ends = [time.perf_counter()]
    for x, y in images(size):
        optimizer.zero_grad()
        outputs = model(x)
        loss = trim(F.cross_entropy(outputs, y, reduction="none")) if trimmed else F.cross_entropy(outputs, y)
        loss.backward()
        optimizer.step()
        ends.append(time.perf_counter())
    return ends


def with_accelerate(size: str, trimmed: bool) -> list[float]:
    from accelerate import Accelerator

    from batchtrim.integrations.accelerate import register

    accelerator = Accelerator(cpu=True)
    model = network(size)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    trim = register(accelerator, batchtrim.Trimmer(KEEP))
    ends = [time.perf_counter()]
    for x, y in images(size):
        with accelerator.accumulate(model):
            outputs = model(x)
            loss = trim(F.cross_entropy(outputs, y, reduction="none")) if trimmed else F.cross_entropy(outputs, y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(time.perf_counter())
    return ends


def with_lightning(size: str, trimmed: bool) -> list[float]:
    import lightning.pytorch as pl

    from batchtrim.integrations.lightning import TrimmingCallback

    ends: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network(size)

        def training_step(self, batch: Any, index: int) -> Tensor:
            ends.append(time.perf_counter())
            outputs = self.model(batch[0])
            if trimmed:
                return self.trim(F.cross_entropy(outputs, batch[1], reduction="none"))
            return F.cross_entropy(outputs, batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[TrimmingCallback(KEEP)] if trimmed else [],
        log_every_n_steps=50,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(images(size), batch_size=None))  # type: ignore[arg-type]
    return ends


def with_transformers(size: str, trimmed: bool) -> list[float]:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from batchtrim.integrations.transformers import TrimmedTrainer

    ends: list[float] = []

    class StepStarts(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    torch.manual_seed(0)
    width, layers = (8, 0) if size == "tiny" else (128, 2)
    config = BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * width, num_labels=4,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1000, (STEPS[size] * 32, 64 if size == "real" else 2), generator=draw)
    data = [{"input_ids": row, "labels": row[0] % 4} for row in tokens]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=STEPS[size], per_device_train_batch_size=32, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_steps=50, dataloader_pin_memory=False,
        )  # fmt: skip
        common: dict[str, Any] = {
            "model": BertForSequenceClassification(config), "args": args, "train_dataset": data,
            "callbacks": [StepStarts()],
        }  # fmt: skip
        trainer = TrimmedTrainer(**common, keep=KEEP) if trimmed else Trainer(**common)
        trainer.train()
    return ends


TRAINERS: dict[str, Callable[[str, bool], list[float]]] = {
    "plain loop": plain_loop,
    "Accelerate": with_accelerate,
    "Lightning": with_lightning,
    "HF Trainer": with_transformers,
}


def median_step(ends: list[float]) -> float:
    """Return the median time of a step, after a few steps to warm up."""
    gaps = [end - start for start, end in itertools.pairwise(ends)]
    return statistics.median(gaps[1:])


def overhead(rounds: int) -> dict[str, dict[str, float]]:
    found = {}
    for name, run in TRAINERS.items():
        added, steps = [], []
        for number in range(rounds + 1):
            order = (False, True) if number % 2 else (True, False)
            seconds = {trimmed: median_step(quietly(run, "tiny", trimmed)) for trimmed in order}
            if number:  # the first round warms up
                added.append(seconds[True] - seconds[False])
                steps.append(median_step(quietly(run, "real", False)))
        found[name] = {
            "added_us": statistics.median(added) * 1e6,
            "standard_error_us": statistics.stdev(added) / len(added) ** 0.5 * 1e6,
            "step_ms": statistics.median(steps) * 1e3,
            "added": statistics.median(added) / statistics.median(steps),
        }
    return found


def quietly(run: Callable[[str, bool], list[float]], size: str, trimmed: bool) -> list[float]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        return run(size, trimmed)


_RANK = """
import sys, time, statistics, torch, torch.distributed as dist, batchtrim
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
losses = torch.rand(int(sys.argv[3]), requires_grad=True)
for scope in ("local", "global"):
    trim = batchtrim.Trimmer(0.5, scope=scope)
    times = []
    for _ in range(300):
        dist.barrier()
        start = time.perf_counter()
        trim(losses).backward()
        times.append(time.perf_counter() - start)
    if sys.argv[1] == "0":
        print(statistics.median(times))
"""


def over_ranks(losses: int) -> dict[str, float]:
    """Return the microseconds of a call, forward and backward, on two local ranks over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        commands = [[sys.executable, "-c", _RANK, str(rank), f"{folder}/store", str(losses)] for rank in range(2)]
        ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        texts = [rank.communicate()[0] for rank in ranks]
    local, joint = (float(line) * 1e6 for line in texts[0].split())
    return {"losses_a_rank": losses, "local_us": local, "global_us": joint}


def main(arguments: list[str] | None = None) -> None:
    options = timing.parser_of(__doc__, rounds=15).parse_args(arguments)
    result = {"overhead": overhead(options.rounds), "over_ranks": [over_ranks(n) for n in (128, 8192)]}
    for name, each in result["overhead"].items():  # type: ignore[union-attr]
        print(
            f"{name:12s} trimming adds {each['added_us']:5.0f} us (standard error {each['standard_error_us']:.0f}) "
            f"to a step: {100 * each['added']:.2f} % of {each['step_ms']:.1f} ms (limit {100 * LIMIT:.0f} %)"
        )
    for each in result["over_ranks"]:  # type: ignore[assignment]
        print(
            f"{each['losses_a_rank']:5.0f} losses on each of 2 ranks: local {each['local_us']:.0f} us, "
            f"global {each['global_us']:.0f} us a call"
        )
    timing.save(options.json, result)


if __name__ == "__main__":
    main()
