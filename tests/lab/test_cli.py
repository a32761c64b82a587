"""The command line as a person types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from typer.testing import CliRunner

from batchtrim import __version__
from batchtrim.lab import cli, records
from batchtrim.lab.analyse import claims
from batchtrim.lab.execute import grid
from batchtrim.lab.methods.table import METHODS
from commands import batchtrim, mistake

TINY = ["--epochs", "2", "--train-size", "200", "--seeds", "2", "--workers", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BATCHTRIM_DATA", raising=False)


def test_compare_writes_table_report_and_records(tmp_path: Path) -> None:
    done = batchtrim("compare", "--out", "here", *TINY)
    assert done.exit_code == 0, done.output
    assert "trim" in done.stdout
    assert "full" in done.stdout
    assert "report: here/report.html" in done.stdout
    assert "4/4 runs" in done.stderr
    assert len(records.read("here")) == 4
    for name in ("report.html", "report.md", "report.csv"):
        assert (tmp_path / "here" / name).stat().st_size > 100


def test_the_same_command_continues() -> None:
    batchtrim("compare", *TINY, "-q")
    done = batchtrim("compare", *TINY)
    assert done.exit_code == 0
    assert "4 of 4 runs are recorded already\n" in done.stderr


def test_methods_are_in_the_order_they_were_given_whichever_ended_first() -> None:
    """With several workers, the rows of the table had another order from time to time."""
    words = ["compare", "--methods", "full,trim,random", *TINY, "--out", "here", "--json"]
    batchtrim(*words)
    file = Path("here/runs.jsonl")
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    again = json.loads(batchtrim(*words).stdout)
    assert [arm["label"] for arm in again["groups"][0]["methods"]] == ["full", "trim", "random"]


def test_json_is_alone_on_standard_output() -> None:
    done = batchtrim("compare", *TINY, "--json")
    assert done.exit_code == 0
    assert isinstance(json.loads(done.stdout), dict)
    assert "4/4 runs" in done.stderr


def test_quiet_says_nothing_on_standard_error() -> None:
    done = batchtrim("compare", *TINY, "--quiet", "--json")
    assert done.stderr == ""
    json.loads(done.stdout)


def test_another_configuration_in_the_same_folder_is_refused() -> None:
    batchtrim("compare", "--out", "here", *TINY, "-q")
    said = mistake("compare", "--out", "here", *TINY, "--lr", "0.1")
    assert "lr 0.001 there and 0.1 here" in said
    assert "Pass another --out" in said


def test_sweep_takes_axes(tmp_path: Path) -> None:
    done = batchtrim(
        "sweep", *TINY, "--methods", "full,trim", "--schedule", "linear,step", "--keep-end", "0.2,0.5", "-q"
    )
    assert done.exit_code == 0, done.output
    rows = records.read(next((tmp_path / "runs").iterdir()))
    arms = {(row["config"]["method"], row["config"]["schedule"], row["config"]["keep_end"]) for row in rows}
    assert len(arms) == 5
    assert len(rows) == 10


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_what_a_toml_file_leaves_out_is_the_default_of_help(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """A sweep of a file without methods and seeds was one run of plain training."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(cli, "_run_and_report", lambda settings, given: told.append(settings))
    Path("grid.toml").write_text('epochs = 9\nschedule = "step"\n')
    assert batchtrim(command, "grid.toml").exit_code == 0
    defaults = {"compare": cli.COMPARE, "sweep": cli.SWEEP}[command]
    assert told == [{**defaults, "epochs": 9, "schedule": "step"}]


def test_a_toml_file_gives_the_settings_and_options_go_before_it(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(
        'methods = ["small_loss"]\nseeds = [3]\nepochs = 9\ntrain_size = 100\n[params.small_loss]\nnoise_rate = 0.4\n'
    )
    done = batchtrim(
        "compare", "grid.toml", "--epochs", "1", "--out", "here", "--param", "small_loss.ramp_epochs=2", "-q"
    )
    assert done.exit_code == 0, done.output
    (row,) = records.read("here")
    assert row["config"]["epochs"] == 1
    assert row["config"]["seed"] == 3
    assert row["config"]["method_params"] == {"noise_rate": 0.4, "ramp_epochs": 2}


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ([], {("full", None), ("trim", None), ("small_loss", 0.3), ("small_loss", 0.4)}),
        (["--methods", "random"], {("random", None)}),
        (
            ["--methods", "full,small_loss"],
            {("full", None), ("small_loss", 0.1), ("small_loss", 0.3), ("small_loss", 0.4)},
        ),
        (["--param", "small_loss.noise_rate=0.5"], {("full", None), ("trim", None), ("small_loss", 0.5)}),
        (["--methods", "small_loss", "--param", "small_loss.noise_rate=0.5"], {("small_loss", 0.5)}),
    ],
)
def test_options_go_before_every_part_of_a_grid(
    typed: list[str], found: set[tuple[str, float | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a part names itself was run whatever the command line said."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(cli, "_run_and_report", lambda settings, given: told.append(settings))
    Path("grid.toml").write_text(
        "params.small_loss.noise_rate = 0.1\n[[grid]]\nmethods = ['full', 'trim']\nepochs = 9\n"
        "[[grid]]\nmethod = 'small_loss'\nparams.small_loss.noise_rate = [0.3, 0.4]\n"
    )
    done = batchtrim("compare", "grid.toml", "--epochs", "2", *typed)
    assert done.exit_code == 0, done.output
    configs = grid.expand(told[0])
    assert {(config.method, config.method_params.get("noise_rate")) for config in configs} == found
    assert {config.epochs for config in configs} == {2}


def test_train_does_one_run() -> None:
    done = batchtrim("train", "--method", "random", "--seed", "4", "--epochs", "1", "--out", "here", "-q")
    assert done.exit_code == 0, done.output
    (row,) = records.read("here")
    assert (row["config"]["method"], row["config"]["seed"]) == ("random", 4)


def test_report_reads_a_folder(tmp_path: Path) -> None:
    batchtrim("compare", "--out", "here", *TINY, "-q")
    done = batchtrim("report", "here", "--out", "there", "--baseline", "trim")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "there" / "report.html").exists()
    assert json.loads(batchtrim("report", "here", "--json").stdout)
    assert "report: here/report.html" in batchtrim("report", "here/runs.jsonl").stdout  # it was taken for the folder
    assert "got nowhere, which does not exist. There are runs in: here." in mistake("report", "nowhere")
    assert "expected runs in there/runs.jsonl, got nothing there" in mistake("report", "there")
    assert "or its runs.jsonl, got there/report.html" in mistake("report", "there/report.html")
    before = (tmp_path / "here" / "report.md").read_text()
    assert "expected `baseline` to be one of 'full', 'trim', got 'trimm'" in mistake(
        "report", "here", "--baseline", "trimm"
    )
    assert (tmp_path / "here" / "report.md").read_text() == before


def test_a_refused_command_leaves_the_folder_free() -> None:
    assert "`train_size` of at most" in mistake("compare", *TINY, "--train-size", "999999", "-q")
    done = batchtrim("compare", *TINY, "-q")
    assert done.exit_code == 0, done.output


def test_without_full_there_is_no_share_of_it() -> None:
    done = batchtrim("train", *TINY[:4], "--out", "here", "--threads", "1", "-q")
    assert done.exit_code == 0, done.output
    assert "100 %" not in done.stdout
    told = json.loads(batchtrim("report", "here", "--json").stdout)
    assert told["verdict"] == "runs of 'trim' alone, so nothing to compare with"


def test_full_stays_the_baseline_of_a_folder_that_holds_it() -> None:
    batchtrim("compare", "--out", "here", *TINY, "-q")
    done = batchtrim("compare", "--methods", "trim", "--keep-end", "0.5", "--out", "here", *TINY, "-q", "--json")
    assert [group["baseline"] for group in json.loads(done.stdout)["groups"]] == ["full"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--keep-end", "0.2,0.3"], "expected one run, got several values of `keep_end`"),
        (["train", "--checkpoint-seconds", "-1"], "expected `checkpoint_seconds` to be at least 0, got -1"),
        (["train", "--checkpoint-seconds", "nan"], "expected `checkpoint_seconds` to be at least 0, got nan"),
        (["compare", "--imbalance", "nan"], "expected `imbalance` to be at least 1 and finite, got nan"),
        (["compare", "--imbalance", "inf"], "expected `imbalance` to be at least 1 and finite, got inf"),
        (["compare", "--weight-decay", "nan"], "expected `weight_decay` to be at least 0 and finite, got nan"),
        (["compare", "--retries", "-1"], "expected `retries` to be at least 0, got -1"),
    ],
)
def test_values_that_make_no_sense(words: list[str], says: str) -> None:
    assert says in mistake(*words)


def test_version() -> None:
    assert batchtrim("--version").stdout == f"batchtrim {__version__}\n"


def test_claims_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batchtrim("compare", "--out", "records/here", *TINY, "-q")
    assert "expected claims.toml beside runs.jsonl in or under records" in mistake("claims", "records")
    claim = 'effect = 0.5\n[[claim]]\ntext = "It helps."\nmethod = "trim"\nagainst = "full"\nsays = "lower"\n'
    (tmp_path / "records" / "here" / "claims.toml").write_text(claim)
    done = batchtrim("claims", "records")
    assert done.exit_code == 0, done.output
    assert "| **not decidable** | It helps. `trim` against `full`: lower | 2 |" in done.stdout
    assert batchtrim("claims", "records", "--out", "results.md").stdout == "results: results.md\n"
    assert (tmp_path / "results.md").read_text() == done.stdout
    (tmp_path / "page.md").write_text("<!-- results --><!-- /results -->")
    reads = MagicMock(wraps=claims.read)
    monkeypatch.setattr(claims, "read", reads)
    assert batchtrim("claims", "records", "--out", "results.md", "--table", "page.md").exit_code == 0
    assert reads.call_count == 1
    rows = (tmp_path / "records" / "here" / "runs.jsonl").read_text()
    (tmp_path / "records" / "here" / "runs.jsonl").write_text(rows.replace('"seconds":', '"second":'))
    assert "expected the records to be as batchtrim writes them" in mistake("claims", "records")


def test_methods_are_listed() -> None:
    done = batchtrim("methods")
    assert "trim: the hardest q of the batch" in done.stdout
    assert "small_loss.noise_rate=0.2" in done.stdout
    assert set(json.loads(batchtrim("methods", "--json").stdout)) == set(METHODS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "digit"], "Did you mean 'digits'?"),
        (["--model", "resnet9"], "Did you mean 'resnet"),
        (["--methods", "full,trimm"], "Did you mean 'trim'?"),
        (["--engine", "shard"], "got 'shard'. Did you mean 'shared'?"),
        (["--schedule", "lineal"], "Did you mean 'linear'?"),
        (["--lr-schedule", "cosin"], "Did you mean 'cosine'?"),
        (["--precision", "bf16mixed"], "Did you mean 'bf16-mixed'?"),
        (["--label-noise", "symetric:0.2"], "Did you mean 'symmetric'?"),
        (["--methods", "small_loss", "--param", "small_loss.noise_rat=0.1"], "Did you mean 'noise_rate'?"),
        (["--methods", "small_loss", "--param", "smal_loss.noise_rate=0.1"], "Did you mean 'small_loss'?"),
        (["--optimizer", "rmsprop"], "expected `optimizer` to be one of"),
        (["--keep-end", "20"], "got 20. It is a fraction of the batch"),
        (["--keep-end", "20%"], "expected `keep_end` to be numbers, comma-separated, got '20%'"),
        (["--seeds", ""], "expected `seed` to have at least one value"),
        (["--seeds", "13071759814"], "expected at most 100000 runs, got 1.30718e+10"),
        (["--seeds", "many"], "expected `seeds` to be whole numbers"),
        (["--workers", "0"], "expected `workers` to be at least 1"),
        (["--param", "noise_rate=1"], "to look like small_loss.noise_rate=0.1"),
        (["--param", "small_loss.noise_rate=1"], "got [params.small_loss]"),
        (["--dataset", "cifar10", "--model", "cnn", "--data-dir", "nowhere"], "nowhere/cifar10/train-*.parquet"),
        (["no.toml"], "expected a TOML file no.toml"),
    ],
)
def test_mistakes_are_reported_in_one_line(words: list[str], message: str) -> None:
    said = mistake("compare", *words)
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_missing_permission_to_write_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "expected `out` to be a folder that can be written, got here" in mistake("compare", *TINY, "--out", "here")


def test_debug_shows_the_traceback() -> None:
    done = batchtrim("compare", "--dataset", "digit", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr


def test_failed_runs_give_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchtrim.lab.run import train

    run = train.train_run

    def fails_for_trim(config: Any, **options: Any) -> Any:
        if config.method == "trim":
            raise MemoryError("no room")
        return run(config, **options)

    monkeypatch.setattr(train, "train_run", fails_for_trim)
    done = batchtrim("compare", *TINY, "-q")
    assert done.exit_code == 1
    assert "failed: trim seed 0: MemoryError: no room" in done.stderr
    assert "repeat the command to retry them" in done.stderr


@pytest.mark.parametrize("command", ["compare", "sweep", "train", "demo", "report", "claims", "methods"])
def test_help_has_a_line_for_every_option(command: str) -> None:
    done = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=120)
    assert done.exit_code == 0
    options = done.stdout.partition("Options:")[2].strip("\n").splitlines()
    assert options
    for line in options:
        assert line.strip().startswith("-"), f"more than a line: {line!r}"
        assert len(line.split("  ")[-1]) > 5, f"no help: {line!r}"


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_says_how_to_continue(tmp_path: Path, workers: str) -> None:
    words = [sys.executable, "-m", "batchtrim.lab.cli", "compare", "--seeds", "4", "--epochs", "8", "--out", "here"]
    words += ["--threads", "1"]
    process = subprocess.Popen(
        [*words, "--workers", workers],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )
    path, begun = tmp_path / "here" / "runs.jsonl", time.monotonic()
    while not path.exists() and time.monotonic() - begun < 100:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    output, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == ""
    assert "Traceback" not in said
    assert "Repeat the command to continue" in said
    done = len(records.read("here"))
    assert 1 <= done < 8
    assert f"{done} runs are recorded in here" in said
    again = subprocess.run([*words, "--workers", "2", "--json"], capture_output=True, text=True, check=True)
    assert f"{done} of 8 runs are recorded already" in again.stderr
    json.loads(again.stdout)
    assert len(records.read("here")) == 8


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "batchtrim.lab.cli", "demo"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - begun < 180
    assert "full" in done.stdout
    assert len(records.read("runs/demo")) == 10
    assert (tmp_path / "runs" / "demo" / "report.html").exists()
