"""Choose the run of a folder to show: by key, by name, or by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchtrim._checks import nearest
from batchtrim.lab.execute.one_run import DATA_DIR
from batchtrim.lab.files import shown
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.task_config import TaskConfig
from batchtrim.lab.task.names import known_as

MOST_NAMED = 12


def choose(
    rows: Sequence[Mapping[str, Any]], *, key: str | None = None, method: str | None = None, seed: int | None = None
) -> Mapping[str, Any]:
    """Return the run with this key (or its beginning), method and seed.

    If several match: ``trim`` before others, any method before plain training, the smallest seed, the last started.

    Raises:
        ValueError: none matches; the message lists the runs by name.
    """
    found = [
        row
        for row in rows
        if (key is None or row["key"].startswith(key))
        and (method is None or row["config"]["method"] == method)
        and (seed is None or row["config"]["seed"] == seed)
    ]
    if not found:
        asked = {"key": key, "method": method, "seed": seed}
        said = ", ".join(f"{name} {value!r}" for name, value in asked.items() if value is not None).removeprefix("key ")
        listed = "\n".join(f"  {name(row)}  (--key {row['key'][:6]})" for row in rows[:MOST_NAMED])
        more = f"\n  and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
        near = nearest(method, {row["config"]["method"] for row in rows})
        raise ValueError(f"expected a run with a keep log, got {said}.{near} There are:\n{listed}{more}")
    return max(found, key=lambda row: (_rank(row["config"]["method"]), -row["config"]["seed"], row["started"]))


def name(row: Mapping[str, Any]) -> str:
    """Return a run's name, as in progress lines."""
    config = row["config"]
    return (TaskConfig if "task" in config else RunConfig).from_dict(config).label


def remembered(folder: Path) -> str | None:
    """Return the folder of data sets that the runs in ``folder`` used, if it still exists."""
    path = folder / DATA_DIR
    if not path.exists():
        return None
    there = path.read_text(encoding="utf-8").strip()
    return there if Path(there).is_dir() else None


def found_again(config: RunConfig) -> RunConfig:
    """Return the run with its own images in the current folder, if they are no longer where it found them.

    Raises:
        FileNotFoundError: they are in neither place.
    """
    if not Path(config.dataset).is_absolute() or Path(config.dataset).exists():
        return config
    name = known_as(config.dataset)
    if not Path(name).exists():
        raise FileNotFoundError(
            f"expected the run's images in {shown(config.dataset)}, got nothing there. Put them back, or run this in "
            f"the folder that now holds {shown(name)}."
        )
    return replace(config, dataset=name)


def _rank(method: str) -> int:
    return {"trim": 2, "full": 0}.get(method, 1)
