"""Run all benchmarks one after another, and with a folder, write each result there as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import bench_core, bench_decode, bench_engine, bench_keeplog, bench_lab, bench_overhead

parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
parser.add_argument("folder", nargs="?", type=Path, help="for the results, one file per benchmark")
folder = parser.parse_args().folder
for bench in (bench_core, bench_decode, bench_engine, bench_keeplog, bench_lab, bench_overhead):
    name = bench.__name__.rpartition("bench_")[2]
    print(f"\n{name}: {(bench.__doc__ or '').splitlines()[0]}", flush=True)
    bench.main(["--json", str(folder / f"{name}.json")] if folder else [])
