"""Bound how long a library may wait: check that an address answers, and call with a time limit."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

WAIT = 5.0  # seconds to connect
LONGEST_START = 20.0  # seconds for a cluster to accept the connection


_given_up: list[threading.Thread] = []


def call_and_leave(command: Callable[[], Any]) -> None:
    """Call ``command``; when it exits, exit at once even if an abandoned start is still waiting.

    A normal exit would wait for that start, which is inside a C++ library.
    """
    try:
        command()
    except SystemExit as end:
        if not any(thread.is_alive() for thread in _given_up):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def check_address(address: str) -> None:
    """Raise a ConnectionError if nothing listens at ``host:port`` or ``ray://host:port``, or the port is missing.

    Other forms pass: ``auto``, and forms that only a library knows.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address.startswith("ray://") and not (host and port.isdecimal()):
        raise ConnectionError("it needs a host and a port: ray://HOST:10001")
    if not colon or not port.isdecimal():
        return
    try:
        with contextlib.closing(socket.create_connection((host.strip("[]"), int(port)), WAIT)):
            return
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConnectionError(str(getattr(error, "strerror", None) or error or "no answer")) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Discard what the process writes to file descriptor 2: Python cannot switch off a C++ library's log."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def in_time(start: Callable[[], Any], seconds: float | None = None) -> None:
    """Call ``start``; pass on its error, or raise a ConnectionError if it has not returned after ``seconds``.

    Its standard error is discarded: if another service has the port, Ray's C++ library repeats one line forever.
    """
    seconds = LONGEST_START - WAIT if seconds is None else seconds
    failed: list[BaseException] = []

    def work() -> None:
        try:
            start()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    with _silence():
        thread.start()
        thread.join(seconds)
    if thread.is_alive():
        _given_up.append(thread)
        raise ConnectionError(f"no answer within {seconds:.0f} seconds")
    if failed:
        raise failed[0]
