"""Measure the cost of the lab: its loop beside a bare one, its overhead per run, and two workers against one.

python -m benchmarks.bench_lab [--runs 200] [--json out.json]
python -m benchmarks.bench_lab --loops speed:full,speed:loss_mass --rounds 11    # the loops alone
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from batchtrim.lab import records
from batchtrim.lab.execute import grid, progress, scheduler
from batchtrim.lab.present import report
from batchtrim.lab.run import loading
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.loop import Training
from batchtrim.lab.task import models
from batchtrim.lab.task.own_code import Code
from benchmarks.timing import interleaved, parser_of, ratio, save

SIZE, BATCH = 3200, 128
LOOPS = "resnet8:full,resnet8:trim,speed:full,speed:loss_mass"  # network:method


def loop(method: str, rounds: int, network: str = "resnet8") -> dict[str, Any]:
    """Time an epoch in the lab, with augmentation and records, relative to a loop written by hand without either.

    The network ``speed`` is trained with label smoothing, so that the time includes ranking by the unsmoothed loss.
    """
    dataset = "cifar10" if os.environ.get("BATCHTRIM_DATA") else "digits"
    settings: dict[str, Any] = {"keep_start": 0.6, "keep_end": 0.6} if method == "trim" else {}
    size = SIZE if dataset == "cifar10" else 1200
    config = RunConfig(
        dataset=dataset, model=network, method=method, epochs=100, train_size=size, threads=1,
        label_smoothing=0.1 if network == "speed" else 0.0, **settings,
    ).resolved()  # fmt: skip
    images = loading.load_images(config, None, None)
    training = Training(config, images)
    mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in (images.mean, images.std))
    x, y = (images.train_images.float() - mean) / std, images.train_labels
    model = models.build(network, images.shape, images.classes)
    if images.shape[0] > 1:  # the memory format that the lab trains in
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], 1e-3)

    def bare() -> None:
        model.train()
        for rows in torch.randperm(len(y)).split(BATCH):
            loss = F.cross_entropy(model(x[rows]), y[rows], label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def fetch() -> None:
        for rows in torch.randperm(len(y)).split(BATCH):
            training.batches(rows)

    times = interleaved({"bare": bare, "lab": training.train_epoch, "fetch": fetch}, rounds)
    row = {
        "method": method,
        "network": network,
        "dataset": dataset,
        "ratio": ratio(times, "lab", "bare"),
        "limit": 1.03,
    }
    row["fetch_share"] = ratio(times, "fetch", "lab")
    print(
        f"{dataset} {network} {method}: lab / bare {row['ratio']:.3f} (limit 1.03), "
        f"pipeline {row['fetch_share']:.1%} of an epoch (limit 5 %)",
        flush=True,
    )
    return row


def overhead(runs: int, workers: int, epochs: int) -> dict[str, Any]:
    """Return the milliseconds that a sweep of digits adds to the training of a run, and runs per second."""
    wanted = {"methods": ["full", "trim"], "seeds": runs // 2, "epochs": epochs, "threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        start = time.perf_counter()
        scheduler.run_all(grid.expand(wanted), scheduler.SharedOptions(out), progress.Quiet(), workers=workers)
        wall = time.perf_counter() - start
        seconds = sum(row["seconds"] + row["seconds_eval"] for row in records.read(out))
    row: dict[str, Any] = {
        "runs": runs,
        "epochs": epochs,
        "workers": workers,
        "wall": wall,
        "training": seconds,
        "runs_per_second": runs / wall,
    }
    row["overhead_ms"] = (wall * workers - seconds) / runs * 1e3
    print(
        f"{runs} digits runs of {epochs} epochs, {workers} workers: {wall:.1f} s, {row['runs_per_second']:.2f} runs/s, "
        f"{row['overhead_ms']:.1f} ms a run over the training itself (limit 50 ms)",
        flush=True,
    )
    return row


def own_task(runs: int) -> dict[str, Any]:
    """Return the milliseconds that the lab adds to a run of an own training function, and the report's seconds."""

    def task(run: Any) -> dict[str, float]:
        for _ in range(run.epochs):
            run.trim(torch.rand(64))
            run.log(error=0.5)
            run.trim.step()
        return {"error": 0.1 + 0.01 * torch.rand(()).item()}

    configs = grid.expand_task(Code.of(task), {"methods": ["full", "trim"], "seeds": runs // 2, "threads": 1})
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        scheduler.run_all(list(configs), scheduler.SharedOptions(Path(folder)), progress.Quiet(), workers=1)
        wall = time.perf_counter() - start
        rows = records.read(folder)
        start = time.perf_counter()
        report.write_report(rows, folder)
        report_s = time.perf_counter() - start
    row = {"runs": runs, "overhead_ms": (wall - sum(row["seconds"] for row in rows)) / runs * 1e3, "report_s": report_s}
    print(
        f"{runs} runs of a task: {row['overhead_ms']:.1f} ms a run over the task itself (limit 50 ms), "
        f"report {report_s:.2f} s",
        flush=True,
    )
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, runs=200, rounds=7)
    parser.add_argument("--long-runs", type=int, default=16, help="runs that are long enough to earn a worker's start")
    parser.add_argument("--loops", default="", help=f"time these loops and nothing else, as in {LOOPS}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pairs = [each.split(":") for each in (options.loops or LOOPS).split(",")]
    loops = [loop(method, options.rounds, network) for network, method in pairs]
    if options.loops:
        save(options.json, {"rounds": options.rounds, "loop": loops})
        return
    sweeps, gains = [], []
    for runs, epochs in ((options.runs, 10), (options.long_runs, 150)):
        one, two = (overhead(runs, workers, epochs) for workers in (1, 2))
        sweeps += [one, two]
        gains.append(two["runs_per_second"] / one["runs_per_second"])
        print(f"2 workers do {gains[-1]:.2f} times as many a second as 1")
    save(options.json, {"loop": loops, "sweep": sweeps, "workers_gain": gains, "own_task": own_task(options.runs)})


if __name__ == "__main__":
    main()
