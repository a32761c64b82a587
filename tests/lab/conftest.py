"""Shared by the tests of the lab: made-up rows of runs.jsonl, so that tests of the report need no training."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer.testing

Row = dict[str, Any]

ENVIRONMENT: Row = {
    "torch": "2.13.0",
    "python": "3.11.2",
    "batchtrim": "0.1.0",
    "platform": "Linux x86_64",
    "cpu": "A processor, 2 cores",
    "threads": 1,
    "device": "cpu",
    "commit": "0123456789ab",
}


@pytest.fixture(scope="session", autouse=True)
def _asked_once() -> Iterator[None]:
    """Build the command line once, not for each command; look for installed plug-ins once, not for each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.testing._get_command))
        found = functools.cache(importlib.metadata.entry_points)
        patch.setattr(importlib.metadata, "entry_points", found)
        if registry := sys.modules.get("lightning_fabric.utilities.registry"):
            patch.setattr(registry, "entry_points", found)
        yield


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """``make_row("trim", seed=3, error=0.1)``: a finished run with a curve that ends at ``error``."""
    return _make_row


def _make_row(
    method: str,
    seed: int = 0,
    error: float | None = 0.1,
    *,
    status: str | None = None,
    epochs: int = 5,
    samples: int = 1000,
    seconds: float = 10.0,
    test_errors: list[float] | None = None,
    keep: list[float] | None = None,
    **config: Any,
) -> Row:
    keep = keep or [1.0 if method == "full" else 1.0 - 0.8 * e / max(1, epochs - 1) for e in range(epochs)]
    draw = random.Random(f"{method} {seed}")
    end = 0.9 if error is None else error
    curve_errors = test_errors or [end + (0.9 - end) * 0.5 ** (e + 1) for e in range(epochs - 1)] + [end]
    backward = [round(sum(keep[: e + 1]) * samples) for e in range(epochs)]
    mean_loss = [2.0 * 0.6**e + 0.02 * draw.random() for e in range(epochs)]
    settings = {
        "dataset": "digits", "model": "mlp", "width": 64, "norm": "batch", "method": method, "method_params": {},
        "optimizer": "adam", "lr": 0.001, "lr_schedule": "cosine", "weight_decay": 0.0, "momentum": 0.0,
        "epochs": epochs, "batch_size": 128, "seed": seed, "augment": "none", "train_size": None,
        "label_noise": "none", "imbalance": 1.0, "keep_start": None if method == "full" else 1.0,
        "keep_end": None if method == "full" else 0.2, "schedule": None if method == "full" else "linear",
        "engine": "exact", "precision": "32-true", "device": "cpu", "threads": 1, **config,
    }  # fmt: skip
    return {
        "schema": 1,
        "key": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12],
        "config": settings,
        "status": status or ("diverged" if error is None else "finished"),
        "test_error": error,
        "seconds": seconds,
        "seconds_eval": 1.0,
        "samples_forward": samples * epochs,
        "samples_backward": backward[-1],
        "steps": epochs * 8,
        "params": 9000,
        "curve": {
            "epoch": list(range(epochs)),
            "test_error": curve_errors,
            "train_error": [max(0.0, each - 0.02) for each in curve_errors],
            "keep": keep,
            "kept_loss": [loss / kept**0.5 for loss, kept in zip(mean_loss, keep, strict=True)],
            "mean_loss": mean_loss,
            "lr": [0.001] * epochs,
            "seconds": [seconds * (e + 1) / epochs for e in range(epochs)],
            "samples_backward": backward,
        },
        "environment": dict(ENVIRONMENT),
        "started": "2026-01-02T03:04:05+00:00",
    }
