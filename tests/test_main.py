"""``python -m batchtrim``, and the command if its extra is not installed."""

from __future__ import annotations

import importlib.abc
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from batchtrim import __version__
from batchtrim.__main__ import main
from tiers import few


def test_the_module_runs_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "batchtrim", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"batchtrim {__version__}\n"


MODULE = ["-m", "batchtrim"]
SCRIPT = ["-c", "from batchtrim.__main__ import main; main()"]  # as an installed command does


def interrupted(words: list[str], folder: Path, ignored: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Python with a library in ``folder``; Ctrl-C arrives unless it is ignored, as it is in a background job."""
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL),
        capture_output=True,
        text=True,
        timeout=60,
    )


def torch_that(folder: Path, code: str) -> Path:
    (folder / "torch.py").write_text("import os, signal\n" + textwrap.dedent(code))
    return folder


@pytest.mark.parametrize("words", [MODULE, pytest.param(SCRIPT, marks=pytest.mark.slow)], ids=["module", "script"])
@pytest.mark.parametrize(
    "code",
    [
        "os.kill(os.getpid(), signal.SIGINT)",
        *(
            pytest.param(
                f"try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    {ends}",
                marks=pytest.mark.slow,
            )
            for ends in ("pass", "raise ImportError('no _C')")
        ),
    ],
    ids=["raised", "swallowed", "turned"],
)
def test_ctrl_c_while_torch_is_imported_is_one_line(words: list[str], code: str, tmp_path: Path) -> None:
    done = interrupted([*words, "methods"], torch_that(tmp_path, code))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped before anything had begun\n")


def test_ctrl_c_while_the_interpreter_ends_shows_no_traceback(tmp_path: Path) -> None:
    code = (
        "import atexit, os, signal, sys; atexit.register(os.kill, os.getpid(), signal.SIGINT); "
        "from batchtrim.__main__ import main; main()"
    )
    done = interrupted(["-c", code, "--version"], tmp_path)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_background_job_keeps_ignoring_ctrl_c(tmp_path: Path) -> None:
    code = "os.kill(os.getpid(), signal.SIGINT)\nraise ImportError('no torch', name='torch')"
    done = interrupted([*MODULE, "methods"], torch_that(tmp_path, code), ignored=True)
    assert done.returncode == 2
    assert "needs `torch`, which is not installed" in done.stderr


def test_the_version_needs_no_library(tmp_path: Path) -> None:
    done = interrupted([*MODULE, "--version"], torch_that(tmp_path, "raise ImportError('no torch', name='torch')"))
    assert (done.stdout, done.stderr) == (f"batchtrim {__version__}\n", "")


HELP: dict[str, tuple[list[str], str]] = {
    " ".join(words): (words, says)
    for words, says in [
        (["--help"], "compare "),
        ([], "compare "),
        (["compare", "-h"], "optimizer: adam, adamw, sgd, nesterov"),
        (["sweep", "--help"], "[linear,cosine,step]"),
        (["train", "--help"], "method; `batchtrim methods` lists them [trim]"),
        (["demo", "--help"], "--workers"),
        (["report", "--help"], "--figures"),
        (["claims", "--help"], "claims.toml"),
        (["show", "--help"], "--keep-log"),
        (["methods", "--help"], "--json"),
        (["compare", "--epoch"], "No such option: --epoch"),
        (["compare", "--epochs", "ten"], "expected a whole number, got 'ten'"),
    ]
}


@pytest.mark.parametrize("typed", few(HELP, ["--help", "compare -h"]))
def test_help_needs_no_torch(typed: str, tmp_path: Path) -> None:
    """Importing torch takes seconds, which whoever asks for help waits."""
    words, says = HELP[typed]
    folder = torch_that(tmp_path, "raise ImportError('no torch', name='torch')")
    done = interrupted([*MODULE, *words], folder)
    assert says in done.stdout + done.stderr
    assert "is not installed" not in done.stderr


@pytest.fixture(autouse=True)
def _ctrl_c_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


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


def test_ctrl_c_during_imports_shows_no_traceback(
    first_import: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert first_import(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\nstopped before anything had begun\n"
