"""Time functions on a machine that is never quite idle: interleaved, paired within a round, by median."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import batchtrim


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int, inner: int = 1) -> dict[str, list[float]]:
    """Return the seconds per call of each function in each of ``rounds`` rounds; in a round they take turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            _synchronize()
            start = time.perf_counter()
            for _ in range(inner):
                function()
            _synchronize()
            times[name].append((time.perf_counter() - start) / inner)
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Return the median of the ratios taken within each round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def environment() -> dict[str, Any]:
    """Return the environment of a measurement: versions, machine and date."""
    return {
        "batchtrim": batchtrim.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": time.strftime("%Y-%m-%d"),
    }


def parser_of(text: str | None, **numbers: int) -> argparse.ArgumentParser:
    """Return a parser with ``--json``, and an integer option for each of the given defaults.

    Args:
        text: the docstring of the benchmark's module; it becomes the help.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--json", help="write the result here, as JSON")
    return parser


def save(path: str | None, result: dict[str, Any]) -> None:
    """Write a result with its environment as JSON, if a path is given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
