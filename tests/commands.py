"""Run commands as a person types them."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from batchtrim.lab import cli


def batchtrim(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def mistake(*words: str) -> str:
    done = batchtrim(*words)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    return done.stderr
