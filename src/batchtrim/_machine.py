"""Ask the operating system about the machine."""

from __future__ import annotations

import math
import os

__all__ = ["memory"]


def memory() -> float:
    """Return the machine's memory in bytes; infinity if the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not on Windows
        return math.inf
