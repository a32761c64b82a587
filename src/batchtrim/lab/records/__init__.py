"""Read and write runs.jsonl: each finished run is one line, appended whole or not at all, even if a process dies.

A line is written by one ``write`` to a file opened for appending, then synced, under a file lock. If the machine
crashes in the middle, the partial line at the end is not a finished run: readers skip it, and the next writer moves it
to ``runs.torn``. A whole run at the end that only lacks its newline counts. A run in progress is claimed by a lock that
the kernel releases when its holder dies, so two processes on one folder share the work and never do a run twice.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from batchtrim.lab.files import TABLES, CannotWrite, remove_parts, write_whole, writing
from batchtrim.lab.records.line import (
    COSTS,
    DONE,
    SCHEMA,
    STATUSES,
    ReplaceRecords,
    Row,
    check_result,
    is_whole,
    line_of,
    parse_row,
    whole_lines,
)

__all__ = [
    "COSTS", "DONE", "SCHEMA", "STATUSES", "Records", "ReplaceRecords", "Row", "UseAnotherFolder", "check_result",
    "latest_of", "read", "read_results", "torn",
]  # fmt: skip

BINARY = getattr(os, "O_BINARY", 0)  # Windows would write \r\n


class UseAnotherFolder(ValueError):
    """The folder holds runs of another experiment; the message names the difference."""


class Records:
    """The runs in a folder.

    Args:
        folder: holds ``runs.jsonl``, and the locks of runs in progress in ``.claims``.
        make: make the folder if it is missing, and check that it can be written. A worker does not: one that is
            missing then was removed, with the records in it.

    Raises:
        PermissionError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, *, make: bool = True):
        self.folder = Path(folder)
        self.path = self.folder / "runs.jsonl"
        self._rows: dict[str, Row] = {}
        self._offset = self._line = 0
        if make:
            self._make()

    def _make(self) -> None:
        try:
            (self.folder / ".claims").mkdir(parents=True, exist_ok=True)
            writable = os.access(self.folder, os.W_OK)
        except FileExistsError as error:
            what = "a link to nothing" if not self.folder.exists() else "a file in the way"
            raise FileExistsError(f"expected `out` to be a folder, got {self.folder}, {what}.") from error
        except OSError as error:
            raise PermissionError(_not_writable(self.folder, error.strerror)) from error
        if not writable:
            raise PermissionError(_not_writable(self.folder, "permission denied"))

    def rows(self) -> list[Row]:
        """Return the runs recorded so far, by any process: one per key, the last one recorded that did not fail."""
        self._refresh()
        return list(self._rows.values())

    def is_done(self, key: str) -> bool:
        """True if the run with that key finished or diverged; a failed run is retried."""
        self._refresh()
        return self._rows.get(key, {}).get("status") in DONE

    def append(self, row: Mapping[str, Any]) -> None:
        """Record a run; when this returns, the line is on disk. Curves are rounded to six significant digits.

        Raises:
            OSError: the disk is full, or the file cannot be written; no part of the row is left in it.
        """
        line = line_of(row)
        with writing(self.path), self._lock("append"):
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | BINARY, 0o644)
            try:
                end = self._close_last_line(file)
                try:
                    rest = line[os.write(file, line) :]  # a disk that is nearly full takes a piece, then says why not
                    if rest and os.write(file, rest) != len(rest):
                        raise OSError(errno.ENOSPC, "no room for a whole row. Is the disk full?")
                    os.fsync(file)
                except OSError:
                    os.ftruncate(file, end)
                    raise
            finally:
                os.close(file)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Claim the run with that key for this process; yield False if another process has it or it is done.

        The claim ends with the block, or with the process, however that ends.
        """
        lock = self._lock(key)
        try:
            with writing(self.folder):
                lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield not self.is_done(key)
        finally:
            lock.release()

    def settle(self, cells: list[Row]) -> None:
        """Note which experiment this folder holds, or check that it is the same one.

        Args:
            cells: for each part of a grid, the settings that its runs share (all but method, schedule and seed).

        Raises:
            UseAnotherFolder: the folder's experiment neither contains these cells nor is contained in them.
        """
        with self._lock("settle"):
            there, ours, gone = self._compared(cells)
            if ours and gone:
                raise UseAnotherFolder(_difference(self.folder, gone, ours))
            if ours:
                text = json.dumps(there + ours, indent=1) + "\n"
                with writing(path := self.folder / "grid.json"):
                    write_whole(path, lambda file: file.write(text.encode()))

    def differing(self, cells: list[Row]) -> dict[str, tuple[Any, Any]]:
        """Return the settings, there and here, that make these cells another experiment; {} if it is the same."""
        with self._lock("settle"):
            _, ours, gone = self._compared(cells)
        return _differing(gone, ours) if ours and gone else {}

    def _compared(self, cells: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
        """Return the folder's cells, those of ``cells`` that it lacks, and those that only it has."""
        path = self.folder / "grid.json"
        there = _read_cells(path) if path.exists() and self._begun() else []
        return there, [cell for cell in cells if cell not in there], [cell for cell in there if cell not in cells]

    def _begun(self) -> bool:
        """True if the experiment has begun here: there is a recorded run, a checkpoint, or a run in progress.

        A first run that failed because of a wrong setting leaves none.
        """
        if self.rows() or any((self.folder / "checkpoints").glob("*.pt")):
            return True
        for lock in (self.folder / ".claims").glob("*.lock"):
            if lock.stem not in ("settle", "append"):
                with self.claim(lock.stem) as free:
                    if not free:
                        return True
        remove_parts(self.folder / "checkpoints")  # no run is in progress: a dead process left them
        return False

    def _close_last_line(self, file: int) -> int:
        """Make the file end in a newline, and return its size: complete a whole run, move a partial one away."""
        start, size = _end_of_last_line(file), os.fstat(file).st_size
        if start == size:
            return size
        rest = _read_at(file, size - start, start)
        if is_whole(rest):
            os.write(file, b"\n")
            return size + 1
        with self.path.with_suffix(".torn").open("ab") as torn:
            torn.write(rest + b"\n")
        os.ftruncate(file, start)
        return start

    def _lock(self, name: str) -> FileLock:
        claims = self.folder / ".claims"
        if not claims.is_dir():  # the lock would create it, and the row go into a new file
            raise CannotWrite(f"cannot write {self.path}: the folder is gone. Was it moved or removed?")
        return FileLock(claims / f"{name}.lock")

    def _refresh(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        ended = text[: text.rfind(b"\n") + 1]
        for number, line in whole_lines(text):
            _add(self._rows, parse_row(line, self.path, self._line + number))
        self._offset += len(ended)
        self._line += ended.count(b"\n")


def read(path: str | Path) -> list[Row]:
    """Return the runs in a folder or in a ``runs.jsonl``: one per key, the last that did not fail. Writes nothing."""
    return _read(path)


def read_results(path: str | Path) -> list[Row]:
    """Return the runs as :func:`read` does, and check that each has the fields that a comparison needs.

    Raises:
        ReplaceRecords: a run lacks a field, or has a word in place of a number; the message names file and line.
    """
    return _read(path, check_result)


def _read(path: str | Path, check: Callable[[Row, str], None] = lambda row, place: None) -> list[Row]:
    path = _record_file(path)
    rows: dict[str, Row] = {}
    for number, line in whole_lines(path.read_bytes()):
        row = parse_row(line, path, number)
        check(row, f"{path}, line {number}")
        _add(rows, row)
    return list(rows.values())


def latest_of(rows: Iterable[Row]) -> list[Row]:
    """Return one row per key: the last that did not fail, as :func:`read` does."""
    found: dict[str, Row] = {}
    for row in rows:
        _add(found, row)
    return list(found.values())


def _add(rows: dict[str, Row], row: Row) -> None:
    """Let a row replace an earlier one of its run, unless that is done and this failed: files may have been merged."""
    before = rows.get(row["key"])
    if before is None or row["status"] in DONE or before["status"] not in DONE:
        rows.pop(row["key"], None)
        rows[row["key"]] = row


def torn(path: str | Path) -> str:
    """Return where the record file ends in a partial run, as ``FILE, line N``; "" if it does not."""
    path = _record_file(path)
    *ended, rest = path.read_bytes().split(b"\n")
    return f"{path}, line {len(ended) + 1}" if rest and not is_whole(rest) else ""


def _record_file(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected a folder of runs, got {path}, which does not exist.{_folders_near(path)}")
    path = path / "runs.jsonl" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(
            f"expected runs in {path}, got nothing there. Has the first run finished?{_folders_near(path.parent)}"
        )
    if path.suffix != ".jsonl":
        hint = f" For a table of results: batchtrim report --csv {path}" if path.suffix in TABLES else ""
        if (path.parent / "runs.jsonl").exists():
            hint = f" For the report on the runs beside it: batchtrim report {path.parent}"
        raise ValueError(f"expected a folder of runs, or its runs.jsonl, got {path}.{hint}")
    return path


def _read_cells(path: Path) -> list[Row]:
    """Return the cells that ``grid.json`` lists for the experiment in its folder."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
            raise ValueError("no list of settings")
    except ValueError as error:
        raise ReplaceRecords(
            f"expected the settings of the runs in {path}, got a file that does not hold them ({error}). "
            "It was edited by hand or is damaged: remove it, and the next command rewrites it."
        ) from error
    return cells


def _folders_near(path: Path) -> str:
    """Return a hint that names folders of runs under a folder, or under the nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    found = sorted(str(each.parent) for each in path.glob("*/runs.jsonl")) if path.is_dir() else []
    if not found:
        return ""
    return f" There are runs in: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}."


def _read_at(file: int, count: int, start: int) -> bytes:
    os.lseek(file, start, os.SEEK_SET)  # not os.pread, which Windows lacks
    return os.read(file, count)


def _end_of_last_line(file: int) -> int:
    """Return the offset just after the last newline."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - 65536)
        found = _read_at(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _differing(there: list[Row], here: list[Row]) -> dict[str, tuple[Any, Any]]:
    """Return the differences, there and here, between the two most similar cells."""

    def differing(pair: tuple[Row, Row]) -> list[str]:
        return [name for name in sorted(pair[0] | pair[1]) if pair[0].get(name) != pair[1].get(name)]

    old, new = min(((old, new) for old in there for new in here), key=lambda pair: len(differing(pair)))
    return {name: (old.get(name), new.get(name)) for name in differing((old, new))}


def _difference(folder: Path, there: list[Row], here: list[Row]) -> str:
    differing = _differing(there, here)
    parts = [f"{name} {old} there and {new} here" for name, (old, new) in differing.items()]
    cure = "Pass another --out, or the old settings to continue."
    if list(differing) == ["data_version"]:
        cure = "Images, labels or the split have changed since. Pass another --out, or undo the change."
    return f"expected the configuration that {folder} already holds runs of, got another: {'; '.join(parts)}. {cure}"


def _not_writable(folder: Path, reason: str | None) -> str:
    return f"expected `out` to be a folder that can be written, got {folder} ({reason}). Pass another --out."
