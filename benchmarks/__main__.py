"""Run all benchmarks one after another: ``python -m benchmarks [FOLDER]`` also writes each result there as JSON."""

from __future__ import annotations

import sys

from benchmarks import bench_core, bench_decode, bench_engine, bench_keeplog, bench_lab, bench_overhead

for bench in (bench_core, bench_decode, bench_engine, bench_keeplog, bench_lab, bench_overhead):
    name = bench.__name__.rpartition("bench_")[2]
    print(f"\n{name}: {(bench.__doc__ or '').splitlines()[0]}", flush=True)
    bench.main(["--json", f"{sys.argv[1]}/{name}.json"] if len(sys.argv) > 1 else [])
