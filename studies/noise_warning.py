"""Test the noise warning: runs on clean labels, random errors and human errors, each with a warning or none.

``python -m studies.noise_warning --data-dir DIR --seeds 2,3,4 --cache FOLDER --json FILE``

Each run trains with ``trim``. For each kind of run it prints: the fraction of wrong labels, among all samples and among
the kept ones at the end; the training error; the doubt at the end divided by its minimum; the fraction of the hardest
samples that stay, minus that of the easiest; and in how many runs each sign, or either, would warn. With ``--cache``
every prediction is stored, so that another rule can be tried without training again.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from benchmarks import timing

import batchtrim
from batchtrim import noise
from batchtrim.lab.run.config import RunConfig
from studies import recorded

# data set, network, its width, label noise
CIFAR_NOISE = ("none", "human:aggre", "human:random1", "human:worse", "symmetric:0.1", "symmetric:0.3")
RUNS = (
    *(("cifar10", "cnn", 16, kind) for kind in CIFAR_NOISE),
    *(("cifar10", "mlp", 128, kind) for kind in CIFAR_NOISE[:3]),
    *(("fashion_mnist", "mlp", 128, kind) for kind in ("none", "symmetric:0.1", "symmetric:0.3")),
    ("cifar10", "resnet8", 8, "none"),
)


def warnings_of(config: RunConfig, data_dir: str | None, cache: Path | None) -> dict[str, Any]:
    """Return the statistics that the log computed for a run, and the epoch (from 1) in which it warned, or None."""
    run = recorded.recorded(config, data_dir, cache)
    log = batchtrim.KeepLog(len(run["labels"]), classes=int(run["outputs"].shape[-1]), warn=False)
    warned: dict[str, int | None] = {"doubt rises": None, "the hardest stay": None}
    for epoch, _ in enumerate(recorded.epochs(log, run, config.batch_size), 1):
        log.end_epoch()
        found = noise.doubt_rises(log.history), noise.hardest_stay(log.history)
        for sign, there in zip(warned, found, strict=True):
            if there and warned[sign] is None:
                warned[sign] = epoch
    doubt = [line["doubt_kept"] for line in log.history]
    return {
        "seed": config.seed,
        "warned in epoch": warned,
        "keep": [line["keep"] for line in log.history],
        "doubt_kept": doubt,
        "stay excess": noise.stay_excess(log.history)[1],
        "wrong": float(run["wrong"].mean()),
        "wrong among the kept at the end": float(run["wrong"][run["ids"][-1][run["kept"][-1]]].mean()),
        "training error": float(run["errors"][-1]),
    }


def main(arguments: list[str] | None = None) -> None:
    """Train or read the runs, print a line for each kind of run, and save all results if a path is given."""
    parser = timing.parser_of(__doc__, epochs=10, train_size=10_000)
    parser.add_argument("--data-dir", help="folder with the data sets [BATCHTRIM_DATA]")
    parser.add_argument(
        "--runs", default=",".join("/".join(map(str, run)) for run in RUNS), help="which, comma-separated"
    )
    parser.add_argument("--seeds", default="2,3,4", help="which, comma-separated; 0 and 1 chose the rule")
    parser.add_argument("--stored", action="store_true", help="train nothing; say what the cache holds")
    parser.add_argument("--cache", type=Path, help="folder to store the runs' predictions in")
    given = parser.parse_args(arguments)
    result: dict[str, Any] = {"arguments": {**vars(given), "cache": None}, "cells": {}}
    print(f"{'run':36s}  wrong   kept  error    rise  excess  warned: doubt, stay, either")
    for name in given.runs.split(","):
        dataset, model, width, label_noise = name.split("/")
        cell = result["cells"][name] = []
        for seed in map(int, given.seeds.split(",")):
            config = RunConfig(
                dataset=dataset, model=model, width=int(width), method="trim", epochs=given.epochs, seed=seed,
                train_size=given.train_size, label_noise=label_noise, device="cpu", threads=torch.get_num_threads(),
            ).resolved()  # fmt: skip
            if given.stored and not recorded.stored(config, given.cache).exists():
                continue
            cell.append(warnings_of(config, given.data_dir, given.cache))
            timing.save(given.json, result)
        if not cell:
            del result["cells"][name]
            continue
        wrong, kept, error, excess = (
            statistics.mean(run[what] for run in cell)
            for what in ("wrong", "wrong among the kept at the end", "training error", "stay excess")
        )
        rise = statistics.mean(run["doubt_kept"][-1] / min(run["doubt_kept"]) for run in cell)
        doubts, stays = (
            sum(run["warned in epoch"][sign] is not None for run in cell) for sign in cell[0]["warned in epoch"]
        )
        either = sum(any(run["warned in epoch"].values()) for run in cell)
        print(
            f"{name:36s} {wrong:6.3f} {kept:6.3f} {error:6.3f} {rise:7.2f} {excess:+7.3f}  "
            f"{doubts} {stays} {either} of {len(cell)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
