"""The ``batchtrim`` command and ``python -m batchtrim``: run the lab's command line, or name the missing extra."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from batchtrim import __version__

MISTAKE, INTERRUPTED = 2, 130
EARLY = "\nstopped before anything had begun"


def main() -> None:
    """Run the command line; without the lab extra, print one line that says how to install it."""
    listening = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so in a background job
    try:
        if listening:
            signal.signal(signal.SIGINT, _leave_early)
        if sys.argv[1:] == ["--version"]:  # needs no library: they take seconds to import
            _print_all(lambda: print(f"batchtrim {__version__}"))
            return
        _check_current_folder()
        _print_all(_load(listening))
    except KeyboardInterrupt:
        print(EARLY, file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        if listening:  # Ctrl-C while the interpreter exits shows a traceback too
            signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))


def _print_all(command: Callable[[], None]) -> None:
    """Call ``command`` and flush its output; if that fails, as on a full disk, say so in one line."""
    code: str | int | None = None
    try:
        try:
            command()
        except SystemExit as stop:
            code = stop.code
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter would fail again at exit
        if not code and not isinstance(error, BrokenPipeError):  # else it was printed, or nobody reads
            print(f"error: cannot print ({error.strerror or error}).", file=sys.stderr)
        code = code or MISTAKE
    sys.exit(code)


def _check_current_folder() -> None:
    """Exit with one line if the current folder is gone: the messages that libraries print then do not help."""
    try:
        os.getcwd()
    except OSError as error:
        print(f"error: cannot use the current folder ({error.strerror}). Was it removed? cd to another.",
              file=sys.stderr)  # fmt: skip
        sys.exit(MISTAKE)


def _load(listening: bool) -> Callable[[], None]:
    """Import the lab's command line. torch takes seconds to import, so it follows only when a command's work begins."""

    def before_work() -> None:
        with _missing_library_named():
            import torch  # noqa: F401
        if listening:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    with _missing_library_named():
        from batchtrim.lab import terminal
        from batchtrim.lab.cli import main as command
    terminal.before_work = before_work
    return command


@contextlib.contextmanager
def _missing_library_named() -> Iterator[None]:
    """Exit with a line that names the extra if a library cannot be imported."""
    try:
        yield
    except ImportError as error:
        root = (error.name or "").partition(".")[0]
        if root in ("", "batchtrim"):  # a fault of this package, not a missing library
            raise
        from batchtrim.errors import install_hint  # needs no library

        print(f"error: the command `batchtrim` needs `{root}`, which is not installed. {install_hint('lab')}",
              file=sys.stderr)  # fmt: skip
        sys.exit(MISTAKE)


def _leave_early(*_: object) -> None:
    """Exit at once: a KeyboardInterrupt inside a library's import may be swallowed, or shown as another error."""
    try:
        os.write(2, f"{EARLY}\n".encode())
    finally:
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
