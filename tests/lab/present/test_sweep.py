"""A sweep as a grid, few seeds, and charts as files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from batchtrim.lab.analyse import comparison
from batchtrim.lab.present import charts, figures, report, sweep, wording
from batchtrim.lab.present.caveat_texts import caveat_texts

MakeRow = Callable[..., dict[str, Any]]


@pytest.fixture
def swept(make_row: MakeRow) -> comparison.Summary:
    rows = [make_row("full", seed, 0.10 + seed / 1000) for seed in range(3)]
    for schedule in ("linear", "cosine"):
        for end in (0.1, 0.5):
            least = 0.02 if (schedule, end) == ("cosine", 0.1) else 0.0
            rows += [
                make_row("trim", s, 0.09 - least + (s * 3 % 5) / 500, schedule=schedule, keep_end=end) for s in range(3)
            ]
            rows += [make_row("random", s, 0.10 + (s * 3 % 5) / 500, schedule=schedule, keep_end=end) for s in range(3)]
    return comparison.summarize(rows)


def test_the_verdict_of_a_sweep_names_the_best_arm_of_several(make_row: MakeRow) -> None:
    """It said "in 1 of 1 (best: linear to 0.2)" of a method with one arm, and the same of two that differ by engine."""
    rows = [make_row("full", seed, 0.10 + seed / 1000) for seed in range(3)]
    for engine, error in (("exact", 0.11), ("shared", 0.09)):
        rows += [
            make_row("trim", s, error + (s * 3 % 5) / 50, schedule="linear", keep_end=0.2, engine=engine)
            for s in range(3)
        ]
    for method in ("random", "focal", "two_sided"):
        rows += [make_row(method, s, 0.10 + (s * 3 % 5) / 50) for s in range(3)]
    (said,) = (wording.group_verdict(group) for group in comparison.summarize(rows).groups)
    assert said == (
        "trim: no difference seen in 2 of 2 (best: trim (engine shared)); random: no difference seen; "
        "focal: no difference seen; two_sided: no difference seen"
    )


def test_a_best_arm_with_diverged_runs_is_told_as_such(make_row: MakeRow) -> None:
    """It was named best without a word: its mean is over fewer seeds, perhaps the easier ones."""
    rows = [make_row("full", seed, 0.10 + seed / 1000) for seed in range(4)]
    for schedule in ("linear", "cosine"):
        for end in (0.1, 0.5):
            error = 0.05 if (schedule, end) == ("cosine", 0.1) else 0.09
            rows += [make_row("trim", s, error + s * 3 % 5 / 500, schedule=schedule, keep_end=end) for s in range(4)]
    for row in rows:
        if row["config"]["seed"] == 3 and row["test_error"] is not None and row["test_error"] < 0.08:
            row |= {"status": "diverged", "test_error": None}
    (group,) = comparison.summarize(rows).groups
    (grid,) = sweep.grids(group)
    assert ", over the 3 of 4 runs that did not diverge. Picked" in grid.said
    for end in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        rows += [make_row("random", s, 0.1 + s * 3 % 5 / 500, schedule="linear", keep_end=end) for s in range(4)]
    (group,) = comparison.summarize(rows).groups
    assert "(best: cosine to 0.1 (some diverged))" in wording.group_verdict(group)


def test_a_sweep_has_a_grid_for_each_method_with_the_best_marked(swept: comparison.Summary) -> None:
    trim, random = sweep.grids(swept.groups[0])
    assert (trim.method, random.method, trim.ends) == ("trim", "random", ("0.1", "0.5"))
    best = [
        (name, end)
        for name, cells in trim.rows
        for end, cell in zip(trim.ends, cells, strict=True)
        if cell and cell.best
    ]
    assert best == [("cosine", "0.1")]
    assert "Picked out of 4 on the test set" in trim.said
    assert random.said == "4 of 4 share the best mean of test error."  # named the first
    page = report.comparison_page(swept)
    assert page.count("★") == 1 + 4
    assert "trim: schedule by end" in page


def test_the_headline_of_a_sweep_is_a_line(swept: comparison.Summary) -> None:
    said = wording.headline(swept)
    assert said.startswith("trim: ")
    assert "best: cosine to 0.1" in said
    assert said.count("best") == 1  # all of random's are equal
    assert len(said) < 200


def test_other_comparisons_have_no_grid(make_row: MakeRow) -> None:
    rows = [make_row(method, seed, 0.1 + seed / 100) for method in ("full", "trim") for seed in range(3)]
    assert sweep.grids(comparison.summarize(rows).groups[0]) == []


def test_two_seeds_are_too_few_and_no_interval_leaves_what_can_be(make_row: MakeRow) -> None:
    rows = [make_row(m, s, error) for m in ("full", "trim", "random") for s, error in enumerate((0.02, 0.9))]
    summary = comparison.summarize(rows)
    for arm in summary.groups[0].arms:
        assert arm.moments.t == (0.0, 1.0)
        assert arm.paired is None or max(map(abs, arm.paired.moments.t or ())) <= 1.0
    assert wording.headline(summary).startswith("too few seeds to tell: 2 pairs")
    assert "2 seeds are too few" in caveat_texts(summary.groups[0])[0]


def test_views_at_an_equal_budget_carry_no_colour_of_a_verdict(make_row: MakeRow) -> None:
    rows = [
        make_row(m, s, (0.1 if m == "full" else 0.05) + s / 1000 * (1 + (m == "trim")))
        for m in ("full", "trim")
        for s in range(4)
    ]
    values = report.group_values(comparison.summarize(rows).groups[0])
    assert [row["colour"] for row in values["table"]["rows"]] == ["", "lower"]
    assert {row["colour"] for view in values["views"] for row in view["table"]["rows"]} == {""}


def test_overlapping_dots_and_lines_are_distinguished() -> None:
    row = charts.Differences("trim", 1, (0, 1, 2), (0.1, 0.1, 0.1), 0.1, None, None, "")
    drawn = str(charts.differences([row], x_label="", fmt=str))
    assert len({part.partition('"')[0] for part in drawn.split('cy="')[1:]}) == 3
    same = [charts.Series(name, n, (1, 2, 3), (3.0, 2.0, 1.0)) for n, name in enumerate("abc")]
    drawn = str(charts.lines(same, x_label="", y_label="", fmt=str))
    assert ("over1" in drawn, "over2" in drawn) == (True, True)
    assert "over1" not in str(
        charts.lines([same[0], charts.Series("d", 1, (1, 2, 3), (9.0, 8.0, 7.0))], x_label="", y_label="", fmt=str)
    )


@pytest.mark.parametrize("count", [2, 3, 11])
def test_no_dot_of_any_chart_hides_another(count: int) -> None:
    names = "abcdefghijk"[:count]
    at_one = [charts.Point(name, n, 3.0, 0.1 + 1e-5 * n, None) for n, name in enumerate(names)]
    points = [*at_one, charts.Point("z", 8, 1.0, 0.3, None)]
    costs = str(charts.scatter(points, x_label="", y_label="", x_fmt=str, fmt=str))
    row = charts.Differences("a", 1, tuple(range(count)), (0.1,) * count, 0.1, None, None, "")
    single = [charts.Series(name, n, (1,), (0.1,)) for n, name in enumerate(names)]
    for drawn in (
        costs,
        str(charts.differences([row], x_label="", fmt=str)),
        str(charts.lines(single, x_label="", y_label="", fmt=str)),
    ):
        dots = re.findall(r'<circle class="(\w+)" (cx="[^"]+" cy="[^"]+" r="[^"]+")', drawn)
        assert len(dots) == len(set(dots)) >= count
    assert len(re.findall('class="ring"', costs)) == count - 1, "a dot of its own is no ring"
    assert len(set(re.findall('class="ring" cx="([^"]+)"', costs))) == 1, "the numbers stay true"


def test_one_epoch_has_dots_with_a_legend_and_hollow_ones_for_dashed_lines(make_row: MakeRow) -> None:
    rows = [make_row(m, s, 0.1 + s / 100, epochs=1) for m in ("full", "trim") for s in range(3)]
    (group,) = comparison.summarize(rows).groups
    drawn = {name: figures.standalone(chart, group, note) for name, chart, note in figures._charts(group)}
    assert "trim</text>" in drawn["test-error"]
    assert "Dashed: of every sample seen." in drawn["loss-of-kept-samples-and-of-all"]
    assert 'class="ring dashed"' in drawn["loss-of-kept-samples-and-of-all"]
    assert 'class="ring dashed"' not in drawn["test-error"]


def test_charts_are_written_as_svg_and_png(swept: comparison.Summary, tmp_path: Path) -> None:
    from PIL import Image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "SCALE", 1)  # a ninth of the pixels
        paths = figures.save(swept, tmp_path / "figures")
    assert {path.suffix for path in paths} == {".svg", ".png"}
    assert {path.stem for path in paths} >= {"differences", "test-error", "error-against-backward-samples"}
    for path in paths:
        if path.suffix == ".svg":
            text = path.read_text()
            ElementTree.fromstring(text)
            assert "var(--" not in text
            assert ("Dashed: of every sample seen." in text) == (path.stem == "loss-of-kept-samples-and-of-all")
        else:
            assert len(Image.open(path).convert("RGB").resize((64, 64)).getcolors(4096) or []) > 3


def test_a_figure_is_valid_xml_whatever_the_names(make_row: MakeRow) -> None:
    """A control character in a method's name made the PNG fail with the renderer's own error."""
    rows = [make_row(m, seed, 0.1 + seed / 100) for m in ("full", "a\x01\ufffe<b>&\x1b") for seed in range(3)]
    (group,) = comparison.summarize(rows).groups
    drawn = report.group_values(group)
    for card in drawn["costs"]:
        ElementTree.fromstring(figures.standalone(card.chart, group))
    assert r"a\x01\ufffe&lt;b&gt;&amp;\x1b" in figures.standalone(drawn["curves"][0].chart, group)
