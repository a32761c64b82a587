"""Folders and tables that commands read and write, as a person types them."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path

import pytest

from batchtrim.lab import cli, terminal
from batchtrim.lab.analyse import claims
from batchtrim.lab.present import results
from commands import batchtrim, mistake

NUMBERS = "8 \N{PLUS-MINUS SIGN} 1, \N{MINUS SIGN}0.8 to \N{EN DASH}0.2"
TINY = ["--epochs", "1", "--train-size", "100", "--seeds", "0,", "--workers", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BATCHTRIM_DATA", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)  # a terminal's width, which whoever runs the tests may have set


def test_a_second_comparison_with_other_settings_goes_to_a_folder_of_its_own(tmp_path: Path) -> None:
    batchtrim("compare", *TINY, "-q")
    done = batchtrim("compare", *TINY, "--lr", "0.01")
    assert done.exit_code == 0, done.output
    assert "runs go to runs/digits-mlp-adam-1ep-lr0.01: runs/digits-mlp-adam-1ep holds runs" in done.stderr
    again = batchtrim("compare", *TINY, "--lr", "0.01")
    assert "2 of 2 runs are recorded already" in again.stderr


def test_show_takes_method_and_seed_and_lists_runs_by_name() -> None:
    batchtrim("compare", *TINY, "--out", "here", "--keep-log", "-q")
    done = batchtrim("show", "here", "--method", "full", "--seed", "0", "--out", "full.html")
    assert done.exit_code == 0, done.output
    assert "digits mlp full seed 0" in Path("full.html").read_text()
    wrong = batchtrim("show", "here", "--method", "tirm")
    assert wrong.exit_code == 2
    assert "got method 'tirm'. Did you mean 'trim'? There are:" in wrong.stderr
    assert "digits mlp trim linear 1-0.2 seed 0  (--key" in wrong.stderr


def test_lines_to_a_pipe_are_whole_and_times_are_distinguished() -> None:
    done = batchtrim("compare", *TINY, "--out", "here")
    assert any("minus baseline on the same seed, in points" in line for line in done.stdout.splitlines())
    assert "s training, " in done.stderr
    assert "s in all" in done.stderr
    assert "epoch 1/1, batch 1/1" in done.stderr


@pytest.mark.parametrize("command", [[], ["compare"], ["show"]])
def test_h_is_help(command: list[str]) -> None:
    assert "Usage:" in batchtrim(*command, "-h").stdout


def write_row(folder: Path) -> None:
    folder.mkdir()
    config = {"method": "full", "seed": 0, "dataset": "digits"}
    row = {"schema": 1, "key": "a", "config": config, "status": "finished", "test_error": 0.1}
    costs = dict.fromkeys(("seconds", "seconds_eval", "samples_forward", "samples_backward", "steps"), 1)
    (folder / "runs.jsonl").write_text(json.dumps({**row, **costs, "curve": {}}) + "\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["compare", "folder"],
            "expected a TOML file, got the folder folder. To train on images in it: --dataset folder\n",
        ),
        (["compare", "runs-here"], "For the report on its runs: batchtrim report runs-here"),
        (["compare", "bytes.toml"], "expected bytes.toml to be text in UTF-8"),
        (["compare", "place.toml"], "got 'out'. It belongs on the command line: --out."),
        (["compare", "part.toml"], "got 'as_json'. It belongs on the command line: --json."),
        (["compare", "number.toml"], "expected `grid` to be tables, each under a line [[grid]]"),
        (["compare", "--out", ""], "expected the name of a folder, got nothing"),
        (["compare", "--dataset", ""], "expected `dataset` to have at least one value"),
        (["compare", "--dataset", "nowhere"], "svhn; or a folder of class folders"),
        (["compare", "--data-dir", ".", "--dataset", "my/photos"], "and no folder 'my/photos' here"),
        (["compare", "--dataset", "./bad\udcff"], "expected the path of the data set in UTF-8, got b'./bad\\xff'"),
        (["train", "--method", "trim,full"], "`batchtrim compare` does many"),
        (["report", "--csv", "folder"], "expected a CSV file, got folder."),
        (["report", "--csv", "runs-here/runs.jsonl"], "expected a CSV file, got runs-here/runs.jsonl."),
        (["report", "--csv", "wide.csv"], "got c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11 and 28 more.\n"),
        (["report", "in-the-way"], "cannot use in-the-way/runs.jsonl (Is a directory)."),
        (["report", "runs-here", "--out", "bytes.toml"], "expected `out` to be a folder, got the file bytes.toml.\n"),
        (["claims", "claimed"], "got None. The smallest difference of interest, in points. That is in claimed/claims"),
    ],
)
def test_files_and_folders_of_the_wrong_kind_are_named(words: list[str], says: str) -> None:
    for each in ("folder", "in-the-way/runs.jsonl"):
        Path(each).mkdir(parents=True)
    for each in ("runs-here", "claimed"):
        write_row(Path(each))
    Path("claimed/claims.toml").write_text("[[claim]]\n")
    Path("bytes.toml").write_bytes(b"a = '\xff'")
    Path("place.toml").write_text("out = 'here'\n")
    Path("number.toml").write_text("grid = 3\n")
    Path("part.toml").write_text("[[grid]]\nas_json = true\n")
    Path("wide.csv").write_text(",".join(f"c{i}" for i in range(40)) + "\n" + ",".join("1" * 40) + "\n")
    assert says in mistake(*words)


def test_a_dumb_terminal_gets_line_by_line_output(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.console

    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(rich.console.Console, "is_terminal", property(lambda self: True))
    done = batchtrim("compare", *TINY, "--out", "here")
    assert "1/2 runs  digits mlp" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "\nstopped\n"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "cannot print, or write a file (No space left on device)",
        ),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    ],
)
def test_an_error_outside_of_runs_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli.options, "read_settings", fails)
    done = batchtrim("compare")
    assert done.exit_code == code
    assert says in done.stderr
    assert bool(says) == bool(done.stderr)
    assert "Traceback" not in done.stderr


def test_a_listing_that_cannot_be_printed_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, err: bool = False, **__: object) -> None:
        if not err:
            raise OSError(errno.ENOSPC, "No space left on device")
        said.append(str(_[0]))

    said: list[str] = []
    monkeypatch.setattr(cli.typer, "echo", full)
    assert batchtrim("methods").exit_code == batchtrim("methods", "--json").exit_code == 2
    assert said == ["error: cannot print, or write a file (No space left on device)."] * 2


def test_claims_make_the_folder_of_their_page(monkeypatch: pytest.MonkeyPatch) -> None:
    write_row(Path("here"))
    Path("here/claims.toml").write_text("")
    monkeypatch.setattr(claims, "read", lambda folder: folder)
    monkeypatch.setattr(results, "page", lambda records: "the page")
    monkeypatch.setattr(results, "drawings", lambda records: {"a.svg": "<svg/>"})
    done = batchtrim("claims", "here", "--out", "new/deep/page.md")
    assert done.exit_code == 0, done.output
    assert Path("new/deep/page.md").read_text() == "the page"
    assert Path("new/deep/drawings/results/a.svg").exists()
    assert "cannot write here (Is a directory)" in mistake("claims", "here", "--out", "here")


@pytest.mark.parametrize(("encoding", "printed"), [("ascii", "8 +- 1, -0.8 to -0.2 ??"), ("utf-8", f"{NUMBERS} é?")])
def test_what_an_encoding_lacks_is_printed_plainer(
    monkeypatch: pytest.MonkeyPatch, encoding: str, printed: str
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    terminal.print_plainly()
    print(f"{NUMBERS} é\udcff", end="", flush=True)
    assert raw.getvalue().decode(encoding) == printed
