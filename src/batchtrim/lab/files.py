"""Helpers for several parts of the lab: read a TOML file, write a file atomically, look up a name."""

from __future__ import annotations

import contextlib
import errno
import os
import tomllib
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from batchtrim._checks import nearest

Entry = TypeVar("Entry")


_SPACE = "Free space there"
_TO_DO = {
    errno.ENOSPC: _SPACE,
    getattr(errno, "EDQUOT", errno.ENOSPC): _SPACE,
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
}
"""The cure of an error that every folder on the same disk would have."""


class CannotWrite(OSError):
    """A file in the output folder cannot be written: the disk is full, or the folder is read-only or gone.

    No other run could be recorded either, so the command stops at once. The message names the file.
    """


@contextlib.contextmanager
def writing(path: Path, cure: str | None = None) -> Iterator[None]:
    """Turn a file-system error inside the block into :class:`CannotWrite`, which names ``path``.

    Args:
        cure: what the user can do, if not free the disk and repeat the command.
    """
    try:
        yield
    except (CannotWrite, TimeoutError):  # a lock held by another process is not a disk error
        raise
    except OSError as error:
        reason = error.strerror or str(error).strip().partition("\n")[0]
        first = _TO_DO.get(error.errno or 0)
        if cure is None:
            again = first or "Make the folder writable, or pass another --out,"
            cure = f"Finished runs stay recorded. {again} and repeat the command."
        elif first is not None:
            cure = f"{first}. {cure}"
        raise CannotWrite(f"cannot write {path} ({reason}). {cure}") from error


@contextlib.contextmanager
def as_written(what: str) -> Iterator[None]:
    """Report files that lack a field, or have a word for a number, because something else wrote them."""
    try:
        yield
    except (LookupError, AttributeError, ArithmeticError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"expected {what} to be as batchtrim writes them, got {type(error).__name__}: {error}. "
            "Was a file edited by hand, or written by another release? --debug shows where."
        ) from error


TABLES = (".csv", ".tsv")
"""Suffixes of files with another program's results."""

PART = ".part"
"""The suffix of a file that is being written."""


def load_toml(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file, or raise an error that names the line."""
    path = Path(path)
    if path.is_dir():
        report = f" For the report on its runs: batchtrim report {path}"
        hint = report if (path / "runs.jsonl").exists() else f" To train on images in it: --dataset {path}"
        raise IsADirectoryError(f"expected a TOML file, got the folder {path}.{hint}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        hint = f" For a table of results: batchtrim report --csv {path}" if path.suffix in TABLES else ""
        hint = f" For the report on these runs: batchtrim report {path.parent}" if path.suffix == ".jsonl" else hint
        raise ValueError(f"expected {path} to be TOML, got a mistake in it: {error}.{hint}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} to be text in UTF-8, got other bytes ({error.reason}).") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"expected a TOML file {path}, got nothing there.") from error


def shown(name: object) -> str:
    """Return a name for a message: on one line, with escapes for bytes that are not text, which file systems allow."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(name))


def in_lines(text: str) -> str:
    """Return a message of several lines, each as :func:`shown` returns it: a name in it cannot control the terminal."""
    return "\n".join(map(shown, text.split("\n")))


def expanded(path: str | Path) -> Path:
    """Return a path with its ``~`` expanded; unchanged if the home folder is unknown."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises RuntimeError then


def absolute(path: str | Path) -> Path:
    """Return a path from the root, the same for every spelling; links are followed only where it has a ``..``."""
    path = expanded(path)
    return path.resolve() if ".." in path.parts else path.absolute()


def in_a_line(error: Exception) -> str:
    """Return an error's message; for an error of the file system, a sentence that names the file."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if error.filename is None:
        return f"cannot print, or write a file ({error.strerror})."
    return f"cannot use {os.fsdecode(error.filename)} ({error.strerror})."


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside ``path`` and rename it: readers see the old file or the new one, never a partial one.

    Args:
        write: called with the open file. Its errors are passed on, and nothing is left behind. If an error followed
            one of the file system, as torch.save's does on a full disk, that one is raised.
    """
    # the name starts like the file's, so that remove_parts finds it if this process dies
    part = path.with_name(f"{path.stem}.{uuid.uuid4().hex}{PART}")
    try:
        with part.open("wb") as file:
            write(file)
        os.replace(part, path)
    except RuntimeError as error:
        raise _first_of_the_disk(error) or error from None
    finally:
        part.unlink(missing_ok=True)


def _first_of_the_disk(error: BaseException | None) -> OSError | None:
    """Return the file system's error that an error followed, or None."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def remove_parts(folder: Path, stem: str = "") -> None:
    """Remove partial files that dead writers left in ``folder``: all of them, or those for one stem.

    The caller makes sure that no process is writing there.
    """
    for path in folder.glob(f"*{PART}"):
        if not stem or path.name.partition(".")[0] == stem:
            path.unlink(missing_ok=True)


def look_up(what: str, name: Any, table: Mapping[str, Entry], other: str = "") -> Entry:
    """Return the entry called ``name``, or raise an error that suggests the nearest name.

    Args:
        other: further forms of the argument, for the message.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    listed = ", ".join(table) + (f"; or {other};" if other else ",")
    raise ValueError(f"expected `{what}` to be one of {listed} got {name!r}.{nearest(name, table)}")
