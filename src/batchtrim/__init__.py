"""Mini-batch trimming for PyTorch: spend training on the samples that still teach something.

In the loop you have, two lines change::

    trim = batchtrim.Trimmer(batchtrim.linear(1.0, 0.2), total=epochs)
    ...
    losses = F.cross_entropy(model(x), y, reduction="none")
    loss = trim(losses)        # was: losses.mean()
    ...
    trim.step()                # once an epoch, like a learning-rate scheduler

Schedules say how much to keep, selection rules say which, a :class:`Trimmer` puts them together.
"""

import importlib

from batchtrim._deprecated import MOVED, moved
from batchtrim.accumulation import accumulate
from batchtrim.choice import Choice
from batchtrim.engine import TrimmedForward
from batchtrim.keeplog import KeepLog, suspects
from batchtrim.losses import Losses, focal, per_sample, superloss, token_losses
from batchtrim.reduction import reduce
from batchtrim.schedules import by_accuracy, constant, cosine, linear, piecewise
from batchtrim.selection import (
    Selection,
    between,
    easiest,
    hardest,
    keep_count,
    loss_mass,
    percentile,
    percentile_topk,
    smoothing_floor,
    superquantile,
    uniform,
)
from batchtrim.stats import KeepStats
from batchtrim.trimmer import Trimmer

__version__ = "0.1.0"

_SUBMODULES = ("compat", "integrations", "lab", "testing")  # imported when first asked for


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"batchtrim.{name}")
    if name in MOVED:
        return moved(name)
    raise AttributeError(f"module 'batchtrim' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return what a reader looks for: the public names, and the modules that hold more of them."""
    modules = ("compat", "errors", "integrations", "keeplog", "lab", "schedules", "selection", "testing")
    return sorted([*__all__, *modules, "__version__"])


__all__ = [
    "Choice",
    "KeepLog",
    "KeepStats",
    "Losses",
    "Selection",
    "TrimmedForward",
    "Trimmer",
    "accumulate",
    "between",
    "by_accuracy",
    "constant",
    "cosine",
    "easiest",
    "focal",
    "hardest",
    "keep_count",
    "linear",
    "loss_mass",
    "per_sample",
    "percentile",
    "percentile_topk",
    "piecewise",
    "reduce",
    "smoothing_floor",
    "superloss",
    "superquantile",
    "suspects",
    "token_losses",
    "uniform",
]
