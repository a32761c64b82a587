"""A run's checkpoint on disk: whole or absent, and read without running any code in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from batchtrim.lab.files import write_whole, writing
from batchtrim.lab.task.data import ReplaceFile


class DamagedCheckpoint(ReplaceFile):
    """A checkpoint that no run can go on from; the message names it."""


class Resumable(Protocol):
    """Anything that continues from a state: a run."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save(state: dict[str, Any], path: Path) -> None:
    """Write beside it and rename: a checkpoint is the old one or the new one, never half of one."""
    with writing(path):  # a folder that vanished is not made again: its records are gone
        path.parent.mkdir(exist_ok=True)
        write_whole(path, lambda file: torch.save(state, file))


def load(run: Resumable, path: Path) -> None:
    """Let ``run`` go on from the checkpoint at ``path``.

    Raises:
        DamagedCheckpoint: the file is damaged. ValueError: it is another run's.
        OSError, MemoryError, torch.OutOfMemoryError: the file may be whole, but it could not be read now.
    """
    try:
        # on the CPU, where the states of generators have to be; everything else is copied to where the run has it
        run.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except ValueError as error:  # of another run: the message says which
        raise ValueError(f"{error} The file is {path}.") from error
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        first = (str(error).splitlines() or [""])[0][:160]
        raise DamagedCheckpoint(
            f"expected a checkpoint of this run in {path}, got a file that does not fit "
            f"({type(error).__name__}: {first}). Remove it, and the run starts again from its beginning."
        ) from error
