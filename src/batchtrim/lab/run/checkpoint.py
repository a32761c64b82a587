"""A run's checkpoint on disk: whole or absent, read without running anything it says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch

from batchtrim.lab.task.data import ReplaceFile


class Resumable(Protocol):
    """What goes on from a state: a run."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save(state: dict[str, Any], path: Path) -> None:
    """Write beside it and rename: a checkpoint is the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load(run: Resumable, path: Path, device: torch.device) -> None:
    """Let ``run`` go on from the checkpoint at ``path``.

    Raises:
        ReplaceFile: the file is damaged. ValueError: it is another run's.
    """
    try:
        run.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except ValueError:
        raise  # of another run: the message says which
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        first = (str(error).splitlines() or [""])[0][:160]
        raise ReplaceFile(
            f"expected a checkpoint of this run in {path}, got a file that does not fit "
            f"({type(error).__name__}: {first}). Remove it, and the run starts again from its beginning."
        ) from error
