"""Metrics other than the test error: which way is better, how they are written, on every page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from batchtrim.lab import headline, summarize
from batchtrim.lab.analyse.csv_table import to_records
from batchtrim.lab.metric import ERROR, HIGHER, LOWER, Metric
from batchtrim.lab.present import report


def rows(name: str, gain: float, level: float = 0.5) -> list[dict[str, float | str]]:
    return [
        {"method": method, "seed": seed, name: level + 0.01 * seed + (gain + 0.001 * (seed % 2)) * (method == "trim")}
        for method in ("full", "trim")
        for seed in range(6)
    ]


@pytest.mark.parametrize("name", [*HIGHER, *LOWER])
def test_names_that_tell_which_way_is_better(name: str) -> None:
    assert Metric.called(name).higher_is_better == (name in HIGHER)
    assert Metric.called(name.upper()).higher_is_better == (name in HIGHER)
    with pytest.raises(ValueError, match="got the other way round"):
        Metric.called(name, name not in HIGHER)


def test_other_names_have_to_say_it() -> None:
    assert Metric.called("score", True).better == "higher"
    with pytest.raises(ValueError, match="whose name does not imply it"):
        Metric.called("score")
    with pytest.raises(ValueError, match="Did you mean 'rmse'"):
        Metric.called("rsme")
    with pytest.raises(TypeError, match="expected `higher_is_better` to be true or false, got 'no'"):
        Metric.called("score", "no")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "gain", "says"),
    [
        ("error", -0.02, "trim: lower error by 1.95 points"),
        ("accuracy", 0.02, "trim: higher accuracy by 2.05 points"),
        ("rmse", -0.02, "trim: lower rmse by 0.0195"),
        ("f1", 0.02, "trim: higher f1 by 0.0205"),
        ("f1", -0.02, "trim: lower f1 by 0.0195"),
        ("perplexity", 0.0, "trim: no difference seen; a difference under"),
    ],
)
def test_verdicts_name_the_metric(name: str, gain: float, says: str) -> None:
    assert headline(summarize(rows(name, gain))).startswith(says)


@pytest.mark.parametrize(
    ("name", "gain", "colour"), [("f1", 0.02, "lower"), ("f1", -0.02, "higher"), ("rmse", 0.02, "higher")]
)
def test_the_page_colours_a_gain_as_a_gain_and_says_no_error(
    name: str, gain: float, colour: str, tmp_path: Path
) -> None:
    report.write_report(to_records(rows(name, gain), "results.csv"), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert f'<div class="verdict {colour}">' in page
    text = re.sub(r"<style>.*?</style>|<script.*?</script>", "", page, flags=re.DOTALL)
    assert "test error" not in text.lower().replace("training error", "")
    assert "points" not in text
    assert f">{name}<" in page
    told = (tmp_path / "report.md").read_text()
    assert f"| {name} |" in told
    assert f"{'above' if name == 'f1' else 'below'} zero is better" in told
    assert f",{name}," in (tmp_path / "report.csv").read_text().splitlines()[1]


def test_scales_of_any_size_are_compared() -> None:
    small = [{**row, "rmse": float(row["rmse"]) * 1e-9} for row in rows("rmse", -0.02)]
    large = [{**row, "rmse": float(row["rmse"]) * 1e9} for row in rows("rmse", -0.02)]
    (a,), (b,) = summarize(small).groups, summarize(large).groups
    assert a.arms[1].paired is not None
    assert b.arms[1].paired is not None
    assert a.arms[1].paired.p_t == pytest.approx(b.arms[1].paired.p_t, rel=1e-6)
    assert a.arms[1].paired.verdict is b.arms[1].paired.verdict


def test_numbers_are_written_as_the_metric_asks() -> None:
    assert ERROR.text(0.0213) == "error 2.13 %"
    assert Metric.called("rmse").text(0.45123) == "rmse 0.4512"
    assert ERROR.text(None) == "error unknown"


def test_the_numbers_of_a_row_are_scipy_s(tmp_path: Path) -> None:
    """Values above 1, which intervals of errors are cut to; the last run of trim is missing."""
    full, trim, random = (31.0, 29.0, 33.0, 30.0, 36.0), (24.0, 22.0, 29.0, 21.0), (32.0, 28.0, 35.0, 33.0, 35.0)
    table = [
        {"method": method, "seed": seed, "rmse": values[seed] if seed < len(values) else None}
        for method, values in (("full", full), ("trim", trim), ("random", random))
        for seed in range(5)
    ]
    report.write_report(to_records(table, "results.csv"), tmp_path)
    lines = [line.split(" | ") for line in (tmp_path / "report.md").read_text().splitlines() if " | " in line]
    cells = {line[0].strip("| "): [each.replace("\N{MINUS SIGN}", "-") for each in line[1:7]] for line in lines}
    tests = {
        name: stats.ttest_rel(values, full[: len(values)]) for name, values in (("trim", trim), ("random", random))
    }
    holm = {"trim": 2 * tests["trim"].pvalue, "random": tests["random"].pvalue}
    for name, values, runs in (("trim", trim, "4, 1 failed"), ("random", random, "5")):
        differences = np.subtract(values, full[: len(values)])
        low, high = tests[name].confidence_interval()
        assert cells[name] == [
            runs,
            f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}",
            f"{np.mean(differences):+.1f}",
            f"{low:+.1f} to {high:+.1f}",
            f"{holm[name]:.3f}",
            f"{stats.wilcoxon(differences.round(12)).pvalue:.3f}",
        ]


def test_a_thousand_rows_report_in_seconds(tmp_path: Path) -> None:
    import time

    many = [
        {"method": f"m{m}", "seed": s, "error": 0.1 + 0.001 * ((7 * m + 13 * s) % 29), "time": 10.0 + s}
        for m in range(10)
        for s in range(100)
    ]
    start = time.process_time()
    report.write_report(to_records(many, "results.csv"), tmp_path, "m0")
    assert time.process_time() - start < 5.0
