"""Measure what calling the trimmer costs relative to a bare topk and to a training step, and what importing it costs.

python -m benchmarks.bench_core [--rounds 40] [--json out.json]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F

import batchtrim
from batchtrim.lab.task import models
from benchmarks.timing import interleaved, parser_of, ratio, save

KEEP = 0.2


def against_topk(batch: int, rounds: int, inner: int) -> dict[str, Any]:
    """Time forward and backward of ``trim(losses)``, relative to those of ``losses.topk(k).values.mean()``."""
    losses = torch.rand(batch, requires_grad=True)
    k = batchtrim.keep_count(KEEP, batch)
    trim = batchtrim.Trimmer(KEEP)
    functions = {
        "topk": lambda: losses.topk(k).values.mean().backward(),
        "trim": lambda: trim(losses).backward(),
    }
    times = interleaved(functions, rounds, inner)
    row = {"batch": batch, "ratio": ratio(times, "trim", "topk"), "limit": 1.4}
    row["topk_us"], row["trim_us"] = (1e6 * statistics.median(times[name]) for name in ("topk", "trim"))
    print(
        f"B={batch:6d}  topk {row['topk_us']:.1f} us  trim {row['trim_us']:.1f} us"
        f"  ratio {row['ratio']:.2f} (limit 1.4)"
    )
    return row


def mass_against_topk(batch: int, rounds: int, inner: int) -> dict[str, Any]:
    """Time ``loss_mass``, whose k follows from the losses, relative to a topk that is given the same k."""
    losses = (torch.rand(batch) ** 4).requires_grad_()  # a few hold most of the loss, as in a trained network
    trim = batchtrim.Trimmer(0.9, select=batchtrim.loss_mass())
    trim(losses)
    selection = trim.last_selection
    assert selection is not None
    k = selection.k
    functions = {
        "topk": lambda: losses.topk(k).values.mean().backward(),
        "loss_mass": lambda: trim(losses).backward(),
    }
    times = interleaved(functions, rounds, inner)
    row = {"batch": batch, "k": k, "ratio": ratio(times, "loss_mass", "topk"), "limit": 2.0}
    row["topk_us"], row["loss_mass_us"] = (1e6 * statistics.median(times[name]) for name in ("topk", "loss_mass"))
    print(
        f"B={batch:6d}  topk {row['topk_us']:.1f} us  loss_mass {row['loss_mass_us']:.1f} us (k={k})"
        f"  ratio {row['ratio']:.2f} (limit 2)"
    )
    return row


def against_a_step(rounds: int) -> dict[str, Any]:
    """Time the call as a share of a resnet8 step at B = 128."""
    model = models.build("resnet8", (3, 32, 32), 10)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    losses = torch.rand(128, requires_grad=True)
    trim = batchtrim.Trimmer(KEEP)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()

    times = interleaved({"step": step}, max(5, rounds // 4))
    calls = interleaved(
        {"mean": lambda: losses.mean().backward(), "trim": lambda: trim(losses).backward()}, rounds, 100
    )
    extra = statistics.median(a - b for a, b in zip(calls["trim"], calls["mean"], strict=True))
    row = {"step_ms": 1e3 * statistics.median(times["step"]), "extra_us": 1e6 * extra, "limit": 0.01}
    row["share"] = row["extra_us"] / row["step_ms"] / 1e3
    print(
        f"resnet8 step {row['step_ms']:.0f} ms, trim instead of mean adds {row['extra_us']:.0f} us:"
        f" {row['share']:.3%} (limit 1 %)"
    )
    return row


def import_time(runs: int = 5) -> dict[str, float]:
    """Return the milliseconds that ``import batchtrim`` adds to ``import torch``: the minimum of several runs."""
    code = "import time, torch; start = time.perf_counter(); import batchtrim; print(time.perf_counter() - start)"
    # with bytecode, which the first run leaves, also on a machine that is told to write none
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    times = [float(subprocess.run(command, capture_output=True, check=True, env=env).stdout) for _ in range(1 + runs)][
        1:
    ]
    print(f"import adds {1e3 * min(times):.0f} ms, median {1e3 * statistics.median(times):.0f} ms (limit 50 ms)")
    return {"least_ms": 1e3 * min(times), "median_ms": 1e3 * statistics.median(times), "limit_ms": 50.0}


def main(arguments: list[str] | None = None) -> None:
    options = parser_of(__doc__, rounds=40, threads=2).parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = [against_topk(128, options.rounds, 200), against_topk(65_536, options.rounds, 5)]
    mass = [mass_against_topk(128, options.rounds, 200), mass_against_topk(65_536, options.rounds, 5)]
    save(options.json, {"call": rows, "mass": mass, "step": against_a_step(options.rounds), "import": import_time()})


if __name__ == "__main__":
    main()
