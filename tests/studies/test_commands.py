"""The commands that records state are those of this tree: each is parsed, and does nothing."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

from batchtrim.lab import cli
from batchtrim.lab.execute import grid
from batchtrim.lab.files import load_toml

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"(?:^ {4}|`)((?:batchtrim |python -m (?:studies|benchmarks)\.)[^`#\n]+)", re.MULTILINE)


def commands() -> list[Any]:
    found = []
    for path in sorted(ROOT.glob("records/*/README.md")):
        text = path.read_text().replace("\\\n", " ")
        wrapped = re.sub(r"(`[^`\n]+)\n([^`\n]+`)", r"\1 \2", text)
        found += [
            pytest.param(command.strip(), id=f"{path.parent.name}-{command[:60]}")
            for command in COMMAND.findall(wrapped)
        ]
    return found


class Parsed(Exception):
    """Raised in the place of what a command does."""


@pytest.mark.parametrize("command", commands())
def test_a_command_of_a_record_is_parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    if words[0] == "batchtrim":
        group: Any = typer.main.get_command(cli.app)
        with group.make_context("batchtrim", words[1:2]) as context:
            name, subcommand, _ = group.resolve_command(context, words[1:])
            subcommand.make_context(name, words[2:])
        if words[2].endswith(".toml"):
            assert grid.expand(load_toml(ROOT / words[2]))
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        parse(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr("sys.argv", words[2:])
    with pytest.raises(Parsed):
        importlib.import_module(words[2]).main()


def test_every_record_states_one() -> None:
    stated = {case.id.rpartition("-batchtrim")[0] or case.id.rpartition("-python")[0] for case in commands()}
    assert stated == {path.parent.name for path in ROOT.glob("records/*/README.md")}
