"""Optimizers, and the learning rate over training."""

from __future__ import annotations

import math

import torch
from torch import nn

from batchtrim.lab.run.config import RunConfig

__all__ = ["lr_factor", "make_optimizer"]


def lr_factor(schedule: str, progress: float) -> float:
    """Return the learning rate as a fraction of its peak, at ``progress`` in [0, 1].

    ``step`` divides by ten at one half and at three quarters; ``onecycle`` rises from 1/25 for 30 %, then falls to
    1/250,000, both as half cosines (torch's OneCycleLR with constant momentum). ``triangle`` rises linearly from 0
    for 20 %, then falls linearly to 0.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if schedule == "cosine":
        return (1.0 + math.cos(math.pi * progress)) / 2.0
    if schedule == "triangle":
        return min(progress / 0.2, (1.0 - progress) / 0.8)
    low, end, peak = 1 / 25, 1 / 250_000, 0.3
    if progress < peak:
        return low + (1.0 - low) * (1.0 - math.cos(math.pi * progress / peak)) / 2.0
    return end + (1.0 - end) * (1.0 + math.cos(math.pi * (progress - peak) / (1.0 - peak))) / 2.0


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """Return the configured optimizer over all parameters."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    lr, decay = config.lr or 0.0, config.weight_decay or 0.0
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=decay)
    nesterov = config.optimizer == "nesterov"
    return torch.optim.SGD(parameters, lr, momentum=config.momentum, weight_decay=decay, nesterov=nesterov)
