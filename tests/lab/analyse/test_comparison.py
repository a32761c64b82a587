"""Runs compared by seed: groups, verdicts, diverged and failed runs, views at equal budgets."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from batchtrim.lab.analyse import comparison, inference, views
from batchtrim.lab.analyse.comparison import Verdict
from batchtrim.lab.metric import Metric
from batchtrim.lab.present import wording
from tiers import few


def _rows(make_row, method, errors, **config):
    return [make_row(method, seed, error, **config) for seed, error in enumerate(errors)]


def _only(summary, method):
    return next(arm for arm in summary.groups[0].arms if arm.settings["method"] == method)


def _said(summary, method):
    return wording.verdict(_only(summary, method), summary.groups[0].reference)


def test_lower_error_is_seen_and_paired_by_seed(make_row):
    full = [0.10, 0.20, 0.30, 0.40, 0.50]  # a seed effect far larger than the difference: only pairing shows it
    trim = [0.089, 0.190, 0.289, 0.390, 0.489]
    summary = comparison.summarize([*_rows(make_row, "full", full), *reversed(_rows(make_row, "trim", trim))])
    paired = _only(summary, "trim").paired
    assert paired.seeds == (0, 1, 2, 3, 4)
    assert paired.differences == pytest.approx([-0.011, -0.010, -0.011, -0.010, -0.011])
    assert paired.p_t < 1e-4
    assert paired.p_wilcoxon == pytest.approx(2 / 32)
    assert paired.verdict is Verdict.LOWER
    assert _said(summary, "trim") == "lower error by 1.06 points"
    assert wording.headline(summary) == "trim: lower error by 1.06 points"
    assert _only(summary, "full").paired is None


def test_higher_error_is_stated_as_plainly(make_row):
    summary = comparison.summarize(
        [*_rows(make_row, "full", [0.10, 0.11, 0.12]), *_rows(make_row, "trim", [0.20, 0.212, 0.219])]
    )
    assert _only(summary, "trim").paired.verdict is Verdict.HIGHER
    assert _said(summary, "trim").startswith("higher error by 10.03 points")


def test_no_difference_names_what_could_not_have_been_seen(make_row):
    summary = comparison.summarize(
        [
            *_rows(make_row, "full", [0.10, 0.11, 0.12, 0.13, 0.14]),
            *_rows(make_row, "trim", [0.11, 0.10, 0.13, 0.12, 0.14]),
        ]
    )
    paired = _only(summary, "trim").paired
    # Differences 1, -1, 1, -1, 0 points: std exactly 1 point, so the detectable one is the effect for five pairs.
    assert paired.moments.std == pytest.approx(0.01)
    assert paired.detectable == pytest.approx(0.01 * inference.detectable_effect(5))
    assert paired.verdict is Verdict.NOT_SEEN
    assert _said(summary, "trim") == (
        "no difference seen; a difference under 1.68 points could not have been seen reliably"
    )


def test_holm_decides_the_verdict(make_row):
    """A p of 0.02 is a finding alone and none among four methods."""
    full = [0.10, 0.10, 0.10, 0.10, 0.10]
    better = [0.090, 0.092, 0.088, 0.097, 0.098]
    alone = comparison.summarize([*_rows(make_row, "full", full), *_rows(make_row, "trim", better)])
    paired = _only(alone, "trim").paired
    assert 0.0125 < paired.p_t < 0.05
    assert paired.p_holm == paired.p_t
    assert _said(alone, "trim").startswith("lower error")
    noise = [[0.10, 0.11, 0.09, 0.12, 0.08 + i / 1000] for i in range(3)]
    others = [row for i, name in enumerate(("random", "ohem", "focal")) for row in _rows(make_row, name, noise[i])]
    among = comparison.summarize([*_rows(make_row, "full", full), *_rows(make_row, "trim", better), *others])
    paired = _only(among, "trim").paired
    assert paired.p_holm == pytest.approx(4 * paired.p_t)
    assert _said(among, "trim").startswith("no difference seen")


@pytest.mark.parametrize(
    ("full", "trim", "verdict"),
    [
        ([0.1], [0.2], "too few seeds to tell: 1 pair, 3 or more are needed"),
        ([0.1, 0.1], [0.2, 0.3], "too few seeds to tell: 2 pairs, 3 or more are needed"),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], "the same error on every seed"),
        ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], "exactly 10.00 points higher on every seed: no spread, so no test"),
        ([0.1, 0.2, 0.3], [None, None, None], "every run diverged (3 of 3)"),
    ],
)
def test_degenerate_cases_have_sensible_words(make_row, full, trim, verdict):
    summary = comparison.summarize([*_rows(make_row, "full", full), *_rows(make_row, "trim", trim)])
    assert _said(summary, "trim") == verdict


def test_an_arm_far_off_does_not_hide_the_spread_of_another(make_row):
    """The unit that tells spread from rounding was that of the group: beside 1e15, 19 and 20 were "the same"."""
    values = {"full": [20.0, 20.3, 20.1], "trim": [19.0, 19.4, 19.1], "random": [1e15, 2e15, 3e15]}
    rows = [
        {**make_row(method, seed, None, status="finished", metric="perplexity"), "value": value}
        for method, each in values.items()
        for seed, value in enumerate(each)
    ]
    paired = _only(comparison.summarize(rows), "trim").paired
    assert paired.verdict is Verdict.LOWER
    assert paired.p_t == pytest.approx(inference.paired_t([-1.0, -0.9, -1.0]))


def test_a_p_value_that_is_no_number_is_no_finding():
    assert comparison.verdict_of(inference.moments([0.1, 0.2, 0.4]), float("nan")) is Verdict.NOT_SEEN


def test_diverged_runs_are_counted_and_named(make_row):
    rows = [
        *_rows(make_row, "full", [0.20, 0.21, 0.22, 0.23, 0.24]),
        *_rows(make_row, "trim", [0.10, None, 0.12, None, 0.141]),
    ]
    summary = comparison.summarize(rows)
    arm = _only(summary, "trim")
    assert summary.diverged == 2
    assert arm.diverged == (1, 3)
    assert arm.moments.n == arm.paired.moments.n == 3
    assert _said(summary, "trim").startswith(
        "2 of 5 runs diverged (seeds 1, 3); over the 3 pairs that finished: lower error"
    )


def test_diverged_baseline_is_named_too(make_row):
    rows = [*_rows(make_row, "full", [0.2, 0.21, 0.22, None]), *_rows(make_row, "trim", [0.1, 0.11, 0.1201, 0.1])]
    verdict = _said(comparison.summarize(rows), "trim")
    assert verdict.startswith("1 of 4 runs of full diverged (seed 3); over the 3 pairs that finished: lower error")


def test_the_legend_tells_that_intervals_are_not_corrected():
    """An interval without zero stood beside "no difference seen"."""
    for metric in (Metric(), Metric("rmse"), Metric("accuracy", True)):
        assert "The 95 % interval is not corrected. p: paired t-test, Holm-corrected" in wording.legend(metric)


def test_one_pair_and_none_beside_diverged_runs(make_row):
    rows = [*_rows(make_row, "full", [0.2, None, None]), *_rows(make_row, "trim", [0.1, 0.11, 0.12])]
    assert "; over the one pair that finished: too few seeds to tell: 1 pair" in _said(
        comparison.summarize(rows), "trim"
    )
    rows[0] = make_row("full", 0, None)
    assert _said(comparison.summarize(rows), "trim").endswith("(seeds 0, 1, 2); no seed in common with the baseline")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "before its learning rate has fallen, which counts against it: full_equal_compute is the control"),
        ({"lr_schedule": "constant"}, "before its training has ended, which counts against it: full_equal_compute is"),
        ({"task": "mine.py:train"}, "before its training has ended, which counts against it."),
    ],
)
def test_the_note_on_an_equal_budget_fits_the_runs(make_row, settings, told):
    """A task's page spoke of a learning rate that it may not have, and of a control that no task can run."""
    rows = [make_row(method, seed, 0.1, **settings) for method in ("full", "trim") for seed in range(2)]
    note = wording.view_note(comparison.summarize(rows).groups[0].views[0])
    assert told in note
    assert ("full_equal_compute" in note) == ("task" not in settings)


def test_failed_runs_take_no_part_but_are_counted(make_row):
    rows = [*_rows(make_row, "full", [0.2, 0.21, 0.22]), make_row("full", 3, None, status="failed")]
    summary = comparison.summarize(rows)
    assert summary.failed == 1
    assert _only(summary, "full").failed == (3,)
    assert _only(summary, "full").moments.n == 3


def test_without_a_baseline_there_is_no_comparison(make_row):
    summary = comparison.summarize(_rows(make_row, "trim", [0.1, 0.2, 0.3]))
    assert wording.headline(summary) == "no runs of the baseline 'full', so nothing to compare with"
    assert _only(summary, "trim").moments.mean == pytest.approx(0.2)


def test_groups_differ_in_everything_but_method_and_seed(make_row):
    rows = [
        *_rows(make_row, "full", [0.1, 0.2]),
        *_rows(make_row, "trim", [0.1, 0.2], keep_end=0.2),
        *_rows(make_row, "trim", [0.1, 0.2], keep_end=0.5),
        *_rows(make_row, "full", [0.3, 0.4], optimizer="sgd", lr=0.1),
        *_rows(make_row, "full", [0.3, 0.4], optimizer="sgd", lr=0.2),
    ]
    first, second, third = comparison.summarize(rows).groups
    assert [arm.label for arm in first.arms] == ["full", "trim (keep_end 0.2)", "trim (keep_end 0.5)"]
    assert [arm.label for arm in second.arms] == ["full"]
    # what follows from the optimizer is left out, what tells two groups of one optimizer apart is not
    titles = ["digits, mlp, adam", "digits, mlp, sgd, lr 0.1", "digits, mlp, sgd, lr 0.2"]
    assert [first.title, second.title, third.title] == titles


def test_a_row_written_twice_counts_once(make_row):
    rows = [*_rows(make_row, "full", [0.1, 0.2]), make_row("full", 1, 0.4)]
    arm = _only(comparison.summarize(rows), "full")
    assert arm.errors == {0: 0.1, 1: 0.4}


def test_a_run_that_failed_later_does_not_replace_one_that_finished(make_row):
    finished = make_row("full", 0, 0.1)
    failed = {**finished, "status": "failed", "test_error": None}
    assert _only(comparison.summarize([finished, failed]), "full").errors == {0: 0.1}


def test_two_runs_of_one_seed_and_settings_are_refused(make_row):
    """The last of them counted, without a word."""
    rows = [make_row("full", 0, 0.1), {**make_row("full", 0, 0.3), "key": "abc"}]
    with pytest.raises(ValueError, match=r"expected one run of full with seed 0 in a comparison, got two .* and abc"):
        comparison.summarize(rows)


def test_views_read_each_curve_at_the_budget_all_reached(make_row):
    keep = [1.0, 0.5, 0.5]
    rows = [
        make_row("full", 0, 0.10, epochs=3, test_errors=[0.50, 0.30, 0.10], seconds=9.0),
        make_row("trim", 0, 0.20, epochs=3, test_errors=[0.60, 0.40, 0.20], seconds=12.0, keep=keep),
    ]
    views = {view.name: view for view in comparison.summarize(rows).groups[0].views}
    # trim has 1000 + 500 + 500 backward samples, full has 0.30 after its second epoch's 2000.
    assert views["samples_backward"].budget == 2000
    assert [arm.moments.mean for arm in views["samples_backward"].arms] == pytest.approx([0.30, 0.20])
    # full ends after 9 s; there trim is a quarter of the way from its second evaluation (8 s) to its third (12 s).
    assert views["seconds"].budget == 9.0
    assert [arm.moments.mean for arm in views["seconds"].arms] == pytest.approx([0.10, 0.35])


def test_a_view_reads_nothing_before_the_first_evaluation(make_row):
    row = make_row("full", 0, 0.1, epochs=2, test_errors=[0.5, 0.1], seconds=10.0)
    assert views.error_at(row, 4.9, "seconds") is None
    assert views.error_at(row, 5.0, "seconds") == pytest.approx(0.5)
    assert views.error_at(row, 99.0, "seconds") == pytest.approx(0.1)


def test_views_without_curves_say_so(make_row):
    row = make_row("full", 0, 0.1) | {"curve": {}}
    for view in comparison.summarize([row]).groups[0].views:
        assert view.budget is None
        assert "Not every run has a curve, so no budget in common" in wording.view_note(view)


def test_views_without_a_finished_run_say_so(make_row):
    for status in ("failed", "diverged"):
        for view in comparison.summarize([make_row("full", 0, None, status=status)]).groups[0].views:
            assert view.budget is None
            assert "No run finished, so no budget in common" in wording.view_note(view)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_that_ends_before_the_first_evaluation_of_another_leaves_no_budget(make_row, epochs):
    """full's first epoch, with all that warms up, takes longer than both of trim's."""
    rows = [make_row("full", seed, 0.1, epochs=epochs, seconds=2.0 * epochs + seed) for seed in range(2)]
    rows += [make_row("trim", seed, 0.1, epochs=epochs, seconds=1.5 + seed / 10) for seed in range(2)]
    view = comparison.summarize(rows).groups[0].views[1]
    assert view.budget is None
    assert wording.view_note(view).startswith(
        "No budget in common: trim, seed 0, ended before the first evaluation of full, seed 1."
    )


@pytest.mark.parametrize("draw", few(range(40), range(10)))
def test_a_view_reads_all_finished_runs_or_none(make_row, draw):
    """One or several epochs, tests not after each, one method much faster, failed and diverged runs."""
    random = Random(draw)
    epochs, every = random.choice([1, 2, 3, 8]), random.choice([1, 2, 3])
    rows = []
    for method, seed in itertools.product(("full", "trim", "random"), range(3)):
        status = random.choice(["finished"] * 6 + ["failed", "diverged"])
        seconds = random.uniform(1.0, random.choice([2.0, 50.0]))
        error = 0.1 if status == "finished" else None
        row = make_row(method, seed, error, status=status, epochs=epochs, seconds=seconds)
        errors = row["curve"]["test_error"]
        row["curve"]["test_error"] = [
            each if (number + 1) % every == 0 or number + 1 == epochs else None for number, each in enumerate(errors)
        ]
        rows.append(row)
    (group,) = comparison.summarize(rows).groups
    for view in group.views:
        assert [list(arm.errors) for arm in view.arms] == [list(arm.errors) for arm in group.arms]
        assert (view.budget is None) == ("o budget in common" in wording.view_note(view))


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="expected at least one finished run, got none"):
        comparison.summarize([])


def test_a_default_that_older_runs_left_out_or_recorded_is_one(make_row):
    """The setting came after the first runs of a record: the later half stood in a group of its own."""
    older = _rows(make_row, "full", [0.1, 0.2], test_views="plain")
    (group,) = comparison.summarize([*older, *_rows(make_row, "trim", [0.1, 0.2])]).groups
    assert "test_views" not in group.settings
    assert len(comparison.summarize([*older, *_rows(make_row, "trim", [0.1, 0.2], test_views="mirror")]).groups) == 2
