"""The ``batchtrim`` command and ``python -m batchtrim``: run the lab's command line, or name the missing extra."""

from __future__ import annotations

import sys

from batchtrim._checks import install_hint


def main() -> None:
    """Run the command line; without the lab extra, one line says how to get it."""
    try:
        from batchtrim.lab.cli import main as command
    except ImportError as error:
        root = (error.name or "").partition(".")[0]
        if root in ("", "batchtrim"):  # a fault of this package, and no missing library
            raise
        print(f"error: the command `batchtrim` needs `{root}`, which is not installed. {install_hint('lab')}",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped before anything had begun", file=sys.stderr)
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
