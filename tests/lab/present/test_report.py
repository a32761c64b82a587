"""The report says what the statistics say, escapes every label, fetches nothing, and opens in a browser."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import time
from html.parser import HTMLParser

import pytest
from rich.console import Console

from batchtrim.lab.analyse import comparison, csv_table
from batchtrim.lab.present import charts, curves, formats, report, svg, tables, wording

NASTY = '<script>alert("x")</script>&\'|'
VOID = {"meta", "link", "br", "wbr", "img", "input"}


class _Page(HTMLParser):
    """Checks that tags close in order, and gathers text, tags and addresses."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def test_page_is_whole_and_fetches_nothing(rows, tmp_path):
    path = report.write_report(rows, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    page = _Page(path.read_text(encoding="utf-8"))
    assert all(link.startswith("data:") for link in page.links)
    assert "default-src 'none'" in path.read_text(encoding="utf-8")
    assert page.tags.count("svg") >= 6
    for said in ("lower error by 0.96 points", "1 of 5 runs diverged (seed 4)", "0123456789ab", "Run"):
        assert said.lower() in page.text.lower(), said


def test_every_label_is_escaped(make_row, tmp_path):
    rows = [
        make_row(method, seed, 0.1 + seed / 100, model=NASTY, method_params={NASTY: NASTY} if i else {})
        for seed in range(3)
        for i, method in enumerate(("full", NASTY, NASTY))
    ]
    for row in rows:
        row["environment"]["cpu"] = NASTY
    text = report.write_report(rows, tmp_path).read_text(encoding="utf-8")
    assert _Page(text).tags.count("script") == 1
    assert "alert(" in text
    assert '<script>alert("x")' not in text
    assert "<script>" not in (tmp_path / "report.md").read_text(encoding="utf-8").partition("```")[0]


def test_markdown_and_csv_hold_the_numbers(rows, tmp_path):
    report.write_report(rows, tmp_path)
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    assert any(re.match(r"\| trim \| 5 \| 11.04 ± 1.58 \| .0.96 \|", line) for line in lines)
    table = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text(encoding="utf-8"))))
    as_run = {line["method"]: line for line in table if line["view"] == "as run"}
    assert float(as_run["trim"]["difference"]) == pytest.approx(-0.0096)
    assert as_run["random"]["diverged"] == "1"
    assert as_run["full"]["difference"] == ""
    assert {line["view"] for line in table} == {"as run", "Equal backward samples", "Equal training time"}


def test_json_is_plain_and_complete(rows):
    found = json.loads(json.dumps(tables.to_json(comparison.summarize(rows)), allow_nan=False))
    trim = found["groups"][0]["methods"][1]
    assert trim["label"] == "trim"
    assert trim["paired"]["moments"]["mean"] == pytest.approx(-0.0096)
    assert trim["test_error"]["by_seed"]["2"] == 0.11
    assert found["diverged"] == 1


def test_console_table_names_findings_and_losses(rows):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables.console_table(comparison.summarize(rows)))
    text = console.export_text()
    assert "trim: lower error by 0.96 points" in text
    assert "4/5" in text
    assert "1 of 5 runs diverged (seed 4)" in text


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 200])
def test_no_number_is_cut_off_on_a_narrow_console(make_row, width):
    errors = {"full": 0.10, "selective_backprop_topk": 0.25}
    rows = [make_row(m, s, error + 0.07 * (s % 2)) for m, error in errors.items() for s in range(4)]
    rows += [make_row("trim", s, 0.2, keep_end=end) for end in (0.1, 0.2) for s in range(4)]
    console = Console(width=width, record=True, file=io.StringIO())
    summary = comparison.summarize(rows)
    console.print(tables.console_table(summary))
    text = console.export_text()
    assert "…" not in text
    said = " ".join(text.split())
    for arm in summary.groups[0].arms:
        assert formats.error(arm) in said
        if arm.paired:
            assert formats.signed_interval(arm.paired.moments.t, arm.metric) in said
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(
    "errors",
    [
        {"full": [0.1]},
        {"full": [0.1], "trim": [0.2]},
        {"full": [0.0, 0.0, 0.0], "trim": [0.0, 0.0, 0.0]},
        {"full": [0.1, 0.1], "trim": [None, None]},
        {"full": [None, None]},
        {"trim": [0.1, 0.2]},
    ],
)
@pytest.mark.parametrize("epochs", [1, 3])
def test_degenerate_records_make_a_page_without_warnings(make_row, tmp_path, errors, epochs):
    rows = [
        make_row(method, seed, error, epochs=epochs)
        for method, each in errors.items()
        for seed, error in enumerate(each)
    ]
    page = _Page(report.write_report(rows, tmp_path).read_text(encoding="utf-8"))
    assert not re.search(r"\bnan\b|\binf\b", page.text)
    Console(file=io.StringIO()).print(tables.console_table(comparison.summarize(rows)))


def test_rows_without_curves_make_a_page(make_row, tmp_path):
    rows = [make_row("full", 0, None, status="failed") | {"curve": {}, "params": None}, make_row("full", 1)]
    assert "1 failed" in _Page(report.write_report(rows, tmp_path).read_text(encoding="utf-8")).text


def test_command_runs_the_same_settings_again(rows):
    """The command line's own parser reads the command that the page prints."""
    import typer

    from batchtrim.lab import cli

    said = wording.command(comparison.summarize(rows).groups[0])
    command = typer.main.get_command(cli.app)
    name, *rest = said.split()[1:]
    given = command.commands[name].make_context("compare", rest).params  # type: ignore[attr-defined]
    assert given["methods"] == "full,trim,random"
    assert given["seeds"] == "5"
    assert given["lr"] == 0.001
    assert given["keep_end"] == "0.2"


@pytest.mark.parametrize(
    ("settings", "flag", "kept"),
    [
        ({"dataset": "my photos", "test_split": 0.3, "data_version": "60a321c9967f"}, None, {"test_split": 0.3}),
        ({"dataset": "my photos", "skip_broken": True}, "skip_broken", {"dataset": "my photos"}),
        ({"dataset": "my photos", "skip_broken": False}, None, {}),
    ],
)
def test_the_command_holds_only_options(make_row, settings, flag, kept):
    import typer

    from batchtrim.lab import cli

    rows = [make_row(method, seed, **settings) for method in ("full", "trim") for seed in range(3)]
    said = wording.command(comparison.summarize(rows).groups[0])
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    given = commands["compare"].make_context("compare", shlex.split(said)[2:]).params
    assert bool(given["skip_broken"]) == (flag == "skip_broken")
    assert {name: given[name] for name in kept} == kept


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.02, 0.031, [0.02, 0.025, 0.03]),
        (5, 5, [5]),
        (2e-13, 9e-13, [2e-13, 4e-13, 6e-13, 8e-13]),  # they were all 0
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected, abs=0)


@pytest.mark.parametrize(("values", "written"), [((2.5, 3.5), "3"), ((1000.01, 1000.03), "1000.02"), ((7, 7), "7")])
def test_an_axis_shows_the_digits_that_differ(make_row, values, written):
    """Beside a large common part, all ticks were written 1000."""
    rows = [
        {**make_row("full", seed, None, status="finished", metric="rmse"), "value": value}
        for seed, value in enumerate(values)
    ]
    (group,) = comparison.summarize(rows).groups
    assert report._axis(group)(sum(values) / 2) == written


def test_the_front_is_what_no_other_point_beats():
    points = [charts.Point(name, 0, x, y, None) for name, x, y in (
        ("plain", 10.0, 3.0), ("cheap", 4.0, 4.0), ("best", 6.0, 2.0), ("beaten", 7.0, 2.5), ("as good", 6.0, 2.0),
        ("dearer, as good", 9.0, 2.0), ("cheapest", 1.0, 9.0),
    )]  # fmt: skip
    assert [point.label for point in charts.front(points)] == ["cheapest", "cheap", "best"]
    drawn = charts.scatter(points, x_label="cost", y_label="error", x_fmt=str, fmt=str)
    assert drawn.count('class="front"') == 1
    assert drawn.count("on the front") == 3
    assert [point.label for point in charts.front(points, higher_is_better=True)] == ["cheapest"]
    reached = [charts.Point("plain", 0, 10.0, 0.9, None), charts.Point("trim", 1, 6.0, 0.8, None)]
    reached.append(charts.Point("random", 2, 7.0, 0.7, None))
    assert [point.label for point in charts.front(reached, higher_is_better=True)] == ["trim", "plain"]
    assert 'class="front"' not in charts.scatter(points[:1], x_label="cost", y_label="error", x_fmt=str, fmt=str)


def test_names_keep_clear_of_whiskers_and_of_the_front():
    wide = charts.Point("selective_backprop_topk", 1, 60.0, 9.0, None)
    tall = charts.Point("full", 0, 100.0, 8.5, (7.0, 10.0))
    drawn = str(charts.scatter([wide, tall], x_label="", y_label="", x_fmt=str, fmt=str))
    (at,) = re.findall(r'class="name s1" x="([0-9.]+)" y="[0-9.]+" text-anchor="end"', drawn)
    assert float(at) < float(re.findall(r'class="big" cx="([0-9.]+)"', drawn)[0])
    level = [charts.Point("left", 1, 50.0, 5.0, None), charts.Point("right", 2, 90.0, 4.9, None)]
    level.append(charts.Point("far below", 3, 95.0, 1.0, None))
    drawn = str(charts.scatter(level, x_label="", y_label="", x_fmt=str, fmt=str))
    (name,) = re.findall(r'class="name s1" x="([0-9.]+)" y="([0-9.]+)" text-anchor="(\w+)"', drawn)
    dot, *_ = re.findall(r'class="big" cx="([0-9.]+)" cy="([0-9.]+)"', drawn)
    assert name[2] == "end" or abs(float(name[1]) - 4 - float(dot[1])) >= 5


def test_a_row_of_differences_clears_the_ground_under_its_name():
    label = "trim (keep_end 0.1, schedule linear, engine two_pass, momentum 0.9)"
    row = charts.Differences(label, 1, [0], [0.1], 0.1, (0.0, 0.2), None, "+0.10  [0.00 to +0.20]")
    drawn = str(charts.differences([row], x_label="", fmt=str))
    assert '<rect class="clear" x="12"' in drawn
    (room,) = re.findall(r'textLength="(\d+)" lengthAdjust', drawn)
    assert 16 + int(room) < svg.WIDTH - 16 - 7 * len(row.text)


def test_decimals_of_other_metrics_follow_their_spread(make_row):
    values = {"full": (0.7797, 0.7843, 0.7751), "trim": (0.7825, 0.7923, 0.7727)}
    rows = [
        {**make_row(method, seed, None, status="finished", metric="rmse", higher_is_better=False), "value": value}
        for method, each in values.items()
        for seed, value in enumerate(each)
    ]
    full, trim = comparison.summarize(rows).groups[0].arms
    assert formats.error(full) == "0.7797 ± 0.0046"
    assert formats.difference(trim.paired) == "+0.003"
    assert formats.signed_interval(trim.paired.moments.t, trim.metric) == "\N{MINUS SIGN}0.010 to +0.016"
    assert trim.metric.number(1.25e30, spread=1e29) == "1.25e+30"  # had 31 digits


def test_a_task_without_training_errors_has_no_empty_chart(make_row, tmp_path):
    rows = [make_row(method, seed, 0.1 + 0.01 * seed) for method in ("full", "trim") for seed in range(3)]
    assert "<h3>Training error</h3>" in report.write_report(rows, tmp_path).read_text()
    for row in rows:
        row["curve"].pop("train_error")
    assert "<h3>Training error</h3>" not in report.write_report(rows, tmp_path).read_text()


def test_a_curve_stands_at_the_epochs_that_were_logged(make_row):
    """Points were numbered 1, 2, 3: every fifth epoch was drawn as the first three."""
    rows = [
        make_row("full", seed, 0.1 + 0.1 * seed, epochs=3, test_errors=[0.4, 0.3, 0.1 + 0.1 * seed]) for seed in (0, 1)
    ]
    for row in rows:
        row["curve"]["epoch"] = [0, 5 + row["config"]["seed"], 10]
    (group,) = comparison.summarize(rows).groups
    (line,) = curves.series_of(group, report.styles(group), "test_error")
    assert line.x == [1, 6, 7, 11]
    assert line.y == pytest.approx([0.4, 0.3, 0.3, 0.15])
    assert line.high is not None
    assert line.high[-1] - line.y[-1] == pytest.approx(0.1 / 2**0.5)


def test_long_lines_are_thinned_and_end_where_they_end():
    long = charts.Series("x", 1, list(range(1000)), list(range(1000)))
    thin = charts._thin(long)
    assert len(thin.x) <= charts.MOST_POINTS + 1
    assert (thin.x[0], thin.x[-1]) == (0, 999)


@pytest.mark.slow
def test_a_thousand_runs_in_ten_seconds(make_row, tmp_path):
    methods = ["full", "trim", "random", "ohem", "focal"]
    rows = [
        make_row(method, seed, 0.1 + seed / 1000 + i / 500, epochs=50, lr=0.001 * (1 + setting))
        for setting in range(40)
        for i, method in enumerate(methods)
        for seed in range(5)
    ]
    start = time.perf_counter()
    page = report.write_report(rows, tmp_path)
    assert time.perf_counter() - start < 10
    assert page.stat().st_size < 20e6


def test_results_without_curves_and_costs_have_no_section_on_them(make_row, tmp_path):
    """The page of a table explained three charts, each of which was empty."""
    table = tmp_path / "table.csv"
    lines = [f"{method},{seed},{0.9 + 0.01 * seed}" for method in ("full", "trim") for seed in range(3)]
    table.write_text("\n".join(["method,seed,accuracy", *lines]))
    page = report.write_report(csv_table.read_csv(table), tmp_path / "out").read_text()
    assert "Seed by seed" in page
    for absent in ("Over training", "What it cost", "No curve", "Equal backward samples", "<dd></dd>", "Environment"):
        assert absent not in page
    assert "Environment" not in (tmp_path / "out" / "report.md").read_text()


def test_settings_of_a_method_are_words_and_not_python(make_row, tmp_path):
    """A parameter read {'keep': 0.5}."""
    rows = [make_row(method, seed, method_params={"keep": 0.5} if method == "superquantile" else {})
            for method in ("full", "superquantile") for seed in range(3)]  # fmt: skip
    page = report.write_report(rows, tmp_path).read_text()
    assert "keep 0.5" in page
    assert "method_params" not in page
    assert "{&#39;" not in page


@pytest.mark.parametrize(("methods", "told"), [(4, "training + testing: a "), (5, "Testing adds ")])
def test_seconds_of_many_methods_are_a_range(make_row, tmp_path, methods, told):
    """Of fifteen methods they were six lines of numbers."""
    rows = [make_row(method, seed) for method in "abcde"[:methods] for seed in range(2)]
    page = report.write_report(rows, tmp_path, "a").read_text()
    assert told in page
    assert ("Seconds for a run" in page) == (methods == 4)


def test_an_arm_whose_runs_all_failed_is_reported_as_failed(make_row):
    rows = [make_row(method, seed, None, status="failed") for method in ("full", "trim") for seed in range(3)]
    assert wording.headline(comparison.summarize(rows)) == "trim: every run of trim and of full failed"
    rows = rows[3:] + [make_row("full", seed, 0.1) for seed in range(3)]
    assert wording.headline(comparison.summarize(rows)) == "trim: every run of trim failed"


def test_numbers_of_very_good_and_very_short_runs(make_row):
    """Errors that are all 0 have no axis below it, and a budget under a second is not 0 seconds."""
    rows = [make_row(method, seed, 0.0, seconds=0.13) for method in ("full", "trim") for seed in range(3)]
    (group,) = comparison.summarize(rows).groups
    for card in report.group_values(group)["costs"]:
        assert "-" not in re.sub(r"<[^>]*>", "", str(card.chart))
    notes = [wording.view_note(view) for view in group.views]
    assert any(note.startswith("Read at 0.13 seconds of training") for note in notes), notes
    assert any(note.startswith("Read at 3,000 backward samples") for note in notes), notes


@pytest.mark.parametrize(
    ("value", "written"), [(999.4, "999"), (999.6, "1k"), (999_700, "1M"), (12_345, "12.3k"), (1e12, "1T"), (0, "0")]
)
def test_amounts_have_three_digits_and_a_letter(value, written):
    assert formats.amount(value) == written
