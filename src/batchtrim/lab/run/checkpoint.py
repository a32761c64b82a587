"""A run's checkpoint on disk: written whole or not at all, and read without running any code in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from batchtrim._checks import in_one_line
from batchtrim.lab.files import write_whole, writing
from batchtrim.lab.task.data import ReplaceFile


class DamagedCheckpoint(ReplaceFile):
    """A checkpoint that no run can resume from; the message names it."""


class Resumable(Protocol):
    """Anything that can continue from a state, such as a run."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save(state: dict[str, Any], path: Path) -> None:
    """Write to a temporary file and rename it, so that a checkpoint is never partial."""
    with writing(path):  # do not recreate a folder that vanished: its records are gone
        path.parent.mkdir(exist_ok=True)
        write_whole(path, lambda file: torch.save(state, file))


def load(run: Resumable, path: Path) -> None:
    """Resume ``run`` from the checkpoint at ``path``.

    Raises:
        DamagedCheckpoint: the file is damaged. ValueError: it belongs to another run.
        OSError, MemoryError, torch.OutOfMemoryError: the file may be intact, but it could not be read now.
    """
    try:
        # on the CPU, as generator states require; everything else is copied to the run's own device
        run.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except ValueError as error:  # it belongs to another run: the message says which
        raise ValueError(f"{error} The file is {path}.") from error
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the error of a damaged file depends on where it is damaged
        raise DamagedCheckpoint(
            f"expected a checkpoint of this run in {path}, got a file that does not fit "
            f"({in_one_line(error)}). Remove it, and the run starts from the beginning."
        ) from error
