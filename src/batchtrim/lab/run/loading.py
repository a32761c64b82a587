"""Load the data of a run, once for all runs that share them, and check them before the first run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from batchtrim.lab import process
from batchtrim.lab.run import sanity
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.task import conditions, data, images, own_models

__all__ = ["load_images", "prepare", "with_versions"]


def prepare(config: RunConfig, data_dir: str | Path | None, cache_dir: str | Path | None) -> tuple[str, ...]:
    """Load the data, and if they are the user's own, try the network, to find faults before the first run.

    Returns:
        Notes on the data.
    """
    loaded = load_images(config, data_dir, cache_dir)
    sanity.check_network(config, loaded)
    if own_models.is_own_model(config.model):
        with process.restored():
            own_models.try_own(config.model, loaded.shape, loaded.classes)
    return (*loaded.notes, *loaded.local_notes, *sanity.notes_on(config, loaded))


def with_versions(
    configs: Sequence[RunConfig], data_dir: str | Path | None, cache_dir: str | Path | None = None
) -> list[RunConfig]:
    """Return the runs with the version of their data, so that runs on changed images count as different.

    Only the user's own data sets have a version. They are loaded again, and decoded if necessary. Runs on a copy of a
    data set, under the same name, are left out.
    """
    found: dict[tuple[str, images.ImageOptions], str] = {}
    if any(images.is_own(config.dataset) for config in configs):
        _load_once.cache_clear()  # in a long-lived process, the files may have changed since
    for config in configs:
        if images.is_own(config.dataset) and not config.data_version:
            which = config.dataset, images.options_of(config)
            if which not in found:
                found[which] = _load_once(*which, data_dir, cache_dir).version
    made: dict[str, RunConfig] = {}
    for config in configs:
        version = found.get((config.dataset, images.options_of(config)), config.data_version)
        made.setdefault((one := replace(config, data_version=version)).key, one)
    return list(made.values())


def load_images(
    config: RunConfig, data_dir: str | Path | None = None, cache_dir: str | Path | None = None
) -> data.ImageData:
    """Return the run's data set with its label noise, imbalance and size.

    Raises:
        ReplaceFile: the images are not those that the run's ``data_version`` stands for.
    """
    loaded = _load_once(config.dataset, images.options_of(config), data_dir, cache_dir)
    if config.data_version and config.data_version != loaded.version:
        raise data.ReplaceFile(
            f"expected the images of {config.dataset} that the run was made for (data_version {config.data_version}), "
            f"got others ({loaded.version or 'none'}). Images, labels or the split have changed since."
        )
    return conditions.apply(
        loaded,
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
