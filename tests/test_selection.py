"""Rules against a plain oracle, and the edges: ties, NaN, inf, one sample, none."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from batchtrim import (
    between,
    easiest,
    hardest,
    keep_count,
    percentile,
    percentile_topk,
    reduce,
    superquantile,
    uniform,
)
from batchtrim.selection import above
from batchtrim.selection.base import asks_for_all, select_valid, top_indices
from tiers import often

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# few distinct values, so that ties are common, and the special ones
VALUES = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, float("inf"), float("-inf"), float("nan"), -0.0, 0.125])
LOSSES = st.lists(st.one_of(VALUES, st.floats(0, 10, width=16)), min_size=1, max_size=60)
KEEPS = st.floats(0.01, 1.0)


def rows(selection: object) -> set[int]:
    return set(selection.indices.tolist())  # type: ignore[attr-defined]


drawn = given(LOSSES, KEEPS, st.sampled_from(DTYPES), st.sampled_from([0.0, 0.1, 0.3, 0.9]))


@settings(max_examples=75, deadline=None)
@drawn
def test_against_the_oracle(values: list[float], keep: float, dtype: torch.dtype, skip: float) -> None:
    losses = torch.tensor(values, dtype=dtype)
    seen = losses.double().numpy()
    assert rows(hardest()(losses, keep)) == oracles.hardest(seen, keep)
    assert rows(easiest()(losses, keep)) == oracles.easiest(seen, keep)
    assert rows(between(skip)(losses, keep)) == oracles.between(seen, keep, skip)
    fixed = torch.tensor(keep, dtype=torch.float64)
    for rule, expected in (
        (hardest(), oracles.hardest(seen, keep)),
        (between(skip), oracles.between(seen, keep, skip)),
    ):
        assert set(rule.compiled_mask(losses, fixed, len(values)).nonzero().flatten().tolist()) == expected


test_against_the_oracle_often = often(drawn, test_against_the_oracle, 300)


numbers = given(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=40), KEEPS)


@settings(max_examples=50, deadline=None)
@numbers
def test_superquantile_against_the_oracle(values: list[float], keep: float) -> None:
    losses = torch.tensor(values, dtype=torch.float64)
    selection = superquantile()(losses, keep)
    found = float(reduce(losses, selection))
    assert found == pytest.approx(oracles.superquantile(losses.numpy(), keep), rel=1e-9, abs=1e-9)
    assert selection.weights is None or bool((selection.weights >= 0).all()), "no sample is ever pushed up"


test_superquantile_against_the_oracle_often = often(numbers, test_superquantile_against_the_oracle, 200)


@pytest.mark.parametrize("keep", [0.1, 1e-30, 1e-300])
def test_superquantile_below_one_sample_is_the_largest_loss(keep: float) -> None:
    losses = torch.tensor([1.0, 3.0, 2.0])
    assert reduce(losses, superquantile()(losses, keep)).item() == 3.0


def test_superquantile_where_a_peer_gives_a_negative_weight() -> None:
    losses = torch.arange(64.0)
    selection = superquantile()(losses, 0.2)  # 12.8 samples
    assert selection.normalizer == pytest.approx(12.8)
    assert sorted(selection.weights.tolist())[0] == pytest.approx(0.8)
    assert float(reduce(losses, selection)) == pytest.approx((sum(range(52, 64)) + 0.8 * 51) / 12.8)


@settings(max_examples=50, deadline=None)
@given(st.permutations(list(range(12))), KEEPS)
def test_permuting_the_batch_permutes_the_choice(order: list[int], keep: float) -> None:
    losses = torch.linspace(0, 1, 12)
    for rule in (hardest(), easiest(), between(0.2), superquantile(), above(0.5)):
        plain, shuffled = rule(losses, keep), rule(losses[order], keep)
        assert {order[i] for i in rows(shuffled)} == rows(plain)


@pytest.mark.parametrize("n", [7, 300, 5000])
def test_ties_take_the_lower_row(n: int) -> None:
    losses = torch.ones(n)
    losses[-1] = 2.0
    k = keep_count(0.4, n)
    assert rows(hardest()(losses, 0.4)) == {*range(k - 1), n - 1}
    assert rows(hardest()(torch.full((n,), float("nan")), 0.4)) == set(range(k))


@pytest.mark.parametrize("n", [10, 5000])
def test_nan_counts_as_largest(n: int) -> None:
    losses = torch.rand(n)
    losses[n // 2] = float("nan")
    losses[1] = float("inf")
    assert {n // 2, 1} <= rows(hardest()(losses, 0.3))
    assert n // 2 not in rows(easiest()(losses, 0.9))
    assert rows(between(skip=1 / n)(losses, 0.5)).isdisjoint({n // 2})


def test_large_batches_against_a_stable_sort() -> None:
    losses = torch.randint(0, 50, (20_000,)).float()
    for k in (1, 300, 5_000, 19_999):
        expected = torch.sort(losses, descending=True, stable=True).indices[:k]
        assert set(top_indices(losses, k).tolist()) == set(expected.tolist())


@pytest.mark.parametrize(
    ("keep", "n", "k"),
    [(0.2, 128, 26), (0.25, 10, 2), (0.35, 10, 4), (0.2, 1, 1), (0.001, 5, 1), (1.0, 7, 7), (0.5, 0, 0)],
)
def test_keep_count_rounds_half_to_even(keep: float, n: int, k: int) -> None:
    assert keep_count(keep, n) == k


def test_above_keeps_all_over_the_threshold_and_min_keep() -> None:
    losses = torch.tensor([0.1, 3.0, 2.0, 0.5, float("nan")])
    assert rows(above(1.0)(losses, 1.0)) == {1, 2, 4}
    assert rows(above(2.0)(losses, 1.0)) == {1, 4}, "2.0 is not above it"
    assert rows(above(10.0, min_keep=2)(losses, 1.0)) == {1, 4}
    assert rows(above(10.0, min_keep=9)(losses, 1.0)) == {0, 1, 2, 3, 4}


def test_uniform_is_uniform_and_uses_its_own_generator() -> None:
    before = torch.get_rng_state()
    counts = torch.zeros(10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        counts[uniform()(torch.rand(10, generator=generator), 0.3, generator).indices] += 1
    assert torch.equal(before, torch.get_rng_state())
    assert counts.sum() == 6000
    assert (counts - 600).abs().max() < 5 * np.sqrt(2000 * 0.3 * 0.7)
    assert asks_for_all(uniform(), 1.0)
    assert not asks_for_all(uniform(like=above(0.5)), 1.0), "whatever `keep`, the other rule sets k"


def test_percentile_keeps_by_rank_among_recent_losses() -> None:
    rule, generator = percentile(beta=2.0, history=400), torch.Generator().manual_seed(0)
    losses = torch.linspace(0, 1, 100)
    counts = torch.zeros(100)
    for _ in range(400):
        counts[rule(losses, 1.0, generator).indices] += 1
    expected = 400 * ((torch.arange(100) + 1) / 100) ** 2
    assert (counts - expected).abs().max() < 5 * 10  # five deviations of a fair draw at p = 1/2
    state = pickle.loads(pickle.dumps(rule.state_dict()))
    twin = percentile(beta=2.0, history=400)
    twin.load_state_dict(state)
    draws = [r(losses, 1.0, torch.Generator().manual_seed(3)).indices for r in (rule, twin)]
    assert torch.equal(*draws)


def test_percentile_refers_to_its_history_and_keeps_at_least_the_hardest() -> None:
    rule, generator = percentile(beta=500.0, history=4), torch.Generator().manual_seed(0)
    assert rows(rule(torch.tensor([9.0, 9.0, 9.0]), 1.0, generator)) == {0, 1, 2}
    assert rows(rule(torch.tensor([1.0, 3.0, 2.0]), 1.0, generator)) == {1}, "below a 9 all are unlikely"
    assert rows(rule(torch.tensor([1.0, 3.0, 2.0, 3.0]), 1.0, generator)) == {1, 3}, "every 9 is forgotten"
    shorter = percentile(history=2)
    shorter.load_state_dict(rule.state_dict())
    assert shorter.state_dict()["recent"].tolist() == [2.0, 3.0]
    assert percentile(beta=0)(torch.rand(20), 1.0, generator).k == 20


def test_percentile_topk_draws_k_and_favours_hard_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(20)
    for _ in range(1000):
        selection = percentile_topk()(torch.arange(20.0), 0.5, generator)
        assert selection.k == 10 == len(rows(selection))
        counts[selection.indices] += 1
    assert counts[15:].sum() > 2.5 * counts[:5].sum()


def test_masked_entries_count_neither_in_rank_nor_in_k() -> None:
    losses = torch.tensor([9.0, 1.0, 8.0, 2.0, 3.0, 4.0])
    mask = torch.tensor([False, True, False, True, True, True])
    selection = select_valid(hardest(), losses, 0.5, mask)
    assert rows(selection) == {4, 5}
    assert selection.candidates == 4
    assert select_valid(hardest(), losses, 0.5, ~mask & mask).k == 0


def test_selection_helpers() -> None:
    selection = superquantile()(torch.tensor([0.1, 3.0, 2.0, 0.5, 1.0]), 0.5)
    rising = selection.rising()
    assert rising.indices.tolist() == [1, 2, 4]
    assert rising.weights.tolist() == [1.0, 1.0, 0.5]
    assert selection.mask().tolist() == [False, True, True, False, True]


@pytest.mark.parametrize(
    "rule", [hardest(), easiest(), between(0.1), uniform(), above(1.0), superquantile(), percentile()]
)
def test_rules_pickle_and_compare(rule: object) -> None:
    assert pickle.loads(pickle.dumps(rule)) == rule == copy.deepcopy(rule)


def test_wrong_parameters() -> None:
    with pytest.raises(ValueError, match=r"expected `skip` in \[0, 1\), got 10\. It is the fraction of the batch"):
        between(10)
    with pytest.raises(ValueError, match="expected `beta` to be at least 0"):
        percentile(-1)
    with pytest.raises(ValueError, match="expected `min_keep` to be at least 1, got 0"):
        above(1.0, 0)
    with pytest.raises(TypeError, match="expected `threshold` to be a number"):
        above("high")  # type: ignore[arg-type]
