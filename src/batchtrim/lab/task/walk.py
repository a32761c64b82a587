"""Find the images below a class folder, and the files beside them: nothing is left out without a word."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["FolderContents", "check_link", "images_in"]


@dataclass
class FolderContents:
    """The files below class folders.

    Attributes:
        images: files by their suffix, links that lead nowhere among them, which are told as broken images.
        others: names of files that are no images. linked: folders that links lead to, which are not entered.
    """

    images: list[Path] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    linked: list[Path] = field(default_factory=list)


def images_in(folder: Path, suffixes: Collection[str]) -> FolderContents:
    """Return what lies below ``folder``; hidden files, and all in hidden folders, are left out.

    Raises:
        PermissionError: a folder cannot be read, which pathlib passes over.
    """
    found = FolderContents()
    _check_readable(folder)
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_dir():
            if path.is_symlink():
                found.linked.append(path)
            else:
                _check_readable(path)
        elif path.suffix.lower() in suffixes:
            found.images.append(path)
        else:
            found.others.append(path.name)
    return found


def _check_readable(folder: Path) -> None:
    if not os.access(folder, os.R_OK | os.X_OK):
        raise PermissionError(f"expected folders of images that can be read, got {folder}, which may not be.")


def check_link(folder: Path, root: Path) -> None:
    """Refuse a class folder that is a link to ``root`` or to what holds it: it would hold every image once more."""
    if folder.is_symlink() and root.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"expected class folders in {root}, got {folder.name}, a link to {folder.resolve()}. Remove it."
        )
