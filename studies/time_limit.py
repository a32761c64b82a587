"""Stop code that takes too long by the alarm signal: in the main thread of a process, on systems that have it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

__all__ = ["TooLong", "time_limit"]


class TooLong(BaseException):
    """Raised by the alarm. It is not an ``Exception``, so code that catches a model's errors does not catch it."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise :class:`TooLong` if the block takes more than ``seconds``."""
    before = signal.signal(signal.SIGALRM, _raise)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _raise(*_: Any) -> None:
    raise TooLong
