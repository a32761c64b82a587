"""The file of a task: a program without arguments, beside files that may have the names of libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from batchtrim.lab import compare, records
from batchtrim.lab.task import own_code
from batchtrim.lab.task.own_code import Code, YourCodeFailed


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_task_in_a_file_sees_no_arguments_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its argparse ended it with: unrecognized arguments: compare --task ..."""
    monkeypatch.setattr(sys, "argv", ["batchtrim", "compare", "--task", "parsing.py:train"])
    body = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, {})
early = parser.parse_known_args()[1]
def train(run):
    run.trim(__import__("torch").rand(8))
    run.trim.step()
    return {{"error": len(early + parser.parse_known_args()[1]) + parser.parse_args().width / 10}}
"""
    Path("parsing.py").write_text(body.format("default=1"))
    found = compare("parsing.py:train", ["full"], 1, epochs=1, out="here", quiet=True)
    assert found.groups[0].arms[0].errors == {0: 0.1}
    assert sys.argv[1] == "compare"
    Path("parsing.py").write_text(
        body.format("required=True").replace("early = parser.parse_known_args()[1]", "early = []")
    )
    with pytest.raises(YourCodeFailed, match=r"exit\(2\).* it has no command-line arguments: give those of argparse"):
        compare("parsing.py:train", ["full"], 1, epochs=1, out="there", quiet=True)


def test_numbers_drawn_when_a_file_is_loaded_change_no_run(tmp_path: Path) -> None:
    """The first run of each process loads the file after it was seeded: it was not paired with other methods' runs."""
    (tmp_path / "drawing.py").write_text(
        "import random, numpy, torch\n"
        "data = torch.rand(()).item(), numpy.random.rand(), random.random()\n"
        "torch.manual_seed(1), numpy.random.seed(2), random.seed(3)\n"
        "def train(run):\n"
        "    run.trim(torch.rand(8))\n"
        "    return {'rmse': torch.rand(()).item(), 'seed': torch.initial_seed(), 'numpy': numpy.random.rand(),\n"
        "            'random': random.random(), 'data': sum(data)}\n"
    )
    found = []
    for first in ("a", "b"):  # as in two processes
        own_code._loaded.clear()
        for seed in (4, 5) if first == "a" else (5, 4):
            compare(
                str(tmp_path / "drawing.py:train"), ["full"], [seed], epochs=1, metric="rmse", out=first, quiet=True
            )
        found.append({row["config"]["seed"]: (row["value"], row["also"]) for row in records.read(first)})
    assert found[0] == found[1]
    assert {seed: also["seed"] for seed, (_, also) in found[0].items()} == {4: 4, 5: 5}


def test_a_file_that_hides_a_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library was said not to be installed."""
    Path("lightning.py").write_text("import batchtrim.integrations.lightning\ndef train(run): ...\n")
    for name in [name for name in sys.modules if name.startswith(("lightning", "batchtrim.integrations.lightning"))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        YourCodeFailed, match=r"which .*lightning\.py lacks\. If that file hides the library, rename it"
    ):
        compare("lightning.py:train", ["full"], 1, quiet=True, workers=1)
    monkeypatch.delitem(sys.modules, "lightning", raising=False)


def test_a_module_of_another_program_is_not_taken_for_the_one_beside_a_file(tmp_path: Path) -> None:
    """The second network was built from the layers of the first, and recorded as its own."""
    for folder, text in (("one", "import my_layers\n"), ("two", "def train(run):\n    import my_layers\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_layers.py").write_text(f"name = {folder!r}\n")
        (tmp_path / folder / f"net_{folder}.py").write_text(f"{text}def other(run): return {{'error': 0.1}}\n")
    (tmp_path / "two" / "apart.py").write_text("def train(run): return {'error': 0.1}\n")
    Code.in_file(f"{tmp_path}/one/net_one.py:other", "train").load()
    Code.in_file(f"{tmp_path}/two/apart.py:train", "train").load()  # which imports none
    with pytest.raises(YourCodeFailed, match=r"'my_layers' in net_two\.py:train to get .*two.my_layers\.py, got .*one"):
        Code.in_file(f"{tmp_path}/two/net_two.py:train", "train").load()
    sys.modules.pop("my_layers")
    Code.in_file(f"{tmp_path}/two/net_two.py:train", "train").load()
