"""Mistakes that have a likelier meaning, and output that cannot be written: one line each, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands import mistake
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
            "expected a value of `settings` in section.toml, got a table. Settings stand above",
        ),
        (["compare", "--param", "keep_end=0.3"], "It is an option: --keep-end 0.3"),
        (["compare", "--param", "trim.keep_end=0.3"], "It is an option: --keep-end 0.3"),
        (["train", "--param", "trim.lr=1"], "It is an option: --lr 1"),
        (["compare", "--param", "trim.start=0.3"], "expected a parameter of method 'trim' (none), got 'start'"),
        (["claims", "nowhere"], "expected a folder of records, got nowhere, which is none."),
        (["claims", "results.csv"], "expected a folder of records, got results.csv, which is none."),
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
        (["compare", "--retries", "2x"], "'--retries': expected a whole number, got '2x'.\n"),
        (["show", "photos", "--seed", "first"], "'--seed': expected a whole number, got 'first'.\n"),
        (["compare", "--keep-end", "20%"], "numbers, comma-separated, got '20%'. Did you mean 0.2?"),
        (["compare", "--seeds", "0-4"], "whole numbers, comma-separated, got '0-4'. Did you mean 0,1,2,3,4?"),
        (["compare", "--seeds", "1..3"], "whole numbers, comma-separated, got '1..3'. Did you mean 1,2,3?"),
        (["compare", "--seeds", "4-0"], "whole numbers, comma-separated, got '4-0'.\n"),
        (["compare", "--seeds", "0-1000000"], "whole numbers, comma-separated, got '0-1000000'.\n"),
    ],
)
def test_what_is_no_number_is_named_with_the_number_meant(words: list[str], message: str) -> None:
    """Some releases of typer name neither the option's value nor what is wrong with it."""
    assert message in mistake(*words)


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


@pytest.mark.parametrize(
    "words", few(["--version", "methods", "report --csv results.csv"], ["--version", "report --csv results.csv"])
)
def test_a_closed_output_loses_what_is_printed_and_no_more(words: str) -> None:
    done = in_a_shell(f"$B {words} >&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("results/report.html").exists() == words.startswith("report")


@pytest.mark.parametrize("words", few(["--version", "--help", "methods"], ["--version"]))
def test_a_reader_that_leaves_is_no_error(words: str) -> None:
    done = in_a_shell(f"$B {words} | true")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be removed there")
def test_a_current_folder_that_is_gone_is_named() -> None:
    done = in_a_shell("mkdir gone; cd gone; rmdir ../gone; $B methods")
    assert done.returncode == 2
    assert "error: cannot use the current folder (No such file or directory). Was it removed?" in done.stderr
    assert len(done.stderr.splitlines()) <= 2, "the shell may say it too"
