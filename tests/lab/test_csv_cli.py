"""Results of other programs in a table, reported from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from batchtrim.lab.analyse.csv_table import read_csv, to_records
from commands import batchtrim, mistake


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def table(path: Path, header: str = "method,seed,error,time") -> list[str]:
    lines = [header]
    for method, gain in (("full", 0.0), ("trim", 0.02)):
        lines += [
            f"{method},{seed},{0.2 + 0.01 * seed - gain - 0.001 * (seed % 2):.4f},{10 + seed}" for seed in range(6)
        ]
    path.write_text("\n".join(lines) + "\n")
    return lines


def test_a_csv_of_results_is_reported(tmp_path: Path) -> None:
    table(tmp_path / "results.csv")
    done = batchtrim("report", "--csv", "results.csv", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["verdict"] == "trim: exactly 2.00 points lower on every seed: no spread, so no test"
    assert not Path("results").exists()
    assert batchtrim("report", "--csv", "results.csv").exit_code == 0
    assert Path("results/report.html").exists()
    assert "Run it again" not in Path("results/report.md").read_text()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("first", ["", "sep={}\r\n", "\r\n"])
def test_files_that_excel_writes_are_read(tmp_path: Path, encoding: str, separator: str, first: str) -> None:
    """A first line sep=; was taken for the header, and text in UTF-16 refused."""
    lines = table(tmp_path / "plain.csv")
    text = first.format(separator) + "\r\n".join(lines).replace(",", separator)
    (tmp_path / "results.csv").write_bytes(text.encode(encoding))
    read, plain = (read_csv(tmp_path / name, "error") for name in ("results.csv", "plain.csv"))
    assert [row["test_error"] for row in read] == [row["test_error"] for row in plain]
    wrong = text.replace(f"full{separator}1", f"full{separator}x")
    (tmp_path / "results.csv").write_bytes(wrong.encode(encoding))
    with pytest.raises(ValueError, match="whole number in line 4 " if first else "whole number in line 3 "):
        read_csv(tmp_path / "results.csv")


def test_missing_pairs_are_named_and_the_others_compared(tmp_path: Path) -> None:
    lines = table(tmp_path / "results.csv")
    del lines[2]  # full, seed 1
    lines[-1] = "trim,5,,15"
    lines.append("trim,9,0.3,1")
    (tmp_path / "results.csv").write_text("\n".join(lines))
    done = batchtrim("report", "--csv", "results.csv")
    said = " ".join(done.stdout.split())
    assert "trim has no finished run with seed 5: compared on the 4 pairs that are there." in said
    assert "The baseline full has no finished run with seeds 1, 9 of trim" in said
    page = Path("results/report.html").read_text()
    assert "compared on the 4 pairs that are there" in page
    told = json.loads(batchtrim("report", "--csv", "results.csv", "--json").stdout)
    assert told["groups"][0]["methods"][1]["paired"]["seeds"] == [0, 2, 3, 4]
    assert len(told["groups"][0]["caveats"]) == 2


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("method;seed;rmse\nfull;0;1.5\ntrim;0;1.25\n", [], None),
        ("method,seed,rmse\nfull,0,\"1,5\"\n", [], "Use a decimal point"),
        ("method,seed,error\nfull,0,12.5\n", [], "expected `error` in [0, 1] in line 2 of results.csv, got 12.5"),
        ("method,seed,error\nfull,0,0.1\nfull,0,0.2\n", [], "got 'full' with seed 0 again in line 3"),
        ("method,seed,error\nfull,zero,0.1\n", [], "expected `seed` to be a whole number in line 2"),
        ("method,seed,error\nfull,1.5,0.1\n", [], "expected `seed` to be a whole number in line 2"),
        ("method,seed,error\n,1,0.1\n", [], "expected a method in line 2"),
        ("method,error\nfull,0.1\n", [], "expected a column 'seed' in results.csv, got method, error"),
        ("method,seed,rmse,mae\nfull,0,1,2\n", [], "besides method, seed and time, got rmse, mae. Name it with"),
        ("method,seed,rmse,mae\nfull,0,1,2\ntrim,0,1,2\n", ["--metric", "mae"], None),
        ("method,seed,rmse\nfull,0,1\n", ["--metric", "mae"], "expected a column 'mae' in results.csv"),
        ("method,seed,rmse\nfull,0,1\n", ["--metric", "rsme"], "got method, seed, rmse. Did you mean 'rmse'?"),
        ("Method,Seed,rmse\nfull,0,1\n", [], "expected a column 'method' in results.csv, got Method, Seed, rmse.\n"),
        ("method,seed,rmse,time\nfull,0,1,-3\n", [], "expected `time` to be at least 0 seconds in line 2"),
        ("method,seed,score\nfull,0,1\n", [], "Pass --higher-is-better or --lower-is-better"),
        ("method,seed,score\nfull,0,1\ntrim,0,2\n", ["--higher-is-better"], None),
        ("method,seed,rmse\nfull,0\n", [], "expected 3 columns in line 2 of results.csv"),
        ("method,seed,seed,rmse\nfull,0,1,1\n", [], "got 'seed' twice"),
        ("", [], "expected at least one run in results.csv, got none"),
        ("method,seed,rmse\n", [], "expected at least one run in results.csv, got none"),
        ("method,seed,rmse\nfull,0,1\n", ["--baseline", "ful"], "expected `baseline` to be one of 'full', got 'ful'"),
    ],
)  # fmt: skip
def test_csv_files_of_every_kind(text: str, options: list[str], says: str | None) -> None:
    Path("results.csv").write_text(text)
    if says is None:
        assert batchtrim("report", "--csv", "results.csv", *options).exit_code == 0
        return
    said = mistake("report", "--csv", "results.csv", *options)
    assert says in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(("column", "noted"), [("sets", True), ("paths", False), ("same", False), ("mae", False)])
def test_a_column_that_is_not_used_and_tells_runs_apart_is_noted(column: str, noted: bool) -> None:
    """Runs on two data sets were averaged, without a word."""
    given = {"sets": "ab" * 4, "paths": "abcdefgh", "same": "a" * 8, "mae": "12121212"}[column]
    rows = [{"method": m, "seed": s, "f1": 0.1 * s, column: given[4 * (m == "b") + s]} for m in "ab" for s in range(4)]
    note = "the column sets is not used: runs of a, b are compared as one"
    assert [row.get("notes") for row in to_records(rows, "rows", "f1")] == [[note] if noted else None] * 8


@pytest.mark.parametrize(
    ("name", "values", "noted"),
    [("f1", (0.5, 51.0), True), ("wer", (12.0, 0.1), True), ("rmse", (0.5, 51.0), False), ("f1", (0.5, 0.0), False)],
)
def test_fractions_beside_percent_are_noted(name: str, values: tuple[float, float], noted: bool) -> None:
    """A difference of 50 points was reported as certain."""
    rows = [{"method": m, "seed": s, name: values[m == "b"] * (1 + s / 9)} for m in "ab" for s in range(4)]
    found = to_records(rows, "rows")[0].get("notes")
    small, large = "ab" if values[0] < values[1] else "ba"
    note = f"every {name} of {small} is at most 1 and every one of {large} is more: give all of them as"
    assert [each.startswith(note) for each in found or ()] == [True] * noted


def test_seeds_of_64_bits_are_told_apart_and_missing_fields_named() -> None:
    """They were read as floats: 2^60 and 2^60 + 1 were one seed."""
    rows = [{"method": "a", "seed": 2**60 + n, "f1": 0.5} for n in range(2)]
    assert [row["config"]["seed"] for row in to_records(rows, "rows")] == [2**60, 2**60 + 1]
    for name, says in (("method", "expected a method in row 2 of rows"), ("seed", "expected `seed` to be a whole")):
        with pytest.raises(ValueError, match=says):
            to_records([rows[0], {key: value for key, value in rows[1].items() if key != name}], "rows")


def test_report_takes_a_folder_or_a_table() -> None:
    assert "got neither" in mistake("report")
    assert "got both" in mistake("report", "here", "--csv", "x.csv")
    assert "expected a CSV file x.csv, got nothing there" in mistake("report", "--csv", "x.csv")
    Path("bytes.csv").write_bytes(b"\xff\x00\x01")
    assert "to be text in UTF-8" in mistake("report", "--csv", "bytes.csv")


@pytest.mark.parametrize(
    "text",
    [
        ",method,seed,f1\n0,full,0,0.5\n1,trim,0,0.75\n",  # pandas' row numbers
        "method;seed;f1;\nfull;0;0.5;\ntrim;0;0.75;\n;;;\n;;;\n",  # a spreadsheet's empty cells
        "\n\nmethod,seed,f1\nfull,0,0.5\n\ntrim,0,0.75\n",
        '\ufeff"method"\t"seed"\t"f1"\r\nfull\t0\t5e-1\r\ntrim\t0.0\t+0.75\r\n',
    ],
)
def test_what_other_programs_write_around_the_numbers(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(text, newline="")
    rows = read_csv("results.csv")
    assert [(row["config"]["method"], row["value"]) for row in rows] == [("full", 0.5), ("trim", 0.75)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method,seed,f1\nfull,0,1_0.5\n", "expected `f1` to be a number in line 2 of results.csv, got '1_0.5'"),
        ("method,seed,f1\nfull,1_0,0.5\n", "expected `seed` to be a whole number in line 2 of results.csv"),
        ("# mine\nmethod,seed,f1\nfull,0,0.5\n", "expected a column 'method' in results.csv, got # mine"),
        ("\n\nmethod,seed,f1\nfull,0,x\n", "in line 4 of results.csv, got 'x'"),
    ],
)
def test_invalid_numbers_and_tables(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)):
        read_csv("results.csv")


def test_a_line_break_in_a_name_stays_in_it(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text('method,seed,f1\n"a\nb",0,0.5\nab,0,0.75\n')
    assert [row["config"]["method"] for row in read_csv("results.csv")] == ["a\nb", "ab"]


def test_methods_whose_names_look_alike_are_noted(tmp_path: Path) -> None:
    """Runs of "Full" beside "full" took no part in full's mean, and nothing said so."""
    (tmp_path / "results.csv").write_text("method,seed,f1\nfull,0,0.5\nFull ,1,0.75\nnew,0,0.5\n")
    (note,) = read_csv("results.csv")[0]["notes"]
    assert note.startswith("'full', 'Full' are 2 methods, though their names differ by case, spaces")


def test_a_metric_may_be_called_line(tmp_path: Path) -> None:
    """The table was said to have no such column."""
    (tmp_path / "results.csv").write_text("method,seed,line\nfull,0,0.5\nfull,1,0.25\n")
    assert [row["value"] for row in read_csv("results.csv", "line", False)] == [0.5, 0.25]
