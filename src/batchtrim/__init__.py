"""Mini-batch trimming for PyTorch: spend training on the samples that still teach something.

Make a trimmer, call it in place of the mean of the losses, and step it once an epoch::

    trim = batchtrim.Trimmer(batchtrim.linear(1.0, 0.2), total=epochs)
    ...
    losses = F.cross_entropy(model(x), y, reduction="none")
    loss = trim(losses)        # was: losses.mean()
    ...
    trim.step()                # once an epoch, like a learning-rate scheduler

Schedules say how much to keep, selection rules say which, a :class:`Trimmer` puts them together.

Importing the package is quick: torch and a name's module are imported when the name is first used.
"""

TYPE_CHECKING = False  # stands for typing.TYPE_CHECKING: importing typing takes longer than all of this file
if TYPE_CHECKING:  # for editors and type checkers; _HOMES says the same to Python
    from batchtrim import errors as errors
    from batchtrim import keeplog as keeplog
    from batchtrim import schedules as schedules
    from batchtrim import selection as selection
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

_HOMES = {
    "accumulation": ("accumulate",),
    "choice": ("Choice",),
    "engine": ("TrimmedForward",),
    "keeplog": ("KeepLog", "suspects"),
    "losses": ("Losses", "focal", "per_sample", "superloss", "token_losses"),
    "reduction": ("reduce",),
    "schedules": ("by_accuracy", "constant", "cosine", "linear", "piecewise"),
    "selection": (
        *("Selection", "between", "easiest", "hardest", "keep_count", "loss_mass"),
        *("percentile", "percentile_topk", "smoothing_floor", "superquantile", "uniform"),
    ),
    "stats": ("KeepStats",),
    "trimmer": ("Trimmer",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name or a module when it is first used, and cache it."""
    import importlib.util

    from batchtrim._deprecated import MOVED, moved

    if name in MOVED:
        return moved(name)
    if name in _HOME:
        value = getattr(importlib.import_module(f"batchtrim.{_HOME[name]}"), name)
    elif importlib.util.find_spec(f"batchtrim.{name}"):
        value = importlib.import_module(f"batchtrim.{name}")
    else:
        from batchtrim.errors import nearest  # needs no torch

        near = "" if name.startswith("_") else nearest(name, __dir__(), "batchtrim.")  # libraries probe for __names__
        raise AttributeError(f"module 'batchtrim' has no attribute {name!r}{near and '.' + near}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, and the modules that hold further ones."""
    modules = ("compat", "errors", "integrations", "keeplog", "lab", "schedules", "selection", "testing")
    return sorted([*__all__, *modules, "__version__"])
