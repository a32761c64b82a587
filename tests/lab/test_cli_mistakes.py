"""Mistakes that have a likelier meaning, and output that cannot be written: one line each, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchtrim.lab import options
from commands import batchtrim, mistake
from tiers import few


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results.csv").write_text("method,seed,acc\nfull,0,0.9\ntrim,0,0.95\n")
    Path("section.toml").write_text('[settings]\nmethods = ["full"]\n')
    Path("photos").mkdir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "results.csv"], "For a table of results: batchtrim report --csv results.csv"),
        (["show", "results.csv"], "For a table of results: batchtrim report --csv results.csv"),
        (["compare", "results.csv"], "For a table of results: batchtrim report --csv results.csv"),
        (["sweep", "results.csv"], "For a table of results: batchtrim report --csv results.csv"),
        (["compare", "photos"], "To train on images in it: --dataset photos"),
        (
            ["compare", "section.toml"],
            "expected a value of `settings` in section.toml, got a table. Put settings above",
        ),
        (["compare", "--param", "keep_end=0.3"], "It is an option: --keep-end 0.3"),
        (["compare", "--param", "trim.keep_end=0.3"], "It is an option: --keep-end 0.3"),
        (["train", "--param", "trim.lr=1"], "It is an option: --lr 1"),
        (["compare", "--param", "trim.start=0.3"], "expected a parameter of method 'trim' (none), got 'start'"),
        (["claims", "nowhere"], "expected a folder of records, got nowhere, which is not a folder."),
        (["claims", "results.csv"], "expected a folder of records, got results.csv, which is not a folder."),
        (["report", "--csv", "results.csv", "--out", "results.csv"], "to be a folder, got the file results.csv."),
        (["report", "--csv", "results.csv", "--figures", "results.csv"], "to be a folder, got the file results.csv."),
    ],
)
def test_the_likelier_meaning_is_named(words: list[str], message: str) -> None:
    said = mistake(*words)
    assert message in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--epochs", "ten"], "'--epochs': expected a whole number, got 'ten'."),
        (["compare", "--epochs", "1e1"], "expected a whole number, got '1e1'. Did you mean 10?"),
        (["compare", "--epochs", "10.0"], "expected a whole number, got '10.0'. Did you mean 10?"),
        (["compare", "--epochs", "2.5"], "expected a whole number, got '2.5'.\n"),
        (["compare", "--lr", "0,1"], "expected a number, got '0,1'. Did you mean 0.1?"),
        (["compare", "--lr", "\N{MINUS SIGN}0.1"], "got '\N{MINUS SIGN}0.1'. Did you mean -0.1?"),
        (["compare", "--momentum", "90 %"], "expected a number, got '90 %'. Did you mean 0.9?"),
        (["compare", "--lr", ""], "expected a number, got ''.\n"),
        (["compare", "--lr", "1e-3,1e-2"], "(batchtrim compare FILE.toml): lr = [0.001, 0.01]."),
        (["train", "--epochs", "1, 2"], "(batchtrim compare FILE.toml): epochs = [1, 2]."),
        (["train", "--seed", "1,2"], "got '1,2'. For several: batchtrim compare --seeds 1,2."),
        (["compare", "--lr", "1e-3,high"], "expected a number, got '1e-3,high'.\n"),
        (["compare", "--workers", "1,2"], "expected a whole number, got '1,2'.\n"),
        (["compare", "--retries", "2x"], "'--retries': expected a whole number, got '2x'.\n"),
        (["show", "photos", "--seed", "first"], "'--seed': expected a whole number, got 'first'.\n"),
        (["compare", "--keep-end", "20%"], "numbers, comma-separated, got '20%'. Did you mean 0.2?"),
        (["compare", "--seeds", "0-4"], "whole numbers, comma-separated, got '0-4'. Did you mean 0,1,2,3,4?"),
        (["compare", "--seeds", "1..3"], "whole numbers, comma-separated, got '1..3'. Did you mean 1,2,3?"),
        (["compare", "--seeds", "4-0"], "whole numbers, comma-separated, got '4-0'.\n"),
        (["compare", "--seeds", "0-1000000"], "whole numbers, comma-separated, got '0-1000000'.\n"),
    ],
)
def test_invalid_numbers_are_named_with_the_expected_form(words: list[str], message: str) -> None:
    """Some releases of typer name neither the option's value nor what is wrong with it."""
    assert message in mistake(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "trim"], "got the method trim. Methods are an option: --methods trim."),
        (["compare", "full,trim"], "Methods are an option: --methods full,trim."),
        (["compare", "--methods", "trim", "full"], "Methods are an option: --methods trim,full."),
        (["compare", "--methods", "full trim"], "by commas, got 'full trim'. Did you mean full,trim?"),
        (["compare", "--methods", "full;trim"], "by commas, got 'full;trim'. Did you mean full,trim?"),
        (["sweep", "--schedule", "linear step"], "by commas, got 'linear step'. Did you mean linear,step?"),
        (["sweep", "--keep-end", "0.1 0.2"], "by commas, got '0.1 0.2'. Did you mean 0.1,0.2?"),
        (["compare", "--seeds", "1 2"], "by commas, got '1 2'. Did you mean 1,2?"),
        (["compare", "--methods", "FULL,trim"], "got 'FULL'. Did you mean 'full'?"),
        (["compare", "--norm", "batch,group"], "'batch,group'. Several are a list in a TOML file (batchtrim compare"),
        (
            ["compare", "--augment", "crop,flip"],
            "one `augment` of none, crop, flip, crop+flip, got 'crop,flip'",
        ),
        (["train", "--label-noise", "none,symmetric:0.1"], 'label_noise = ["none", "symmetric:0.1"].'),
        (["compare", "--schedule", "LINEAR"], "got 'LINEAR'. Did you mean 'linear'?"),
        (["compare", "digits"], "expected a TOML file, got the dataset digits. It is an option: --dataset digits"),
        (["compare", "cnn,vit"], "It is an option: --model cnn,vit"),
        (["compare", "done/runs.jsonl"], "For the report on these runs: batchtrim report done"),
        (["show", "done/runs.jsonl"], "expected a keep log in done/keep, found none."),
        (["show", "own"], "Let the function call run.keep_log(n), and run it into a new folder."),
        (["report", "--csv", "done/report.csv"], "Is it a report of batchtrim's own? Its runs: batchtrim report done"),
        (["compare", "--data-dir", ""], "expected the name of a folder, got nothing."),
        (["compare", "--data-dir", "nowhere"], "expected --data-dir to name an existing folder, got nowhere."),
        (["show", "done", "--data-dir", "nowhere"], "expected --data-dir to name an existing folder, got nowhere."),
        (["report", "--figures", " "], "expected the name of a folder, got nothing."),
        (["compare", ""], "expected the name of a file, got nothing."),
        (["report", "--csv", ""], "expected the name of a file, got nothing."),
    ],
)
def test_words_in_the_wrong_place_are_named(words: list[str], message: str) -> None:
    Path("done").mkdir()
    row = {"schema": 1, "key": "a", "config": {"method": "trim", "seed": 0}, "status": "finished"}
    Path("done/runs.jsonl").write_text(json.dumps(row) + "\n")
    Path("own").mkdir()
    row["config"]["task"] = "task.py:train"
    Path("own/runs.jsonl").write_text(json.dumps(row) + "\n")
    Path("done/report.csv").write_text("dataset,method\ndigits,full\n")
    assert message in mistake(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid = []", "expected `grid` to have at least one table, under a line [[grid]], got an empty list."),
        ("dataset = 3", "expected `dataset` to be text, got 3."),
        ("dataset = [true]", "expected `dataset` to be text, got True."),
        ('dataset = "photos"\ngroup = 3', "expected `group` to be text, got 3."),
        ('dataset = "photos"\nskip_broken = 1', "expected `skip_broken` to be true or false, got 1."),
        ('skip_broken = "no"', "expected `skip_broken` to be true or false, got 'no'."),
        ('lr = "0.1"', "expected `lr` to be a number in g.toml, got the text '0.1'. Leave out the quotes."),
        ('seeds = "1"', "expected `seeds` to be a number in g.toml, got the text '1'. Leave out the quotes."),
        ('[[grid]]\nepochs = "2"', "expected `epochs` to be a number in g.toml, got the text '2'."),
        ('methods = "full,trim"', 'to be a list in g.toml, got the text \'full,trim\'. Write ["full", "trim"].'),
        ('[[grid]]\nschedule = "step, linear"', 'Write ["step", "linear"].'),
        ('[grid]\nmodel = "cnn"', "expected a value of `grid` in g.toml, got a table. Double its brackets: [[grid]]."),
        ("lower_is_better = 1", "expected `lower_is_better` alone, and true or false, in g.toml, got 1."),
        ("lower_is_better = true\nhigher_is_better = false", "expected `lower_is_better` alone"),
        ("json = true", "expected settings of runs in g.toml, got 'json'. It belongs on the command line: --json."),
        ('data_version = "abc"', "expected no `data_version` with the data set 'digits', got 'abc'."),
        ("[param.small_loss]\nnoise_rate = 0.1", "got a table. Put parameters into [params.METHOD]."),
    ],
)
def test_values_of_the_wrong_kind_in_toml_are_named(text: str, message: str) -> None:
    Path("g.toml").write_text(text)
    assert message in mistake("compare", "g.toml")


@pytest.mark.parametrize("text", ["params = 3", "[params]\ntrim = 3", "[[grid]]\nparams = 3"])
@pytest.mark.parametrize("typed", [(), ("--methods", "full"), ("--param", "small_loss.noise_rate=0.1")])
def test_parameters_that_are_no_tables_are_named_whatever_is_typed(text: str, typed: tuple[str, ...]) -> None:
    """Beside --methods it was a traceback."""
    Path("g.toml").write_text(text)
    assert "expected `params` to be tables such as [params.small_loss], got" in mistake("compare", "g.toml", *typed)


@pytest.mark.parametrize("text", ["\ufeffseeds = [0]\r\nepochs = 1\r\n", "\tseeds = [0]\n\tepochs = 1\n"])
def test_toml_as_editors_leave_it_is_read(text: str) -> None:
    Path("g.toml").write_text(text, newline="")
    assert options.read_settings({"grid": Path("g.toml")}) == {"seeds": [0], "epochs": 1}


def test_the_direction_of_a_metric_has_both_names_in_toml() -> None:
    """The page says that names are those of the options; one of the two was unknown."""
    Path("g.toml").write_text("[[grid]]\nlower_is_better = true\n[[grid]]\nhigher_is_better = true\n")
    assert options.read_settings({"grid": Path("g.toml")})["grid"] == [
        {"higher_is_better": False}, {"higher_is_better": True}
    ]  # fmt: skip


def test_a_home_after_an_equals_sign_is_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shells leave the ~ of --out=~/runs as it is: a folder of that name was made."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    done = batchtrim("report", "--csv=results.csv", "--out=~/my runs", "--figures=~/drawn")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "home" / "my runs" / "report.html").exists()
    assert (tmp_path / "home" / "drawn").exists()
    assert not Path("~").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "full", "--methods", "trim"], "expected --methods once, got it 2 times. Separate its values by"),
        (["--seeds", "1", "--seeds", "2", "--seeds", "3"], "expected --seeds once, got it 3 times."),
        (["--keep-end", "0.1", "--keep-end=0.2"], "expected --keep-end once, got it 2 times."),
        (
            ["--param", "small_loss.noise_rate=0.1", "--param", "small_loss.noise_rate=0.2"],
            "Several values are comma-separated: small_loss.noise_rate=0.1,0.2",
        ),
        (["--threads", "1000000"], "expected `threads` to be at most"),
    ],
)
def test_a_list_given_twice_loses_none_of_its_values(words: list[str], message: str) -> None:
    """The last one won without a word: `--methods full --methods trim` compared nothing."""
    assert message in mistake("compare", *words)


def test_the_last_of_a_repeated_option_counts_unless_it_is_a_list() -> None:
    assert "`epochs` to be at least 1, got 0" in mistake("compare", "--epochs", "2", "--epochs", "0", "-q", "-q")


@pytest.mark.parametrize("name", ["report.html", "grid.json"])
def test_a_file_beside_the_runs_names_their_folder(name: str) -> None:
    Path("done").mkdir()
    for each in (name, "runs.jsonl"):
        Path("done", each).write_text("")
    said = mistake("report", f"done/{name}")
    assert f"got done/{name}. For the report on the runs beside it: batchtrim report done" in said


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "expected RANK to be a number, as torchrun sets it"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "expected LOCAL_WORLD_SIZE to be a number"),
        ({"WORLD_SIZE": "two"}, "expected WORLD_SIZE to be a number"),
        ({"WORLD_SIZE": "2", "RANK": "-1", "LOCAL_WORLD_SIZE": "2"}, "got '-1'. For a run on one, unset WORLD_SIZE."),
    ],
)
def test_half_an_environment_of_torchrun_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert message in mistake("compare", "--epochs", "1", "--train-size", "100", "-q", "--workers", "1")


def test_a_link_to_nothing_as_a_folder_is_named() -> None:
    Path("link").symlink_to("nowhere")
    said = mistake("compare", "--seeds", "1", "--epochs", "1", "--train-size", "100", "--out", "link", "-q")
    assert said == "error: expected `out` to be a folder, got link, a link to nothing.\n"


def test_a_name_of_two_lines_is_printed_in_one() -> None:
    done = batchtrim("report", "--csv", "results.csv", "--out", "two\nlines")
    assert done.stdout.splitlines()[-1] == "report: two\\nlines/report.html"


# --version and --help import no library; the others take a second of a processor each
def in_a_shell(command: str, unbuffered: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"B": f"{sys.executable} -m batchtrim", **({"PYTHONUNBUFFERED": "1"} if unbuffered else {})}
    return subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("words", "unbuffered"),
    few(
        [(words, unbuffered) for words in ("--version", "--help", "methods") for unbuffered in (False, True)],
        [("--version", False), ("--version", True), ("--help", False)],
    ),
)
def test_a_full_disk_is_one_line(words: str, unbuffered: bool) -> None:
    done = in_a_shell(f"$B {words} > /dev/full", unbuffered)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("words", few(["--version", "methods", "report --csv results.csv"], ["--version"]))
def test_a_closed_output_loses_what_is_printed_and_no_more(words: str) -> None:
    done = in_a_shell(f"$B {words} >&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("results/report.html").exists() == words.startswith("report")


@pytest.mark.parametrize("words", few(["--version", "--help", "methods"], ["--version"]))
def test_a_reader_that_closes_the_pipe_is_not_an_error(words: str) -> None:
    done = in_a_shell(f"$B {words} | true")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be removed there")
def test_a_current_folder_that_is_gone_is_named() -> None:
    done = in_a_shell("mkdir gone; cd gone; rmdir ../gone; $B methods")
    assert done.returncode == 2
    assert "error: cannot use the current folder (No such file or directory). Was it removed?" in done.stderr
    assert len(done.stderr.splitlines()) <= 2, "the shell may say it too"
