"""What goes to a terminal: no styling where NO_COLOR asks for none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from batchtrim.lab.analyse import comparison
from batchtrim.lab.execute.progress import Live
from batchtrim.lab.present import tables


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
def test_an_empty_no_color_asks_for_nothing(
    monkeypatch: pytest.MonkeyPatch, make_row: Callable[..., Any], capsys: pytest.CaptureFixture[str], value: str | None
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_COLOR", value)
    assert "\x1b[1m" in printed(make_row, capsys)


def _codes(text: str) -> list[str]:
    return re.findall(r"\x1b\[[0-9;?]*[A-Za-z]", text)
