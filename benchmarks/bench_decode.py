"""Measure the time and peak memory of decoding and caching own images, beside a bare Pillow loop and the disk.

    python -m benchmarks.bench_decode [--images 5000] [--rounds 3] [--folder DIR] [--json out.json]

Half of the images are JPEG and half PNG, of 32 to 640 pixels a side; all are resized to 32 x 32. Three tasks take turns
on all cores: only read every file; read, decode and resize every file and discard the result (bare Pillow); decode and
cache the files as the lab does. "cold": every file was dropped from the system's page cache before. "warm": all files
are in it. ``--folder`` keeps the images, and reuses those that are there.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.timing import parser_of, save

CLASSES, SIDES = 10, (32, 64, 100, 160, 256, 400, 640)
MEMORY_LIMIT_MB, RATIO_LIMIT = 2048, 1.2
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


def make_images(folder: Path, number: int) -> None:
    """Write images of all sizes into class folders."""
    random = np.random.default_rng(0)
    for name in range(CLASSES):
        (folder / f"class{name}").mkdir(parents=True)

    def write(row: int, seed: np.ndarray, width: int, height: int) -> None:
        coarse = Image.fromarray(seed)
        file = folder / f"class{row % CLASSES}" / f"{row:06d}.{'jpg' if row % 2 else 'png'}"
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, compress_level=1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, number, 256):
            jobs = []
            for row in range(first, min(first + 256, number)):
                width, height = (int(each) for each in random.choice(SIDES[: 5 if row % 8 else 7], 2))
                jobs.append(pool.submit(write, row, random.integers(0, 256, (8, 8, 3), np.uint8), width, height))
            for job in jobs:
                job.result()


def forget(files: list[Path]) -> None:
    """Drop the files from the system's page cache, so that the next reader gets them from the disk."""
    os.sync()
    for file in files:
        with file.open("rb") as held:
            os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(work: Callable[[Path], object], files: list[Path]) -> float:
    """Return the seconds that ``work`` takes for all files, in one thread per core."""

    def each(some: list[Path]) -> None:
        for file in some:
            work(file)

    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(each, [files[first : first + 64] for first in range(0, len(files), 64)]))
    return time.perf_counter() - start


def bare(file: Path) -> None:
    """Decode and resize an image with Pillow, and nothing else."""
    Image.open(file).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)


def lab(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Decode into a new cache, then read from it, each in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
        command = [sys.executable, "-c", _LAB, str(folder), cache]
        first, again = (json.loads(subprocess.check_output(command).splitlines()[-1]) for _ in range(2))
    return first, again


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Time disk, bare Pillow and the lab in turn; return medians of their seconds, and of the ratios within a round."""
    files = sorted(each for each in folder.rglob("*.*") if each.is_file())
    megabytes = sum(each.stat().st_size for each in files) / 1e6
    found = []
    for _ in range(rounds):
        forget(files)
        disk = seconds_of(Path.read_bytes, files)
        pillow_warm, (warm, again) = seconds_of(bare, files), lab(folder)
        forget(files)
        pillow = seconds_of(bare, files)
        forget(files)
        cold, _ = lab(folder)
        times = {"disk_seconds": disk, "bare_seconds": pillow, "bare_warm_seconds": pillow_warm}
        times |= {"warm_seconds": warm["seconds"], "again_seconds": again["seconds"]}
        found.append({**cold, **times, "ratio": cold["seconds"] / max(disk, pillow)})
        found[-1]["ratio_warm"] = warm["seconds"] / pillow_warm
    row: dict[str, Any] = {name: statistics.median(each[name] for each in found) for name in found[0]}
    row |= {"megabytes": megabytes, "rounds": found, "limit_mb": MEMORY_LIMIT_MB, "limit": RATIO_LIMIT}
    print(
        f"{row['images']:.0f} images, {megabytes:.0f} MB, {rounds} rounds. Cold: disk {row['disk_seconds']:.2f} s "
        f"({megabytes / row['disk_seconds']:.0f} MB/s), bare Pillow {row['bare_seconds']:.2f} s, decode and cache "
        f"{row['seconds']:.2f} s ({row['images'] / row['seconds']:.0f} images/s), {row['ratio']:.2f} times the slower "
        f"of both (limit {RATIO_LIMIT}). Warm: bare Pillow {row['bare_warm_seconds']:.2f} s, decode and cache "
        f"{row['warm_seconds']:.2f} s, {row['ratio_warm']:.2f} times. Peak {row['peak_mb']:.0f} MB (limit "
        f"{MEMORY_LIMIT_MB}). From the cache {row['again_seconds']:.2f} s",
        flush=True,
    )
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, images=5000, rounds=3)
    parser.add_argument("--folder", type=Path, help="keep the images here, and use those that are there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place) / "images"
        if not folder.exists():
            make_images(folder, options.images)
        save(options.json, {"decode": measure(folder, options.rounds)})


if __name__ == "__main__":
    main()
