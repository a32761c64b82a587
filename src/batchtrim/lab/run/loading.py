"""The data of a run, loaded once for all runs that share it, and looked at before the first one."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from batchtrim.lab.run import trial
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.task import conditions, data, images, own_models

__all__ = ["load_images", "prepare"]


def prepare(config: RunConfig, data_dir: str | Path | None, cache_dir: str | Path | None) -> tuple[str, ...]:
    """Load the data and, if it is the reader's own, try the network, so that a fault is found before the first run.

    Returns:
        What is to be said of the data.
    """
    loaded = load_images(config, data_dir, cache_dir)
    trial.check_network(config, loaded)
    if own_models.is_own_model(config.model):
        with torch.random.fork_rng(devices=[]):
            own_models.build_own(config.model, loaded.shape, loaded.classes)
    return (*loaded.notes, *trial.notes_on(config, loaded))


def load_images(
    config: RunConfig, data_dir: str | Path | None = None, cache_dir: str | Path | None = None
) -> data.ImageData:
    """Return the run's data set with its label noise, imbalance and size."""
    return conditions.apply(
        _load_once(config.dataset, images.options_of(config), data_dir, cache_dir),
        label_noise=config.label_noise,
        imbalance=config.imbalance,
        train_size=config.train_size,
        test_size=config.test_size,
        seed=config.seed,
        data_dir=data_dir,
    )


@functools.lru_cache(maxsize=2)
def _load_once(
    name: str, options: images.ImageOptions, data_dir: str | Path | None, cache_dir: str | Path | None
) -> data.ImageData:
    if images.is_own(name):
        return images.load(name, options, data_dir, cache_dir)
    return data.load(name, data_dir, cache_dir)
