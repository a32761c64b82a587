"""Whether the noise warning is right: runs on clean, randomly wrong and humanly wrong labels, each told yes or no.

``python -m benchmarks.noise_warning --data-dir DIR --seeds 3 --cache FOLDER --json FILE``

Each run trains with ``trim``; the log's own rule says at which epoch it would warn. With ``--cache`` every prediction
is stored, so that another rule is tried without training again.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

import batchtrim
from batchtrim.lab.config import RunConfig
from batchtrim.noise import NoiseAmplified
from benchmarks import recorded, timing

# data set, network, its width, label noise
RUNS = (
    ("cifar10", "cnn", 16, "none"),
    ("cifar10", "cnn", 16, "symmetric:0.1"),
    ("cifar10", "cnn", 16, "symmetric:0.3"),
    ("cifar10", "cnn", 16, "human:aggre"),
    ("cifar10", "cnn", 16, "human:random1"),
    ("cifar10", "cnn", 16, "human:worse"),
    ("cifar10", "resnet8", 8, "none"),
    ("fashion_mnist", "cnn", 16, "none"),
    ("fashion_mnist", "cnn", 16, "symmetric:0.1"),
    ("fashion_mnist", "cnn", 16, "symmetric:0.3"),
)


def judge(config: RunConfig, data_dir: str | None, cache: Path | None) -> dict[str, Any]:
    """What the log saw of a run, and in which epoch, counted from 1, it warned; None if it did not."""
    run = recorded.recorded(config, data_dir, cache)
    log = batchtrim.KeepLog(len(run["labels"]), classes=int(run["outputs"].shape[-1]))
    warned = None
    for epoch, _ in enumerate(recorded.epochs(log, run, config.batch_size), 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NoiseAmplified)
            log.end_epoch()
        if caught:
            warned = epoch
    doubt = [line["doubt_kept"] for line in log.history]
    return {
        "seed": config.seed,
        "warned in epoch": warned,
        "keep": [line["keep"] for line in log.history],
        "doubt_kept": doubt,
        "wrong": float(run["wrong"].mean()),
        "wrong among the kept at the end": float(run["wrong"][run["ids"][-1][run["kept"][-1]]].mean()),
        "training error": float(run["errors"][-1]),
    }


def main(arguments: list[str] | None = None) -> None:
    """Train or read the runs, print a line for each kind of run, and save all where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with the data sets [BATCHTRIM_DATA]")
    parser.add_argument("--runs", default=",".join("/".join(map(str, run)) for run in RUNS), help="which, by comma")
    parser.add_argument("--seeds", default="3", help="how many, or which, by comma")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--train-size", type=int, default=10_000)
    parser.add_argument("--cache", type=Path, help="folder to store the runs' predictions in")
    parser.add_argument("--json", help="JSON file to write")
    given = parser.parse_args(arguments)
    seeds = [int(seed) for seed in given.seeds.split(",")] if "," in given.seeds else list(range(int(given.seeds)))
    result: dict[str, Any] = {"arguments": {**vars(given), "cache": None}, "cells": {}}
    print(f"{'run':38s} wrong  of kept  doubt: least    end  warned")
    for name in given.runs.split(","):
        dataset, model, width, noise = name.split("/")
        cell = result["cells"][name] = []
        for seed in seeds:
            config = RunConfig(
                dataset=dataset, model=model, width=int(width), method="trim", epochs=given.epochs, seed=seed,
                train_size=given.train_size, label_noise=noise, device="cpu", threads=torch.get_num_threads(),
            ).resolved()  # fmt: skip
            cell.append(judge(config, given.data_dir, given.cache))
            timing.save(given.json, result)
        mean = {
            "wrong": [run["wrong"] for run in cell],
            "kept": [run["wrong among the kept at the end"] for run in cell],
            "least": [min(run["doubt_kept"]) for run in cell],
            "end": [run["doubt_kept"][-1] for run in cell],
        }
        wrong, kept, least, end = (sum(values) / len(values) for values in mean.values())
        warned = sum(run["warned in epoch"] is not None for run in cell)
        print(
            f"{name:38s} {wrong:5.3f}  {kept:7.3f}         {least:.3f}  {end:.3f}  {warned} of {len(cell)}", flush=True
        )


if __name__ == "__main__":
    main()
