"""The scripts that `make` and CI run before anything else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiers import in_part

ROOT = Path(__file__).parents[1]


def test_the_parts_of_a_long_table_are_all_of_it() -> None:
    table = list(range(10))
    parts = [in_part(table, f"{at}/3") for at in (1, 2, 3)]
    assert sorted(each for part in parts for each in part) == table
    assert {len(part) for part in parts} == {3, 4}
    assert in_part(table, "1/1") == table


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/2/3"])
def test_a_part_that_is_none_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match="to be k/n, such as 2/4, got '"):
        in_part(range(10), part)


@pytest.mark.skipif(sys.platform != "linux" or not (ROOT / ".ci").exists(), reason="Linux, in a checkout")
@pytest.mark.parametrize(
    ("names", "env", "stops"),
    [
        (["torch", "nvidia-cublas"], {}, True),
        (["torch"], {}, False),
        (["torch", "nvidia-cublas"], {"CUDA": "1"}, False),
    ],
)
def test_cuda_is_not_downloaded_without_a_driver(
    tmp_path: Path, names: list[str], env: dict[str, str], stops: bool
) -> None:
    report = json.dumps({"install": [{"metadata": {"name": name}} for name in names]})
    (tmp_path / "pip.py").write_text(f"print({report!r})")
    env = {"PATH": "", "PYTHONPATH": str(tmp_path), **env}
    # -S: no site-packages, so torch is not there yet
    done = subprocess.run([sys.executable, "-S", ROOT / ".ci/cuda.py"], env=env, capture_output=True, text=True)
    assert done.returncode == (1 if stops else 0), done.stderr
    assert ("Stopped before the download" in done.stderr) == stops
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="in a checkout")
def test_what_is_too_long_is_named(tmp_path: Path) -> None:
    docstring = '    """' + "Told.\n" * 30 + '    """\n'
    body = "    # a comment\n\n    x = 1\n"
    (tmp_path / "right.py").write_text("def right():\n" + docstring + 59 * body)
    (tmp_path / "long.py").write_text("def long():\n" + docstring + 60 * body)
    (tmp_path / "file.py").write_text("x = 1\n" * 401)
    done = subprocess.run([sys.executable, "-S", ROOT / ".ci/sizes.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    first, second = done.stdout.splitlines()
    assert first.endswith("file.py: 401 lines, 400 at most")
    assert second.endswith("long.py:1: long has 61 lines of code, 60 at most")
