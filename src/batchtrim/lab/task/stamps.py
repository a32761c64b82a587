"""Detect whether files have changed: by name, size, time, and whether they can be opened."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["stamps"]


def stamps(files: Iterable[tuple[str, Path]]) -> dict[str, str]:
    """Return a stamp for each file, by the given name; it changes when the file does."""
    return {name: _stamp(path) for name, path in files}


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # gone, a broken link, or not a path
        return type(error).__name__
    readable = "" if os.access(path, os.R_OK) else " unreadable"
    return f"{found.st_size} {found.st_mtime_ns}{readable}"
