"""Statistics against numbers worked out by hand, scipy's own tests, and simulation."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats as scipy_stats

from batchtrim.lab.analyse import inference


def test_moments_by_hand():
    found = inference.moments([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.n, found.mean) == (5, 3.0)
    assert found.std == pytest.approx(math.sqrt(2.5))
    half = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)  # 0.975 quantile of t with 4 degrees of freedom, from a table
    assert found.t == pytest.approx((3 - half, 3 + half))
    assert found.bootstrap is not None
    low, high = found.bootstrap
    assert 1.6 <= low <= 2.0
    assert 4.0 <= high <= 4.4
    assert inference.moments([1.0, 2.0, 3.0, 4.0, 5.0]) == found, "the bootstrap must repeat"


def test_the_bootstrap_of_many_values_needs_little_memory():
    tracemalloc.start()
    try:
        inference.moments(range(1_000))  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[1] < 50e6, "all resamples at once are 80 MB, twice"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("values", "mean"), [([], None), ([0.5], 0.5)])
def test_moments_of_too_few_values_have_no_interval(values, mean):
    assert inference.moments(values) == inference.Moments(len(values), mean, None, None, None)


def test_paired_t_by_hand():
    # mean 2, std 1, n 4: t = 2 / (1 / 2) = 4 on 3 degrees of freedom; but std of 1, 2, 2, 3 is sqrt(2/3).
    differences = [1.0, 2.0, 2.0, 3.0]
    t = 2 / (math.sqrt(2 / 3) / 2)
    # Closed form of the t distribution with 3 degrees of freedom.
    cdf = 0.5 + (t / math.sqrt(3) / (1 + t * t / 3) + math.atan(t / math.sqrt(3))) / math.pi
    assert inference.paired_t(differences) == pytest.approx(2 * (1 - cdf))
    assert inference.paired_t(differences) == pytest.approx(scipy_stats.ttest_1samp(differences, 0).pvalue)


@pytest.mark.parametrize(
    ("differences", "p_t", "p_wilcoxon"),
    [([], None, None), ([0.1], None, None), ([0.0, 0.0, 0.0], 1.0, 1.0), ([0.1, 0.1, 0.1], None, 0.25)],
)
def test_degenerate_differences(differences, p_t, p_wilcoxon):
    assert inference.paired_t(differences) == p_t
    assert inference.wilcoxon(differences) == p_wilcoxon


def test_wilcoxon_by_hand_and_against_scipy():
    # Five negative differences: only the one sign pattern of 32 is as extreme, on either side: 2/32.
    assert inference.wilcoxon([-1.0, -2.0, -3.0, -4.0, -5.0]) == pytest.approx(2 / 32)
    # Ranks 1.5, 1.5, 3 with the positive sum 1.5: sums at or below 1.5 are {} and two singles of 8.
    assert inference.wilcoxon([1.0, -1.0, -2.0]) == pytest.approx(2 * 3 / 8)
    rng = np.random.default_rng(1)
    for n in (6, 9, 20, 40):
        data = rng.normal(0.3, 1.0, n)
        assert inference.wilcoxon(data) == pytest.approx(scipy_stats.wilcoxon(data, method="exact").pvalue)


def test_wilcoxon_with_ties_against_all_signs():
    rng = np.random.default_rng(0)
    for n in range(2, 9):
        data = rng.integers(1, 5, n) * rng.choice([-1.0, 1.0], n)
        ranks = scipy_stats.rankdata(abs(data))
        sums = np.array([ranks @ signs for signs in itertools.product((0, 1), repeat=n)])
        rarer = min((sums <= ranks[data > 0].sum()).mean(), (sums >= ranks[data > 0].sum()).mean())
        assert inference.wilcoxon([*data, 0.0]) == pytest.approx(min(1.0, 2 * rarer)), data


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.04 times 3, 2, 1: 0.03, 0.04, 0.04; the None is no test.
    assert inference.holm([0.04, 0.01, None, 0.02]) == pytest.approx([0.04, 0.03, None, 0.04])
    assert inference.holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert inference.holm([]) == []


def test_detectable_effect_from_tables_and_simulation():
    # Known from power tables: a paired test over 34 pairs finds 0.495 standard deviations, over 10 pairs 0.996.
    assert inference.detectable_effect(34) == pytest.approx(0.495, abs=0.002)
    assert inference.detectable_effect(10) == pytest.approx(0.996, abs=0.002)
    draws = np.random.default_rng(0).normal(inference.detectable_effect(5), 1.0, (40_000, 5))
    assert (scipy_stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


def test_two_pairs_have_tests_but_no_detectable_difference():
    assert inference.paired_t([0.1, 0.3]) == pytest.approx(scipy_stats.ttest_1samp([0.1, 0.3], 0).pvalue)
    assert inference.wilcoxon([0.1, 0.3]) == 0.5
    assert inference.detectable(inference.moments([0.1, 0.3])) is None
    three = inference.detectable(inference.moments([0.1, 0.2, 0.3]))
    assert three == pytest.approx(0.1 * inference.detectable_effect(3))


def test_the_unit_is_the_largest_value_s():
    assert [inference.unit_of(each) for each in ([1e-3, -1000.0, math.nan], [0.3, 0.0], [0.0], [])] == [512, 0.25, 1, 1]


def test_wilcoxon_of_many_pairs_takes_no_minutes():
    """The exact distribution of 2,000 pairs took five seconds, of 10,000 minutes; every method has its own."""
    draws = np.random.default_rng(0).normal(0.03, 1.0, 2001)
    for data in (draws, draws.round(1)):
        assert inference.wilcoxon(data) == pytest.approx(scipy_stats.wilcoxon(data, method="approx").pvalue, rel=1e-6)
    few = draws[:500]
    assert inference.wilcoxon(few) == pytest.approx(scipy_stats.wilcoxon(few, method="approx").pvalue, rel=5e-3)
