"""Warn before the first run of a command about settings without effect and likely mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from batchtrim.lab.run.task_config import AnyConfig

LARGE_LR = 100.0  # no network of the lab learns at such a rate
KEEP = ("keep_start", "keep_end", "schedule")
DECIDED_BY = {"momentum": "optimizer", "norm": "model"}  # settings that some values of another leave unused


def warnings_for(settings: Mapping[str, Any], configs: Sequence[AnyConfig]) -> list[str]:
    """Return a line for each problem in the given settings and the runs made from them."""
    return [
        *_repeats(settings),
        *_schedule(settings, configs),
        *_too_short(configs),
        *_unused(settings, configs),
        *_rate(configs),
    ]


def _repeats(settings: Mapping[str, Any]) -> list[str]:
    said = []
    for name, values in settings.items():
        if isinstance(values, list) and not any(isinstance(value, (list, dict)) for value in values):
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                said.append(f"{name}: {', '.join(map(str, twice))} is given more than once, but done once")
    return said


def _schedule(settings: Mapping[str, Any], configs: Sequence[AnyConfig]) -> list[str]:
    scheduled = [config for config in configs if config.schedule is not None]
    given = [name for name in KEEP if name in settings]
    if given and not scheduled:
        methods = ", ".join(dict.fromkeys(config.method for config in configs))
        return [f"{', '.join(given)}: without effect, since no method here has a keep schedule ({methods})"]
    said = {}
    for config in scheduled:
        assert config.keep_start is not None
        assert config.keep_end is not None
        if config.schedule == "constant" and "keep_start" in settings and config.keep_start != config.keep_end:
            said["constant"] = (
                f"keep_start {config.keep_start:g}: without effect under the constant schedule, which keeps keep_end "
                f"({config.keep_end:g}) throughout"
            )
        elif config.schedule != "constant" and config.keep_start < config.keep_end:
            said["rising"] = (
                f"keep_start {config.keep_start:g} is below keep_end {config.keep_end:g}: the schedule "
                "rises, and keeps the most at the end"
            )
        if config.epochs == 1 and config.schedule != "constant" and config.keep_start != config.keep_end:
            said["one epoch"] = (
                f"epochs 1: a schedule moves between epochs, so keep stays at keep_start ({config.keep_start:g}) and "
                f"never gets to keep_end ({config.keep_end:g})"
            )
    return list(said.values())


def _too_short(configs: Sequence[AnyConfig]) -> list[str]:
    """Return a line for each method without a keep schedule that needs more epochs to drop what it is meant to."""
    said = []
    for config in configs:
        method, params, epochs = config.method, config.method_params, config.epochs
        if method == "small_loss" and epochs <= params["ramp_epochs"] and params["noise_rate"]:
            reached = params["noise_rate"] * (epochs - 1) / params["ramp_epochs"]
            said.append(
                f"small_loss: with epochs {epochs} the dropped fraction rises to {reached:.2g}, not to noise_rate "
                f"{params['noise_rate']:g}, because of ramp_epochs {params['ramp_epochs']}"
            )
        if epochs <= _kept_whole(method, params):
            said.append(f"{method}: with epochs {epochs} it keeps all samples throughout, as full does")
    return list(dict.fromkeys(said))


def _kept_whole(method: str, params: Mapping[str, Any]) -> int:
    """Return in how many epochs a method keeps all samples, whatever their losses."""
    return 1 if method == "loss_drop" else params["last"] if method.startswith("data_dropout") else 0


def _unused(settings: Mapping[str, Any], configs: Sequence[AnyConfig]) -> list[str]:
    said = []
    for name, by in DECIDED_BY.items():
        given = settings.get(name)
        values = given if isinstance(given, list) else [] if given is None else [given]
        lost = [value for value in values if all(getattr(config, name, value) != value for config in configs)]
        if lost:
            others = ", ".join(dict.fromkeys(str(getattr(config, by)) for config in configs))
            said.append(f"{name} {', '.join(map(str, lost))}: without effect with {by} {others}")
    return said


def _rate(configs: Sequence[AnyConfig]) -> list[str]:
    rates = sorted({lr for config in configs if (lr := getattr(config, "lr", None)) and lr >= LARGE_LR})
    return [f"lr {', '.join(f'{rate:g}' for rate in rates)}: hardly any network learns at such a rate"] if rates else []
