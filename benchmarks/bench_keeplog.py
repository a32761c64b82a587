"""Measure the cost of a keep log: a training step with and without it, and the bytes for a million samples.

    python -m benchmarks.bench_keeplog [--json FILE]

Steps with and without it are interleaved, so that other load on the machine affects both alike. Goals: under 1 % of a
resnet8 step, and under 64 MiB for a million samples.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

import batchtrim
from batchtrim.lab.task import models
from benchmarks import timing

BATCH, SAMPLES = 128, 50_000


def step_cost(rounds: int) -> dict[str, Any]:
    """Return the seconds of a resnet8 step, those of recording a batch (its entry included), and their ratio."""
    torch.manual_seed(0)
    model = models.build("resnet8", (3, 32, 32), 10).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,))
    trim = batchtrim.Trimmer(0.5)

    def step() -> None:
        optimizer.zero_grad()
        trim(F.cross_entropy(model(x), y, reduction="none")).backward()
        optimizer.step()

    outputs, losses = torch.randn(BATCH, 10), torch.rand(BATCH)
    selection = trim.select(losses)
    logs = {"ids": batchtrim.KeepLog(SAMPLES), "ids, outputs, labels": batchtrim.KeepLog(SAMPLES, classes=10)}
    extra = {"ids": {}, "ids, outputs, labels": {"outputs": outputs, "labels": y}}
    records = {
        name: lambda log=log, more=extra[name]: _record(log, losses, selection, more) for name, log in logs.items()
    }
    per_step = 64  # a multiple of the batches that a log buffers, so that entering them is part of the time
    steps: list[float] = []
    costs: dict[str, list[float]] = {name: [] for name in records}
    step()
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        steps.append(time.perf_counter() - start)
        for name, record in records.items():
            start = time.perf_counter()
            for _ in range(per_step):
                record()
            costs[name].append((time.perf_counter() - start) / per_step)
    seconds = statistics.median(steps)
    return {
        "step_seconds": seconds,
        **{
            f"record ({name})": {"seconds": (cost := statistics.median(values)), "of a step": cost / seconds}
            for name, values in costs.items()
        },
    }


def memory(samples: int = 1_000_000) -> dict[str, Any]:
    """Return the bytes that a log of a million samples holds on the device."""
    log = batchtrim.KeepLog(samples)
    held = sum(column.untyped_storage().nbytes() for column in log._columns.values())
    return {"samples": samples, "MiB": held / 2**20, "bytes per sample": held / samples}


def _record(log: batchtrim.KeepLog, losses: torch.Tensor, selection: Any, extra: dict[str, Any]) -> None:
    log.record(batchtrim.Choice(losses, selection), ids=torch.randint(SAMPLES, (BATCH,)), **extra)


def main(arguments: list[str] | None = None) -> None:
    """Print the numbers, and save them if a path is given."""
    given = timing.parser_of(__doc__, rounds=30).parse_args(arguments)
    result = {"resnet8, batch 128": step_cost(given.rounds), "memory": memory()}
    for name, values in result.items():
        print(name)
        for what, value in values.items():
            print(f"  {what}: {value}")
    timing.save(given.json, result)


if __name__ == "__main__":
    main()
