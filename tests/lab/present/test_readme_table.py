"""The README's table: from the records, between its marks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchtrim.lab.analyse import claims
from batchtrim.lab.present import readme_table, results

CLAIM = 'effect = 0.5\n[[claim]]\ntext = "It helps."\nmethod = "trim"\nagainst = "full"\nsays = "lower"\n'


@pytest.fixture
def record(make_row, tmp_path):
    def write(name: str, errors: dict[str, list[float]], **settings: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "claims.toml").write_text(CLAIM)
        rows = [make_row(m, seed, error, **settings) for m, each in errors.items() for seed, error in enumerate(each)]
        (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def test_a_row_holds_differences_intervals_and_backward_samples(record):
    here = record("one", {"full": [0.10, 0.12, 0.14], "trim": [0.09, 0.11, 0.13], "random": [0.2, 0.2]})
    _, _, row = readme_table.table([claims.read(here)]).splitlines()
    assert row == "| digits, mlp, adam | 3 | 12.00 ± 2.00 |  |  | −1.00 (−1.00 to −1.00; 60 %) |  |  |"  # noqa: RUF001


def test_the_last_record_of_a_problem_counts_and_easy_problems_come_first(record):
    old = record("1", {"full": [0.5] * 3, "trim": [0.5] * 3})
    new = record("2", {"full": [0.3] * 3, "trim": [0.3] * 3})
    hard = record("0", {"full": [0.6] * 3, "trim": [0.6] * 3}, train_size=10_000)
    few = record("3", {"full": [0.1] * 2, "trim": [0.1] * 2}, model="cnn")
    begun = record("4", {"full": [0.1] * 3, "trim": [0.1] * 2}, model="resnet8")
    rows = readme_table.table([claims.read(each) for each in (hard, new, few, begun, old)]).splitlines()[2:]
    assert [row.split(" | ")[0:3] for row in rows] == [
        ["| digits, mlp, adam", "3", "30.00 ± 0.00"],
        ["| digits, mlp, adam, 10,000 images", "3", "60.00 ± 0.00"],
    ]


def test_a_method_that_the_last_record_lacks_comes_from_the_one_before(record):
    old = record("1", {"full": [0.5] * 3, "trim": [0.5] * 3, "random": [0.6] * 3})
    new = record("2", {"full": [0.3] * 4, "trim": [0.4] * 4})
    (row,) = readme_table.table([claims.read(each) for each in (old, new)]).splitlines()[2:]
    assert row.split(" | ")[1:4] == ["4", "30.00 ± 0.00", "+10.00 (+10.00 to +10.00; 60 %; 3 seeds)"]
    assert row.split(" | ")[5] == "+10.00 (+10.00 to +10.00; 60 %)"


def test_a_record_with_missing_runs_counts_only_if_there_is_no_other(record):
    whole = record("1", {"full": [0.5] * 3, "trim": [0.5] * 3})
    begun = record("2", {"full": [0.3] * 4, "trim": [0.3] * 4})
    (begun / "claims.toml").write_text(f"partial = true\n{CLAIM}")
    for known, error in (((whole, begun), "50.00"), ((begun,), "30.00")):
        (row,) = readme_table.table([claims.read(each) for each in known]).splitlines()[2:]
        assert f" {error} " in row


def test_only_what_is_between_the_marks_changes(record, tmp_path):
    here = record("one", {"full": [0.10, 0.12, 0.14], "trim": [0.09, 0.11, 0.13]})
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    read = [claims.read(here)]
    readme_table.write(read, page)
    once = page.read_text()
    readme_table.write(read, page)
    marked = f"{readme_table.BEGIN}\n\n{readme_table.table(read)}\n\n{readme_table.END}"
    assert page.read_text() == once == f"before\n{marked}\nafter\n"


def test_a_page_without_marks_is_left_alone(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("no table here\n")
    with pytest.raises(ValueError, match="expected <!-- results --> and"):
        readme_table.write([], page)
    assert page.read_text() == "no table here\n"


@pytest.mark.parametrize("write", [results.page, readme_table.table])
def test_a_name_cannot_break_the_page(record, write):
    """In the headings and the table of gains, names of data sets were written as they are."""
    folder = record("one", {"full": [0.1, 0.12, 0.14], "trim": [0.09, 0.11, 0.13]}, dataset="a|<img src=x> [b](c)")
    lines = [line for line in write([claims.read(folder)]).splitlines() if "img" in line]
    assert lines
    assert all(r"a\|\<img src=x\> \[b\](c)" in line for line in lines)


def test_the_drawing_of_a_long_name_can_be_written(record, tmp_path):
    """The path of a data set became a file name longer than the file system allows."""
    errors = {"full": [0.1, 0.12, 0.14], "trim": [0.09, 0.11, 0.13], "random": [0.1, 0.1, 0.1]}
    folders = [record(name, errors, dataset=f"/data/{'images/' * 40}{name}") for name in ("one", "two")]
    results.write([claims.read(folder) for folder in folders], tmp_path / "page.md")
    assert len(list((tmp_path / results.DRAWINGS).iterdir())) == 2
