"""Short checks that an address answers, before a library waits long for it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

WAIT = 5.0  # seconds for a connection
LONGEST_START = 20.0  # seconds for a cluster to take us in


def check_address(address: str) -> None:
    """Raise a ConnectionError if nothing listens at ``host:port`` or ``ray://host:port``; other forms pass."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        with contextlib.closing(socket.create_connection((host.strip("[]"), int(port)), WAIT)):
            return
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConnectionError(str(getattr(error, "strerror", None) or error or "no answer")) from error


def in_time(start: Callable[[], Any], seconds: float | None = None) -> None:
    """Call ``start``; raise what it raises, or a ConnectionError if it has not returned after ``seconds``."""
    seconds = LONGEST_START - WAIT if seconds is None else seconds
    failed: list[BaseException] = []

    def work() -> None:
        try:
            start()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise ConnectionError(f"no answer within {seconds:.0f} seconds")
    if failed:
        raise failed[0]
