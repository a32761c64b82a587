"""Measure how long decoding and caching own images takes, beside a bare Pillow loop on all cores, and its peak memory.

python -m benchmarks.bench_decode [--images 5000] [--json out.json]

Half are JPEG, half PNG, of 32 to 640 pixels a side; all end as 32 x 32. The bare loop reads, decodes and resizes each
file in threads, and keeps nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.timing import parser_of, save

CLASSES, SIDES = 10, (32, 64, 100, 160, 256, 400, 640)
MEMORY_LIMIT_MB, RATIO_LIMIT = 2048, 2.0
_LAB = """
import json, resource, sys, time
from batchtrim.lab.task import images
from batchtrim.lab.task.images import ImageOptions
begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
found = images.load(sys.argv[1], ImageOptions(image_size=32, test_split=0.2), cache_dir=sys.argv[2])
seconds = time.perf_counter() - start
images_, peak = len(found.train_labels) + len(found.test_labels), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"images": images_, "seconds": seconds, "peak_mb": peak / 1024, "begun_mb": begun / 1024}))
"""


def make_images(folder: Path, number: int) -> float:
    """Write images of all sizes in class folders; return their megabytes."""
    random = np.random.default_rng(0)
    size = 0
    for name in range(CLASSES):
        (folder / f"class{name}").mkdir(parents=True)

    def write(row: int, seed: np.ndarray, width: int, height: int) -> int:
        coarse = Image.fromarray(seed)
        file = folder / f"class{row % CLASSES}" / f"{row:06d}.{'jpg' if row % 2 else 'png'}"
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, compress_level=1)
        return file.stat().st_size

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, number, 256):
            jobs = []
            for row in range(first, min(first + 256, number)):
                width, height = (int(each) for each in random.choice(SIDES[: 5 if row % 8 else 7], 2))
                jobs.append(pool.submit(write, row, random.integers(0, 256, (8, 8, 3), np.uint8), width, height))
            size += sum(job.result() for job in jobs)
    return size / 1e6


def bare(folder: Path) -> float:
    """Return the seconds of a loop that reads, decodes and resizes every file, in a thread per core."""

    def one(files: list[Path]) -> None:
        for file in files:
            Image.open(file).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)

    files = sorted(folder.rglob("*.*"))
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, [files[first : first + 64] for first in range(0, len(files), 64)]))
    return time.perf_counter() - start


def measure(number: int) -> dict[str, Any]:
    """Decode ``number`` images in a process of its own, after a bare loop that also warms the disk's cache."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        megabytes = make_images(folder, number)
        floor = bare(folder)
        command = [sys.executable, "-c", _LAB, str(folder), str(Path(place) / "cache")]
        cold, warm = (json.loads(subprocess.check_output(command).splitlines()[-1]) for _ in range(2))
        floor = min(floor, bare(folder))
    row = {**cold, "megabytes": megabytes, "bare_seconds": floor, "ratio": cold["seconds"] / floor}
    row |= {"again_seconds": warm["seconds"], "limit_mb": MEMORY_LIMIT_MB, "limit": RATIO_LIMIT}
    print(
        f"{row['images']} images, {megabytes:.0f} MB: {row['seconds']:.1f} s, {row['images'] / row['seconds']:.0f} a "
        f"second, {row['ratio']:.2f} times a bare Pillow loop (limit {RATIO_LIMIT}); "
        f"peak {row['peak_mb']:.0f} MB (limit {MEMORY_LIMIT_MB}); from the cache {row['again_seconds']:.1f} s",
        flush=True,
    )
    return row


def main(arguments: list[str] | None = None) -> None:
    options = parser_of(__doc__, images=5000).parse_args(arguments)
    save(options.json, {"decode": measure(options.images)})


if __name__ == "__main__":
    main()
