"""The fast ways of `loss_mass`, and that in fixed shapes, against a sort and an oracle."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

import oracles
from batchtrim import Trimmer, loss_mass
from tiers import few


def rows(selection: Any) -> set[int]:
    return set(selection.indices.tolist())


def test_fixed_shapes_leave_out_what_does_not_count_and_refuse_negative_losses() -> None:
    share, nothing = torch.tensor(0.5, dtype=torch.float64), -math.inf
    padded = torch.tensor([nothing, 1.0, nothing, 3.0])
    assert loss_mass(at_least=1.0).compiled_mask(padded, share, 2).tolist() == [False, True, False, True]
    with pytest.raises(RuntimeError, match="expected losses of at least 0 for loss_mass"):
        loss_mass().compiled_mask(torch.tensor([1.0, -1.0]), share, 2)


@pytest.mark.parametrize(
    "shape", ["uniform", "skewed", "one outlier", "two heaps", "few values", "equal", "zeros", "tiny", "huge"]
)
@pytest.mark.parametrize("keep", few([0.01, 0.5, 0.9, 0.999999, 1.0], [0.5, 0.999999, 1.0]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_batches_count_by_bins_what_a_sort_counts(shape: str, keep: float, dtype: torch.dtype) -> None:
    drawn = torch.rand(20_000, dtype=dtype, generator=torch.Generator().manual_seed(1))
    largest = torch.finfo(dtype).max
    losses = {
        "uniform": drawn,
        "skewed": drawn**40,
        "one outlier": torch.cat([drawn, torch.tensor([1e9], dtype=dtype)]),
        "two heaps": torch.cat([drawn * 1e-4, 1.0 + drawn * 1e-4]),  # of which one bin holds the upper
        "few values": (drawn * 3).round(),
        "equal": torch.full_like(drawn, 0.1),
        "zeros": torch.zeros_like(drawn),
        "tiny": drawn * torch.finfo(dtype).tiny,
        "huge": (drawn + 1) / 2 * largest,  # whose sum no float64 holds
    }[shape]
    n = len(losses)
    rule = loss_mass()
    fast = rule(losses, keep)
    share = torch.tensor(keep, dtype=torch.float64)
    by_sort = rule._count(torch.sort(losses, descending=True).values, torch.ones(n, dtype=torch.bool), share)
    assert fast.k == int(by_sort)
    assert rows(fast) == set(torch.sort(losses, descending=True, stable=True).indices[: fast.k].tolist())


@pytest.mark.parametrize("rule", [loss_mass(skip=0.1), loss_mass(at_least=0.7), loss_mass(at_most=0.2)], ids=repr)
@pytest.mark.parametrize("n", [1024, 3000, 4096])
def test_large_batches_are_bounded_as_small_ones_are(n: int, rule: loss_mass) -> None:
    losses = (torch.rand(n, generator=torch.Generator().manual_seed(1)) * 50).round()
    expected = oracles.loss_mass(losses.double().numpy(), 0.6, rule.skip, rule.at_least, rule.at_most)
    assert rows(rule(losses, 0.6)) == expected


@pytest.mark.parametrize(("n", "way"), [(6000, "_by_bins"), (600, "_listed")])
def test_the_fast_ways_are_used_and_the_sort_is_the_same(n: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = torch.rand(n, generator=torch.Generator().manual_seed(0)) ** 5
    losses[: n // 2] = (losses[: n // 2] * 50).round() / 50  # ties
    fast = [rows(loss_mass(at_least=0.1, offset=offset)(losses + offset, 0.9)) for offset in (0.0, 0.5)]
    monkeypatch.setattr(loss_mass, way, lambda *_: None)
    assert [rows(loss_mass(at_least=0.1, offset=offset)(losses + offset, 0.9)) for offset in (0.0, 0.5)] == fast
    monkeypatch.setattr(loss_mass, "_count", None)
    with pytest.raises(TypeError):
        loss_mass()(losses, 0.9)
    monkeypatch.undo()
    monkeypatch.setattr(loss_mass, "_count", None)
    loss_mass()(losses, 0.9)


def test_cost_grows_like_a_partial_sort() -> None:
    """A rough guard on one thread; benchmarks/bench_core.py measures: at most 2 times topk + mean."""
    losses = (torch.rand(65_536) ** 4).requires_grad_()
    trim = Trimmer(0.9, select=loss_mass())
    trim(losses)
    k = trim.last_selection.k  # type: ignore[union-attr]

    def best(call: Any) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            call().backward()
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(lambda: trim(losses)) < 4 * best(lambda: losses.topk(k).values.mean())
