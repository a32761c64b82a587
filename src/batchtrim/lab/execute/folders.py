"""Name the output folder of a command without --out, after the settings that its runs share."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchtrim.lab.records import Records, Row
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.task.names import known_as

LONGEST_NAME = 150  # bytes
LONGEST = 80  # the most characters that differing settings add to a name; longer ones become a number


def named_after(configs: Sequence[RunConfig]) -> Path:
    """Return a folder named after the shared settings, so that the same command finds it again."""
    named = ("dataset", "model", "optimizer")
    names = [sorted({known_as(str(getattr(config, name))) for config in configs}) for name in named]
    epochs = sorted({config.epochs for config in configs})
    parts = ["+".join(map(_as_file_name, values)) for values in names] + ["+".join(map(str, epochs)) + "ep"]
    name = "-".join(parts)
    if len(name.encode()) > LONGEST_NAME:  # a long path, or many networks: file systems allow 255 bytes
        name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}-{name[-40:]}"
    return Path("runs") / name


def free_folder(base: Path, cells: list[Row]) -> tuple[Path, str]:
    """Return the folder for these cells, and a note if it is not ``base``; the same call finds it again.

    It is ``base``, or if that holds another experiment, ``base`` plus the settings that differ: ``...-lr0.01``.

    Args:
        cells: settings that the runs share, see :meth:`batchtrim.lab.records.Records.settle`.
    """
    if _fits(base, cells):
        return base, ""
    differing = Records(base).differing(cells)
    named = "".join(f"-{name}{_as_file_name(value)}" for name, (_, value) in differing.items())
    tails = [named] if named and len(named) <= LONGEST else []
    for tail in itertools.chain(tails, (f"{named[:LONGEST]}-{number}" for number in itertools.count(2))):
        folder = base.with_name(base.name + tail)
        if _fits(folder, cells):
            break
    there = ", ".join(f"{name} {old}" for name, (old, _) in differing.items())
    return folder, f"runs go to {folder}: {base} holds runs with other settings ({there})"


def _fits(folder: Path, cells: list[Row]) -> bool:
    return not (folder / "grid.json").exists() or not Records(folder).differing(cells)


def _as_file_name(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-.")
