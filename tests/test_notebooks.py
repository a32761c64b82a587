"""The notebooks run from top to bottom, and are committed without what they print."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: make docs brings it")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 200_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_light(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES
    cells = nbformat.read(path, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), "clear all outputs"


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
    said = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("%" in text for text in said), "it printed no result"


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 2
