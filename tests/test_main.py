"""``python -m batchtrim``, and the command where its extra is missing."""

from __future__ import annotations

import importlib.abc
import subprocess
import sys
from collections.abc import Callable

import pytest

from batchtrim import __version__
from batchtrim.__main__ import main


def test_the_module_runs_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "batchtrim", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"batchtrim {__version__}\n"


class Fails(importlib.abc.MetaPathFinder):
    """Fails when ``typer`` is looked for."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def find_spec(self, name: str, *_: object) -> None:
        if name == "typer":
            raise self.error


@pytest.fixture
def first_import(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """Run the command as in a process that has not imported its libraries, and fails to; return its exit code."""

    def run(error: BaseException) -> int:
        for name in [name for name in sys.modules if name in ("typer", "batchtrim.lab.cli")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Fails(error), *sys.meta_path])
        with pytest.raises(SystemExit) as stop:
            main()
        assert isinstance(stop.value.code, int)
        return stop.value.code

    return run


def test_without_the_lab_extra_one_line_names_it(
    first_import: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert first_import(ModuleNotFoundError("No module named 'typer'", name="typer")) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "pip install 'batchtrim[lab]'" in told
    assert "pip install -e '.[lab]'" in told


def test_ctrl_c_while_libraries_are_imported_is_no_traceback(
    first_import: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert first_import(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\nstopped before anything had begun\n"
