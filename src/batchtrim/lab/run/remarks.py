"""Remarks on the settings of a single run that hide what its method does; they are printed, and kept in its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchtrim.lab.run.task_config import AnyConfig

__all__ = ["remarks"]

LARGE_LR = 100.0  # no network of the lab learns at such a rate


def remarks(config: AnyConfig) -> list[str]:
    """Return a line for each setting of a resolved run, or pair of them, that is probably not meant.

    Example:
        >>> from batchtrim.lab.run.config import RunConfig
        >>> remarks(RunConfig(method="loss_drop", epochs=1).resolved())
        ['loss_drop: with epochs 1 it keeps all samples throughout, as full does']
    """
    return [*_schedule(config), *_too_short(config), *_rate(config)]


def _schedule(config: AnyConfig) -> list[str]:
    if config.schedule is None or config.schedule == "constant":
        return []
    assert config.keep_start is not None
    assert config.keep_end is not None
    said = []
    if config.keep_start < config.keep_end:
        said.append(
            f"keep_start {config.keep_start:g} is below keep_end {config.keep_end:g}: the schedule "
            "rises, and keeps the most at the end"
        )
    if config.epochs == 1 and config.keep_start != config.keep_end:
        said.append(
            f"epochs 1: a schedule moves between epochs, so keep stays at keep_start ({config.keep_start:g}) and "
            f"never gets to keep_end ({config.keep_end:g})"
        )
    return said


def _too_short(config: AnyConfig) -> list[str]:
    """Return a line if a method without a keep schedule needs more epochs to drop what it is meant to."""
    said = []
    method, params, epochs = config.method, config.method_params, config.epochs
    if method == "small_loss" and epochs <= params["ramp_epochs"] and params["noise_rate"]:
        reached = params["noise_rate"] * (epochs - 1) / params["ramp_epochs"]
        said.append(
            f"small_loss: with epochs {epochs} the dropped fraction rises to {reached:.2g}, not to noise_rate "
            f"{params['noise_rate']:g}, because of ramp_epochs {params['ramp_epochs']}"
        )
    if epochs <= _kept_whole(method, params):
        said.append(f"{method}: with epochs {epochs} it keeps all samples throughout, as full does")
    return said


def _kept_whole(method: str, params: Mapping[str, Any]) -> int:
    """Return in how many epochs a method keeps all samples, whatever their losses."""
    return 1 if method == "loss_drop" else params["last"] if method.startswith("data_dropout") else 0


def _rate(config: AnyConfig) -> list[str]:
    rate = getattr(config, "lr", None) or 0.0
    return [f"lr {rate:g}: hardly any network learns at such a rate"] if rate >= LARGE_LR else []
