"""Variables in another file than the model's, as in a training program's utilities."""

from __future__ import annotations

COUNT = 0
LOG: list[int] = []


def tick() -> int:
    global COUNT
    COUNT += 1
    return COUNT
