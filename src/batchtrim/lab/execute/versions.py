"""Compare the user's program with the one that made the runs recorded in a folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from batchtrim.lab.records import DONE, Records, UseAnotherFolder
from batchtrim.lab.run.environment import program_of
from batchtrim.lab.run.task_config import AnyConfig
from batchtrim.lab.task.own_code import Code, hash_of_file

__all__ = ["check_program"]


def check_program(configs: Sequence[AnyConfig], records: Records) -> str:
    """Return a note if other versions of the user's program made some of the runs recorded; "" if none did.

    Raises:
        UseAnotherFolder: they made all of these runs: nothing would be run, and the result not be this program's.
    """
    rows = {row["key"]: row for row in records.rows() if row["status"] in DONE}
    changed: dict[str, None] = {}
    others = 0
    hash_now = functools.cache(_hash_now)  # many runs name the same few files
    for config in configs:
        code, row = program_of(config), rows.get(config.key)
        if code is not None and row is not None and (found := _changed(code, row.get("environment") or {}, hash_now)):
            others += 1
            changed |= dict.fromkeys(found)
    if not others:
        return ""
    what = " and ".join(changed)
    if others == len(configs):
        raise UseAnotherFolder(
            f"expected runs of the present {what} in {records.folder}, got those of another version: the program, or a "
            "value that it uses, has changed since. Pass another --out to run it; for a report on the old runs: "
            f"batchtrim report {records.folder}"
        )
    return f"{others} of these runs were made by another version of {what}. To run one version, pass another --out"


def _changed(code: Code, environment: Mapping[str, Any], hash_now: Callable[[Path], str]) -> list[str]:
    """Return the names of the program, and of the modules beside it, that differ from those of a run."""
    found = [code.name] if code.source and environment.get("source") not in (None, code.source) else []
    helpers = environment.get("helpers")
    if code.path is None or not isinstance(helpers, dict):
        return found
    return found + [name for name, then in helpers.items() if hash_now(Path(code.path).parent / name) != then]


def _hash_now(file: Path) -> str:
    try:
        return hash_of_file(file)
    except (OSError, ValueError):
        return ""
