"""Selection rules: which samples of a batch are kept.

A rule is a callable ``rule(losses, keep, generator=None) -> Selection``: it reads a vector of detached losses and a
keep fraction and returns rows and, if the rule has them, weights. Rules are small objects that pickle and print as
typed. No gradient flows through the selection.

Legend: n samples to choose from, k kept. Ties: of equal losses the lower index counts as harder, so results
repeat. NaN counts as the largest loss (as in ``torch.sort``), so a NaN loss is kept and the step is NaN, as
in plain training; gradient scalers rely on that. inf likewise.
"""

from __future__ import annotations

from batchtrim.selection.base import Rule, Selection, keep_count
from batchtrim.selection.mass import loss_mass, smoothing_floor
from batchtrim.selection.rules import (
    above,
    between,
    easiest,
    hardest,
    percentile,
    percentile_topk,
    superquantile,
    uniform,
)

__all__ = [
    "Rule",
    "Selection",
    "above",
    "between",
    "easiest",
    "hardest",
    "keep_count",
    "loss_mass",
    "percentile",
    "percentile_topk",
    "smoothing_floor",
    "superquantile",
    "uniform",
]
