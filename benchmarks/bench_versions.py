"""Time the shared engine of this checkout beside that of another one, interleaved in one process.

    git worktree add ../before ddc1b7f^      # the last commit with the engine's first design
    python -m benchmarks.bench_versions ../before [--models resnet18-group,vit] [--json out.json]

The other package is copied under another name and imported beside this one; both run on the same network.
"""

from __future__ import annotations

import importlib
import re
import statistics
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import batchtrim
from benchmarks.bench_engine import CASES, KEEPS, classify, make_step
from benchmarks.timing import interleaved, parser_of, ratio, save

OTHER = "batchtrim_other"
# By how much the ratio may exceed the other's, at each keep fraction.
ALLOWANCES = {0.2: 0.02, 0.4: 0.02, 0.6: 0.04}


def load(checkout: Path, into: Path) -> ModuleType:
    """Import the package of another checkout, from a copy in which every mention of its name is changed."""
    source = checkout / "src" / "batchtrim"
    if not source.is_dir():
        raise FileNotFoundError(f"expected a checkout with src/batchtrim for `checkout`, got {checkout}.")
    for file in source.rglob("*.py"):
        target = into / OTHER / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(r"\bbatchtrim\b", OTHER, file.read_text(encoding="utf-8")), encoding="utf-8")
    sys.path.insert(0, str(into))
    return importlib.import_module(OTHER)


def step_of(package: ModuleType, model: Any, x: Any, y: Any, keep: float) -> Any:
    """Return one step of a package's shared engine."""
    engine = package.TrimmedForward(model, classify, package.Trimmer(keep), "shared")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        engine(x, y).backward()

    return step


def measure(name: str, other: ModuleType, keeps: tuple[float, ...], rounds: int) -> list[dict[str, Any]]:
    """Time both engines relative to a plain step."""
    build, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model, (x, y) = build().train(), inputs()
    rows = []
    for keep in keeps:
        steps = {"plain": make_step("plain", model, x, y, keep)}
        steps |= {which: step_of(package, model, x, y, keep) for which, package in
                  (("shared", batchtrim), ("other", other))}  # fmt: skip
        for step in steps.values():
            for _ in range(3):
                step()
        times = interleaved(steps, rounds)
        row: dict[str, Any] = {which: ratio(times, which, "plain") for which in ("shared", "other")}
        row |= {"model": name, "keep": keep, "plain_ms": 1e3 * statistics.median(times["plain"])}
        row["allowed"] = ALLOWANCES.get(keep)
        rows.append(row)
        limit = "" if row["allowed"] is None else f" (limit {row['other'] + row['allowed']:.3f})"
        print(f"{name:15s} q={keep:.1f} shared {row['shared']:.3f}{limit} other {row['other']:.3f}", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, rounds=7, threads=2)
    parser.add_argument("checkout", type=Path, help="folder of the other checkout")
    parser.add_argument("--models", default="resnet18-group,vit,bert,bert-no-dropout")
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keeps = tuple(float(keep) for keep in options.keeps.split(","))
    with tempfile.TemporaryDirectory() as folder:
        other = load(options.checkout, Path(folder))
        rows = [row for name in options.models.split(",") for row in measure(name, other, keeps, options.rounds)]
    save(options.json, {"versions": rows, "rounds": options.rounds})


if __name__ == "__main__":
    main()
