"""Tell whether files are still those that were read: by name, size, time, and whether they can be opened."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["stamps"]


def stamps(files: Iterable[tuple[str, Path]]) -> dict[str, str]:
    """Return a stamp for each file by the name that it is given with: another one once the file changes."""
    return {name: _stamp(path) for name, path in files}


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # gone, a link that leads nowhere, or no path at all
        return type(error).__name__
    readable = "" if os.access(path, os.R_OK) else " unreadable"
    return f"{found.st_size} {found.st_mtime_ns}{readable}"
