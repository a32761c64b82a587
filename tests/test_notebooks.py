"""The notebooks run from top to bottom, and are committed with their output, which the site shows."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: make docs brings it")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 200_000
NUMBER = re.compile(r"[\d.]+")  # differ from one machine to the next


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_was_run_in_order(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "restart, and run all cells"
    assert all(cell.outputs or cell.source.startswith("def ") for cell in code)
    assert not any(cell.metadata for cell in cells), "times and states of a session are noise in a diff"
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", str(output.get("text", ""))), "a machine's path"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the kernel's machinery, not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: make docs brings it")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: make docs brings it")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute(cwd=path.parent)
    said = _printed(notebook)
    assert any("%" in text for text in said), "it printed no result"
    before = _printed(nbformat.read(path, as_version=4))
    assert [NUMBER.sub("#", text) for text in said] == [NUMBER.sub("#", text) for text in before], "run it again"


def _printed(notebook):
    return [output.text for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output]


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 2
