"""The cache of decoded images: where it is, and how entries are written atomically."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from batchtrim._checks import first_line
from batchtrim.lab.files import PART, expanded

__all__ = ["CannotKeep", "cache_folder", "filled", "folder_for"]


class CannotKeep(OSError):
    """Decoded images cannot be cached; the message names the folder."""

    def __init__(self, folder: Path, error: OSError):
        reason = error.strerror or first_line(error)
        super().__init__(
            f"cannot keep decoded images in {folder} ({reason}). Set BATCHTRIM_CACHE to a writable folder "
            "with enough space."
        )


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the cache folder of decoded images: the argument, else BATCHTRIM_CACHE, else the platform's own."""
    if found := cache_dir or os.environ.get("BATCHTRIM_CACHE"):
        return expanded(found)
    if sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        home = "~/Library/Caches"
    else:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(home) / "batchtrim"


def folder_for(entry: str, cache_dir: str | Path | None = None) -> tuple[Path, tuple[str, ...]]:
    """Return the cache folder to find or put an entry in, and a note on it.

    A folder that the user named is used. The platform's own is replaced by a temporary one if it cannot be
    written, as in a container without a home; entries that it already has are used.

    Args:
        entry: a path inside the cache folder.
    """
    usual = cache_folder(cache_dir)
    if cache_dir or os.environ.get("BATCHTRIM_CACHE") or (usual / entry).exists():
        return usual, ()
    reason = _reason_not_to_write(usual)
    spare = _temporary() if reason else None
    if spare is None:
        return usual, ()
    return spare, (f"decoded images go to {spare}, since {usual} cannot be written ({reason}); set BATCHTRIM_CACHE to "
                   "keep them elsewhere",)  # fmt: skip


def _reason_not_to_write(folder: Path) -> str:
    """Return why no file can be created in a folder; "" if one can."""
    if folder.parts[:1] == ("~",):
        return "there is no home folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or type(error).__name__


def _temporary() -> Path | None:
    """Return this user's temporary folder; None if there is none that only this user can write."""
    try:
        user = os.getuid() if hasattr(os, "getuid") else None
        folder = Path(tempfile.gettempdir()) / ("batchtrim" if user is None else f"batchtrim-{user}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    if not stat.S_ISDIR(found.st_mode) or (user is not None and (found.st_uid != user or found.st_mode & 0o022)):
        return None
    return folder


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """Create a folder for the block to fill, and rename it to ``folder`` when the block ends.

    Readers see a whole entry or none. What a process killed inside the block has left is removed by the next
    one; if two run at once, the faster one's entry stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_dead(folder.parent)
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}{PART}")
    lock = FileLock(part.with_suffix(".lock"))  # held from before the part is created until it is filled
    try:
        with lock:
            part.mkdir()
            yield part
            try:
                part.rename(folder)
            except OSError:
                if not folder.exists():  # otherwise another process was faster
                    raise
    finally:
        _remove(part)


def _remove_dead(folder: Path) -> None:
    """Remove the parts whose process has died: the system has released their locks."""
    for part in folder.glob(f"*{PART}"):
        with contextlib.suppress(Timeout, OSError), FileLock(part.with_suffix(".lock"), timeout=0):
            _remove(part)


def _remove(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    with contextlib.suppress(OSError):  # on Windows, while another process checks whether it is held
        part.with_suffix(".lock").unlink()
