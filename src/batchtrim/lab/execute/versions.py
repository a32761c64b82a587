"""Compare the user's program with the one that made the runs recorded in a folder."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from batchtrim.lab.records import DONE, Records, UseAnotherFolder
from batchtrim.lab.run.environment import changed_since, hash_now, program_of
from batchtrim.lab.run.task_config import AnyConfig

__all__ = ["check_program"]


def check_program(configs: Sequence[AnyConfig], records: Records) -> str:
    """Return a note if other versions of the user's program made some of the runs recorded; "" if none did.

    Raises:
        UseAnotherFolder: they made all of these runs: nothing would be run, and the result not be this program's.
    """
    rows = {row["key"]: row for row in records.rows() if row["status"] in DONE}
    changed: dict[str, None] = {}
    others = 0
    once = functools.cache(hash_now)  # many runs name the same few files
    for config in configs:
        code, row = program_of(config), rows.get(config.key)
        if code is not None and row is not None and (found := changed_since(row.get("environment") or {}, code, once)):
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
