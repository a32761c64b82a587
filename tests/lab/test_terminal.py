"""Output to a terminal: no styling under NO_COLOR, and the progress of a long task."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from batchtrim.lab.analyse import comparison
from batchtrim.lab.execute import grid, progress
from batchtrim.lab.execute.progress import Live
from batchtrim.lab.present import tables
from batchtrim.lab.task import decode
from batchtrim.lab.terminal import ProgressCount, guard


def printed(make_row: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> str:
    rows = [make_row(method, seed) for method in ("full", "trim") for seed in range(3)]
    tables.print_table(comparison.summarize(rows))
    with Live() as watcher:
        watcher.console.print("[bold]a note[/bold]")
    return "".join(capsys.readouterr())


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for colours in a pipe, as CI's logs do."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


def test_no_color_wins_over_force_color(
    monkeypatch: pytest.MonkeyPatch, make_row: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Title, headings and legend kept their bold and dim."""
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(make_row, capsys)
    assert "full" in text
    assert "a note" in text
    assert "m" not in [code[-1] for code in _codes(text)]


@pytest.mark.parametrize("value", [None, ""])
def test_an_empty_no_color_has_no_effect(
    monkeypatch: pytest.MonkeyPatch, make_row: Callable[..., Any], capsys: pytest.CaptureFixture[str], value: str | None
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_COLOR", value)
    assert "\x1b[1m" in printed(make_row, capsys)


def test_colours_in_a_pipe_are_no_reason_to_redraw(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The log of CI was full of codes that move the cursor, and had no line for a run."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    (config,) = grid.expand({"methods": ["trim"], "seeds": [0], "epochs": 2})
    with Live() as watcher:
        watcher.begin([config], 0)
        watcher.batch(config, {"epoch": 0, "epochs": 2, "batch": 1, "batches": 4})
        watcher.finished(config, {"status": "failed", "error": "of some kind" + " that takes long to tell" * 9})
    text = "".join(capsys.readouterr())
    assert text.splitlines()[0] == "0/1 runs  digits mlp trim linear 1-0.2 seed 0: epoch 1/2, batch 1/4"
    assert len(text.splitlines()) == 2, "wrapped at 80 columns"
    assert not [code for code in _codes(text) if code[-1] != "m"]


@pytest.mark.parametrize("width", [30, 40, 60, 76, 80, 100, 110, 200])
def test_no_number_is_cut_off_a_bar(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """At 80 columns the time left was 0:0…"""
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "console", lambda **_: screen)
    configs = grid.expand({"methods": ["full", "trim"], "seeds": 2, "epochs": 100})
    watcher = Live()
    watcher.begin(configs, 0)
    watcher.batch(configs[0], {"epoch": 99, "epochs": 100, "batch": 90, "batches": 99})
    watcher.epoch(configs[-1], {"epoch": 99, "epochs": 100, "test_error": 0.1234})
    seen = Console(file=io.StringIO(), width=width, color_system=None)
    seen.print(watcher.bars.get_renderable())
    lines = seen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 3
    assert max(map(len, lines)) <= width
    if width >= 40:
        assert "epoch 100/100, batch 90/99" in lines[1]
        assert "error 12.34 %" in lines[2]
    for line in lines if width >= progress.NARROW else ():
        assert re.search(r"left (\d:\d\d:\d\d|-:--:--)$", line.rstrip())
    if width >= 80:
        assert lines[2].startswith("trim linear 1-0.2 seed 1 ")


def test_names_cannot_control_the_terminal(
    monkeypatch: pytest.MonkeyPatch, make_row: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder named with brackets ended the run in a MarkupError; an escape code in a name coloured the rest."""
    screen = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    configs = grid.expand({"methods": ["full", "trim"]})
    configs = [replace(config, dataset="my [/b] \x1b[31m images") for config in configs]
    with monkeypatch.context() as patch:
        patch.setattr(progress, "console", lambda **_: screen)
        with Live() as watcher:
            watcher.begin(configs[:1], 0)
            watcher.epoch(configs[0], {"epoch": 0, "epochs": 2, "test_error": 0.5})
            watcher.finished(configs[0], {"status": "failed", "error": "\x1b[31m"})
    rows = [make_row(method, seed, dataset="\x1b[31m") for method in ("full", "tr\x1b[31mim") for seed in range(3)]
    tables.print_table(comparison.summarize(rows))
    with pytest.raises(SystemExit):
        guard(lambda: int("\x1b[31m"), debug=False)
    written = [screen.file.getvalue(), *capsys.readouterr()]  # type: ignore[attr-defined]
    assert [text.count("[31m") > 0 for text in written] == [True] * 3
    assert [text.count("\x1b[31m") for text in written] == [0] * 3
    assert "my [/b] \\x1b[31m images" in written[0]


def test_the_name_of_a_metric_is_printable(make_row: Callable[..., Any]) -> None:
    rows = [{**make_row(m, s, metric="f\x1b", higher_is_better=True), "value": s} for m in "ab" for s in range(3)]
    with pytest.raises(ValueError, match=r"`metric` to be a name of printable characters, got 'f\\x1b'"):
        comparison.summarize(rows)


def _codes(text: str) -> list[str]:
    return re.findall(r"\x1b\[[0-9;?]*[A-Za-z]", text)


def test_a_long_count_is_reported_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("batchtrim.lab.terminal.time.monotonic", lambda: now)
    said = ProgressCount("images decoded", 12_000)
    for _ in range(12):
        now += 2.0
        said.add(1000)
    assert capsys.readouterr().err.splitlines() == ["2,000 of 12,000 images decoded", "7,000 of 12,000 images decoded"]


def test_decoding_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ProgressCount, "first", 0.0)
    monkeypatch.setattr(ProgressCount, "every", 0.0)
    paths = [tmp_path / f"{i}.png" for i in range(40)]
    for path in paths:
        Image.new("L", (4, 4)).save(path)
    decode.decode_all([(0, list(paths))], tmp_path / "x.npy", np.arange(40), decode.ImageForm((4, 4), True, False), 40)
    assert "of 40 images decoded" in capsys.readouterr().err
