"""Bound the memory of images decoded at the same time, whatever their size and the number of cores."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from batchtrim._checks import import_extra

__all__ = ["ROOM", "Room", "blocks_kept", "needed", "room"]

ROOM = 2**29  # bytes of images at their full size
_ONE_COPY = ("1", "L", "RGB", "YCbCr", "CMYK")  # modes converted in a single step


class Room:
    """Limit the images decoded at once to a memory budget; an image that exceeds it is decoded alone.

    Args:
        size: the budget in bytes.
    """

    def __init__(self, size: int):
        self.size = self.free = size
        self.turn = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Wait for ``size`` bytes of the budget, and hold them inside the block."""
        size = min(size, self.size)
        with self.turn:
            self.turn.wait_for(lambda: self.free >= size)
            self.free -= size
        try:
            yield
        finally:
            with self.turn:
                self.free += size
                self.turn.notify_all()


room = Room(ROOM)


def needed(image: Any) -> int:
    """Return about how many bytes a Pillow image takes while it is decoded and converted."""
    simple = image.mode in _ONE_COPY and "transparency" not in image.info
    return image.width * image.height * (8 if simple else 24)


@contextlib.contextmanager
def blocks_kept() -> Iterator[None]:
    """Have Pillow reuse the blocks of large images, as PILLOW_BLOCKS_MAX does: malloc would keep some per thread."""
    core: Any = import_extra("PIL.Image", "lab", "images").core
    before = core.get_blocks_max()
    try:
        core.set_blocks_max(max(before, ROOM // core.get_block_size()))
        yield
    finally:
        core.set_blocks_max(before)
