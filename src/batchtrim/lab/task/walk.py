"""Find the images below a class folder, and other files, so that nothing is left out silently."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["FolderContents", "check_link", "check_readable", "images_in", "is_hidden"]

_SYSTEM = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders that operating systems and network disks create, for thumbnails or deleted files."""


@dataclass
class FolderContents:
    """The files below class folders.

    Attributes:
        images: files by their suffix, including broken links, which are reported as broken images.
        others: names of files that are not images.
        linked: linked folders, which are not entered.
    """

    images: list[Path] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    linked: list[Path] = field(default_factory=list)


def images_in(folder: Path, suffixes: Collection[str]) -> FolderContents:
    """Return what is below ``folder``, without hidden files and the contents of hidden folders.

    Raises:
        PermissionError: a folder cannot be read, which would hide its images.
    """
    found = FolderContents()
    waiting = _inside(folder)[::-1]
    while waiting:
        entry = waiting.pop()
        if _is_folder(entry):
            if entry.is_symlink():
                found.linked.append(Path(entry.path))
            else:
                waiting += _inside(entry)[::-1]
        elif os.path.splitext(entry.name)[1].lower() in suffixes:
            found.images.append(Path(entry.path))
        else:
            found.others.append(entry.name)
    return found


def is_hidden(name: str) -> bool:
    """True if a file or folder of that name is not part of the data: hidden, or made by the operating system."""
    return name.startswith(".") or name in _SYSTEM


def _inside(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """Return the entries of a folder that are not hidden, in path order."""
    check_readable(folder)
    with os.scandir(folder) as entries:
        return sorted(
            (each for each in entries if not is_hidden(each.name)), key=lambda each: os.path.normcase(each.name)
        )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def check_readable(folder: Path | os.DirEntry[str]) -> None:
    """Refuse a folder that this user cannot read, which would hide its images."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise PermissionError(
            f"expected folders of images that can be read, got {os.fspath(folder)}, which this user may not read."
        )


def check_link(folder: Path, root: Path) -> None:
    """Refuse a class folder that links to ``root`` or a parent of it, and so would contain every image again."""
    if folder.is_symlink() and root.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"expected class folders in {root}, got {folder.name}, a link to {folder.resolve()}. Remove it."
        )
