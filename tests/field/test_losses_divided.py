"""The loss of `Losses` with every combination of parts, by the formula of their docstring."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchtrim
from batchtrim import Losses, Trimmer

COMBINATIONS = list(itertools.product([False, True], [False, True], [False, True], ["mean", "sum"], ["kept", "batch"]))
NAMES = ("weights", "mask", "counts")


def parts_of(chosen: tuple[bool, ...]) -> dict[str, Any]:
    found = {
        "weights": torch.rand(10, dtype=torch.float64),
        "mask": torch.tensor([True, False, True, True, False, True, True, True, False, True]),
        "counts": torch.tensor([1.0, 3, 2, 4, 1, 5, 2, 1, 3, 2], dtype=torch.float64),
    }
    return {name: found[name] for name, wanted in zip(NAMES, chosen, strict=True) if wanted}


def by_hand(losses: Losses, keep: float, scale: str) -> Tensor:
    """``sum_kept(c_i * v_i) / sum(c_i * w_i)``, over the kept or over all that count."""
    values, ones = losses.values, torch.ones_like(losses.values)
    counts = ones if losses.counts is None else losses.counts
    weights = ones if losses.weights is None else losses.weights
    rows = torch.arange(10) if losses.mask is None else losses.mask.nonzero().squeeze(1)
    kept = rows[values[rows].topk(max(1, round(keep * len(rows)))).indices]
    divided = (counts * weights)[kept if scale == "kept" else rows].sum()
    return (counts * values)[kept].sum() / (1.0 if losses.reduction == "sum" else divided)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize((*NAMES, "reduction", "scale"), COMBINATIONS)
def test_every_combination(weights: bool, mask: bool, counts: bool, reduction: str, scale: str) -> None:
    """A sum with counts left the counts out, except when compiled, under vmap and in its own mean."""
    torch.manual_seed(0)
    values, parts = torch.rand(10, dtype=torch.float64), parts_of((weights, mask, counts))
    for keep in (0.3, 0.5, 1.0):
        trim = Trimmer(keep, scale=scale)
        expected = by_hand(Losses(values, reduction=reduction, **parts), keep, scale)
        torch.testing.assert_close(trim(Losses(values, reduction=reduction, **parts)), expected)
        stacked = {name: part[None] for name, part in parts.items()}
        mapped = torch.vmap(lambda v, p, trim=trim: trim(Losses(v, reduction=reduction, **p)))(values[None], stacked)
        torch.testing.assert_close(mapped[0], expected)
        if keep == 1.0:
            torch.testing.assert_close(Losses(values, reduction=reduction, **parts).mean(), expected)
            continue
        step = batchtrim.TrimmedForward(Scale(), lambda o, y: Losses(o, reduction=reduction, **y), trim, "exact")
        halves = [(values[at], {name: part[at] for name, part in parts.items()}) for at in (slice(4), slice(4, 10))]
        for loss in batchtrim.accumulate(step, halves):
            loss.backward()
        torch.testing.assert_close(step.model.factor.grad[0], expected)  # type: ignore[index]
