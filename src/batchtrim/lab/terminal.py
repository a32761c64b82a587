"""The terminal: with plainer characters where its encoding lacks those of a report, without colours if so asked."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "open_closed", "print_plainly"]

PLAIN = {
    "\N{PLUS-MINUS SIGN}": "+-",
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{HORIZONTAL ELLIPSIS}": "...",
}
"""ASCII for what the tables print; a sign of a number must not get lost."""


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Return rich's console; under NO_COLOR (no-color.org) without any styling, whatever FORCE_COLOR says."""
    from rich.console import Console

    plain = os.environ.get("NO_COLOR", "") != ""
    return Console(stderr=stderr, width=width, color_system=None if plain else "auto")


def open_closed() -> None:
    """Let what is printed get lost where standard output or error is closed, as by ``>&-``, rather than fail."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def print_plainly() -> None:
    """Let standard output and error write plainer characters for those their encoding lacks, rather than fail.

    So under ``LANG=C`` without UTF-8 mode, and in pipes of Windows.
    """
    codecs.register_error("batchtrim.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where something else stands in for it
            stream.reconfigure(errors="batchtrim.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(each, "?") for each in error.object[error.start : error.end]), error.end
