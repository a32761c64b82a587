"""Variables of another file than the model's, as a training program's utilities have them."""

from __future__ import annotations

COUNT = 0
LOG: list[int] = []


def tick() -> int:
    global COUNT
    COUNT += 1
    return COUNT
