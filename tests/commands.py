"""Run commands as a person types them."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from batchtrim.lab import cli


def batchtrim(*words: str) -> Result:
    """Return what a command did: its exit code, and what it wrote."""
    return CliRunner().invoke(cli.app, list(words))


def mistake(*words: str, raised: bool = False) -> str:
    """Return the message of a wrong command: on standard error alone, with code 2 and no internals.

    Args:
        raised: whether a file of the user's raised an error, whose traceback is then shown.
    """
    done = batchtrim(*words)
    assert done.exit_code == 2, done.output
    assert ("Traceback" in done.stderr) == raised
    assert "Errno" not in done.stderr
    assert done.stdout == ""
    return done.stderr.lstrip("\n")  # older releases of rich end an empty display with a newline
