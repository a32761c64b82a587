"""How well samples with wrong labels are found: keep history against losses and confident learning.

``python -m benchmarks.label_errors --data-dir DIR --noise human:aggre,human:worse,symmetric:0.2 --seeds 3``

One run of the lab gives every score: the same network, epochs, seed and noise, so the scores differ in nothing but what
they look at. A label is wrong where it differs from the data set's own. Reported: area under the precision-recall curve
(average precision), whose value for a random order is the part of wrong labels. Confident learning is cleanlab's, where
it is installed, on the final network's probabilities for the samples it was trained on: that is what a single run has,
and less than the cross-validated probabilities its authors advise.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

import batchtrim
from batchtrim.lab import conditions, data, train
from batchtrim.lab.config import RunConfig
from benchmarks import timing


def wrong_labels(config: RunConfig, data_dir: str | None) -> Tensor:
    """bool (n,): where the run's training label is not the data set's own."""
    clean = data.load(config.dataset, data_dir)
    # row numbers go through the run's conditions in the place of the pictures, so that each is found again
    numbered = clean.with_train(torch.arange(len(clean.train_labels)), clean.train_labels)
    noisy = conditions.apply(
        numbered,
        label_noise=config.label_noise,
        imbalance=config.imbalance,
        train_size=config.train_size,
        seed=config.seed,
        data_dir=data_dir,
    )
    return noisy.train_labels != clean.train_labels[noisy.train_images]


def scores(config: RunConfig, data_dir: str | None) -> dict[str, Tensor]:
    """Train once; each score (n,), larger where a label is more likely wrong."""
    pictures = train.load_pictures(config, data_dir)
    n = len(pictures.train_labels)
    log = batchtrim.KeepLog(n, classes=pictures.classes, warn=False)
    training = train.Training(config, pictures, log=log)
    training.prepare()
    for _ in range(training.epochs):
        training.train_epoch()
    table = log.table()
    ids, suspicion = batchtrim.suspects(log)
    found = {
        "keep history (suspects)": torch.zeros(n).index_put((ids,), suspicion.float()),
        "keep rate": table["keep_rate"],
        "mean loss": table["mean"],
        "last-epoch loss": table["last"],
    }
    confident = _confident_learning(training, pictures.train_labels)
    return found if confident is None else {**found, "confident learning": confident}


@torch.inference_mode()
def _confident_learning(training: Any, labels: Tensor) -> Tensor | None:
    """cleanlab: samples it calls label issues first, then the others, each by the probability of their label."""
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return None
    training.model.eval()
    rows = torch.arange(len(labels), device=training.device).split(train.EVALUATION_BATCH)
    batches = training._batches(training.pictures.train_images, "none", 0)
    probabilities = torch.cat([training.model(batches(part)).float().softmax(1).cpu() for part in rows]).numpy()
    quality = get_label_quality_scores(labels.numpy(), probabilities, method="self_confidence")
    issues = find_label_issues(labels.numpy(), probabilities, n_jobs=1)
    return torch.from_numpy(issues.astype(float) + 1.0 - quality)


def main() -> None:
    """Train, score, and print a table of mean and standard deviation over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with cifar10 and cifar10n [BATCHTRIM_DATA]")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument(
        "--noise", default="human:aggre,human:worse,symmetric:0.2", help="kinds of label noise, by comma"
    )
    parser.add_argument("--methods", default="trim,full", help="methods to train with, by comma")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="JSON file to write")
    given = parser.parse_args()
    result: dict[str, Any] = {"arguments": vars(given), "cells": []}
    for noise in given.noise.split(","):
        for method in given.methods.split(","):
            found: dict[str, list[float]] = {}
            for seed in range(given.seeds):
                config = RunConfig(
                    dataset=given.dataset, model=given.model, method=method, epochs=given.epochs, seed=seed,
                    label_noise=noise, train_size=given.train_size, device=given.device,
                    threads=torch.get_num_threads(),
                ).resolved()  # fmt: skip
                wrong = wrong_labels(config, given.data_dir)
                for name, score in scores(config, given.data_dir).items():
                    # a sample that no score is known of, or whose loss is no number, comes first: it wants a look
                    ranked = score.double().nan_to_num(nan=score.nan_to_num().max().item() + 1.0)
                    found.setdefault(name, []).append(float(average_precision_score(wrong.numpy(), ranked.numpy())))
                found.setdefault("part of wrong labels", []).append(wrong.float().mean().item())
            print(f"\n{noise}, trained with {method}")
            for name, values in found.items():
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                print(f"  {name:26s} {statistics.mean(values):.3f} ± {spread:.3f}", flush=True)
            result["cells"].append({"noise": noise, "method": method, "average precision": found})
            timing.save(given.out, result)


if __name__ == "__main__":
    main()
