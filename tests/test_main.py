"""``python -m batchtrim``, and the command where its extra is missing."""

from __future__ import annotations

import subprocess
import sys

from batchtrim import __version__


def test_the_module_runs_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "batchtrim", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"batchtrim {__version__}\n"


def test_without_the_lab_extra_one_line_names_it() -> None:
    code = "import sys; sys.modules['typer'] = None; from batchtrim.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'batchtrim[lab]'" in done.stderr
    assert "pip install -e '.[lab]'" in done.stderr


def test_ctrl_c_while_libraries_are_imported_is_no_traceback() -> None:
    code = (
        "import sys, builtins; from batchtrim.__main__ import main; there = builtins.__import__\n"
        "def stop(name, *rest, **more):\n"
        "    if name == 'typer': raise KeyboardInterrupt\n"
        "    return there(name, *rest, **more)\n"
        "builtins.__import__ = stop; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\nstopped before anything had begun\n")
