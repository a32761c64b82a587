"""Compare what the engine `auto` estimates of steps on a GPU with what was measured there. It needs no GPU.

    python -m benchmarks.estimate_gpu records/2026-11-26-engine-gpu/{third,compiled-bf16,bert-256}.json

Each compiled case of `bench_gpu` is traced with its own batch size, but not run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import batchtrim
from batchtrim.engine import shared, sliced
from batchtrim.engine.cost import Cost, Machine, gpu
from benchmarks.bench_gpu import NETWORKS, precision_of

H200 = gpu(132, 9)


class _Traced(Exception):
    """The trace is made; the model itself need not run."""


def recorded(paths: Iterable[str | Path]) -> Iterator[dict[str, Any]]:
    """Yield the compiled cases of results of ``bench_gpu``."""
    for path in paths:
        cases = json.loads(Path(path).read_text(encoding="utf-8"))["cases"]
        yield from (case for case in cases if case["mode"] == "compiled" and "rows" in case)


def estimated(case: dict[str, Any], machine: Machine = H200) -> Cost:
    """Return the estimated cost of a step of a recorded case on another machine."""
    traces: list[sliced.SlicedStep] = []

    def planner(engine: shared.SharedEngine) -> sliced.SlicedStep:
        traces.append(plan(engine))
        return traces[-1]

    plan = shared.SharedEngine._planner
    build, batch_of, _ = NETWORKS[case["network"]]
    model = build().train()
    model.compile()
    x, y = batch_of(case["batch"], torch.device("cpu"))
    torch.compiler.reset()
    with (
        patch.object(shared, "EagerStep", side_effect=_Traced),
        patch.object(shared.SharedEngine, "_planner", planner),
        precision_of(case["dtype"], torch.device("cpu"))(),
        contextlib.suppress(_Traced),
    ):
        batchtrim.TrimmedForward(model, _loss, batchtrim.Trimmer(0.5), engine="shared")(x, y)
    with patch.object(sliced, "machine_of", lambda device: machine):
        return traces[-1].cost(True)


def _loss(outputs: Any, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.logits, y, reduction="none")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", help="JSON files of bench_gpu, measured on an H200")
    warnings.simplefilter("ignore")
    print("| network | B | device ms | Python ms | plain ms | q: estimated, measured | `auto` |")
    print("|---|---|---|---|---|---|---|")
    for case in recorded(parser.parse_args(arguments).records):
        cost = estimated(case)
        device, plain = cost.forward + cost.upper + cost.lower, case["rows"][0]["plain_ms"]
        ratios = [(row["keep"], cost.ratio(row["keep"]), row["ratios"]["shared"]) for row in case["rows"]]
        told = "; ".join(f"{keep}: {guess:.2f}, {measured:.2f}" for keep, guess, measured in ratios)
        cuts = "shared" if all(guess < shared.WORTH for _, guess, _ in ratios) else "exact"
        print(
            f"| {case['network']}, {case['dtype']} | {case['batch']} | {1e3 * device:.0f} | {1e3 * cost.python:.0f} "
            f"| {plain:.0f} | {told} | {cuts} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
