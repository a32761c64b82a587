"""Measure how well wrong labels are found: by the keep history, by losses and by confident learning.

``python -m studies.label_errors --data-dir DIR --noise human:aggre,human:worse,symmetric:0.2 --seeds 3``

One run of the lab gives every score, so network, epochs, seed and noise are the same for all scores. A label is wrong
if it differs from the data set's own. The area under the precision-recall curve (average precision) is reported; for a
random order it is the fraction of wrong labels. Confident learning is cleanlab's, if that is installed, on the final
network's probabilities for the samples that it was trained on. A single run has no others; cleanlab's authors advise
cross-validated ones.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import timing
from sklearn.metrics import average_precision_score
from torch import Tensor

import batchtrim
from batchtrim.lab.run.config import RunConfig
from studies import recorded


def scores(run: dict[str, np.ndarray], batch: int) -> dict[str, Tensor]:
    """Return each score (n,) of one recorded run; a larger score means that the label is more likely wrong."""
    n, classes = run["probabilities"].shape
    log = batchtrim.KeepLog(n, classes=classes, warn=False)
    for _ in recorded.epochs(log, run, batch):
        log.end_epoch()
    table = log.table()
    ids, suspicion = batchtrim.suspects(log)
    found = {
        "keep history (suspects)": torch.zeros(n).index_put((ids,), suspicion.float()),
        "keep rate": table["keep_rate"],
        "mean loss": table["mean"],
        "mean margin (AUM)": -_mean_margin(run),
        "last-epoch loss": table["last"],
    }
    confident = _confident_learning(run)
    return found if confident is None else {**found, "confident learning": confident}


def _mean_margin(run: dict[str, np.ndarray]) -> Tensor:
    """Return the logit of the label minus the largest other, mean over epochs (Pleiss et al. 2020); (n,)."""
    labels = torch.from_numpy(run["labels"])
    total = torch.zeros(len(labels))
    for rows, outputs in zip(torch.from_numpy(run["ids"]).long(), torch.from_numpy(run["outputs"]), strict=True):
        own = labels[rows, None]
        others = outputs.float().scatter(1, own, -torch.inf).amax(1)
        total[rows] += outputs.float().gather(1, own)[:, 0] - others
    return total / len(run["ids"])


def _confident_learning(run: dict[str, np.ndarray]) -> Tensor | None:
    """Rank by cleanlab: its label issues first, then the other samples, each by the probability of their label."""
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return None
    labels, probabilities = run["labels"], run["probabilities"]
    quality = get_label_quality_scores(labels, probabilities, method="self_confidence")
    issues = find_label_issues(labels, probabilities, n_jobs=1)
    return torch.from_numpy(issues.astype(float) + 1.0 - quality)


def main(arguments: list[str] | None = None) -> None:
    """Train, score, and print a table of mean and standard deviation over seeds."""
    parser = timing.parser_of(__doc__, epochs=20, seeds=3)
    parser.add_argument("--data-dir", help="folder with cifar10 and cifar10n [BATCHTRIM_DATA]")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--width", type=int, help="channels of the first stage [the network's own]")
    parser.add_argument(
        "--noise", default="human:aggre,human:worse,symmetric:0.2", help="kinds of label noise, comma-separated"
    )
    parser.add_argument("--methods", default="trim,full", help="methods to train with, comma-separated")
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", type=Path, help="folder to store the runs' predictions in")
    given = parser.parse_args(arguments)
    result: dict[str, Any] = {"arguments": {**vars(given), "cache": None}, "cells": []}
    for noise in given.noise.split(","):
        for method in given.methods.split(","):
            found: dict[str, list[float]] = {}
            for seed in range(given.seeds):
                config = RunConfig(
                    dataset=given.dataset, model=given.model, width=given.width, method=method, epochs=given.epochs,
                    seed=seed, label_noise=noise, train_size=given.train_size, device=given.device,
                    threads=torch.get_num_threads(),
                ).resolved()  # fmt: skip
                run = recorded.recorded(config, given.data_dir, given.cache)
                for name, score in scores(run, config.batch_size).items():
                    # samples without a score, or with a loss that is NaN, come first: they should be looked at
                    ranked = score.double().nan_to_num(nan=score.nan_to_num().max().item() + 1.0)
                    found.setdefault(name, []).append(float(average_precision_score(run["wrong"], ranked.numpy())))
                found.setdefault("part of wrong labels", []).append(float(run["wrong"].mean()))
                found.setdefault("training error at the end", []).append(float(run["errors"][-1]))
            print(f"\n{noise}, trained with {method}")
            for name, values in found.items():
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                print(f"  {name:26s} {statistics.mean(values):.3f} ± {spread:.3f}", flush=True)
            result["cells"].append({"noise": noise, "method": method, "average precision": found})
            timing.save(given.json, result)


if __name__ == "__main__":
    main()
