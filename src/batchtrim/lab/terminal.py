"""The terminal: report a user's mistake in one line, and replace characters that the encoding lacks."""

from __future__ import annotations

import codecs
import io
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from batchtrim.lab.files import in_a_line, in_lines

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["FAILED", "INTERRUPTED", "MISTAKE", "ProgressCount", "console", "guard", "open_closed", "print_plainly"]

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
"""Exit codes: some runs failed, a mistake in the command, Ctrl-C."""
USER_ERRORS = (ValueError, TypeError, ImportError, OSError)
"""Errors of a wrong option, file or folder; --debug shows their traceback."""

PLAIN = {
    "\N{PLUS-MINUS SIGN}": "+-",
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{HORIZONTAL ELLIPSIS}": "...",
}
"""ASCII for the characters that tables print; the sign of a number must not get lost."""


def _nothing() -> None: ...


before_work: Callable[[], None] = _nothing
"""Called when a command's work begins, but not for its help; :mod:`batchtrim.__main__` sets it."""


def guard(work: Callable[[], None], debug: bool) -> None:
    """Turn a user's mistake into one line on standard error and exit code 2."""
    before_work()
    try:
        work()
    except KeyboardInterrupt:  # before the first run, or in a command without runs
        _say("\nstopped")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of the pipe is gone, as with `| head -1`
        raise
    except USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        else:
            _say(f"error: {in_a_line(error)}")
        sys.exit(MISTAKE)


class ProgressCount:
    """Report the progress of a long task on standard error: nothing at first, then an occasional line.

    Args:
        text: what is counted, such as ``"images decoded"``.
        total: how many there are.
    """

    first, every = 3.0, 10.0  # seconds

    def __init__(self, text: str, total: int) -> None:
        self.text, self.total = text, total
        self.done = 0
        self.next = time.monotonic() + self.first

    def add(self, more: int) -> None:
        self.done += more
        if time.monotonic() >= self.next and self.done < self.total:
            self.next = time.monotonic() + self.every
            _say(f"{self.done:,} of {self.total:,} {self.text}")


def _say(text: str) -> None:
    import typer

    typer.echo(in_lines(text), err=True)


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Return rich's console; under NO_COLOR (no-color.org) it has no styling, whatever FORCE_COLOR says."""
    from rich.console import Console

    plain = os.environ.get("NO_COLOR", "") != ""
    return Console(stderr=stderr, width=width, color_system=None if plain else "auto")


def open_closed() -> None:
    """Discard output, rather than fail, if standard output or error is closed, as by ``>&-``."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def print_plainly() -> None:
    """Have standard output and error replace characters that their encoding lacks, rather than fail.

    This happens under ``LANG=C`` without UTF-8 mode, and in pipes on Windows.
    """
    codecs.register_error("batchtrim.plain", _ascii_for)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not if another object replaces it
            stream.reconfigure(errors="batchtrim.plain")


def _ascii_for(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(each, "?") for each in error.object[error.start : error.end]), error.end
