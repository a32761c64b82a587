"""The public names are sorted and complete, and `import batchtrim` imports torch alone."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import re
import subprocess
import sys
import textwrap

import pytest

import batchtrim

OPTIONAL = (
    "lightning", "lightning_fabric", "pytorch_lightning", "transformers", "accelerate", "datasets", "ray", "sklearn",
    "scipy", "matplotlib", "rich", "typer", "pandas", "pyarrow", "tensorboard", "PIL",
)  # fmt: skip


def python(code: str, env: dict[str, str] | None = None) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return run.stdout.strip()


STAGES = ("import batchtrim; from batchtrim import *", "batchtrim.testing", "batchtrim.compat", "batchtrim.lab")
HELP = """
from typer.testing import CliRunner
from batchtrim.lab import cli
assert CliRunner().invoke(cli.app, ["compare", "--help"]).exit_code == 0
"""
HEAVY = "import PIL"
# each module after all others were forgotten: none relies on another to have been imported
ALONE = """
import importlib, pkgutil
names = [module.name for module in pkgutil.iter_modules(batchtrim.__path__) if module.name != "__main__"]
alone = []
for name in names:
    for module in [module for module in sys.modules if module.partition(".")[0] == "batchtrim"]:
        del sys.modules[module]
    if getattr(importlib.import_module("batchtrim"), name).__name__ == f"batchtrim.{name}":
        alone.append(name)
assert alone == names, set(names) - set(alone)
print(len(alone))
"""


@pytest.fixture(scope="module")
def told() -> list[str]:
    """What one fresh process prints, as torch takes long to import: a line for each stage, and one for ALONE."""
    lines = ["import sys, torch", "before = set(sys.modules)"]
    for stage in (*STAGES, HELP, HEAVY):
        lines += [stage, "print(*(set(sys.modules) - before))"]
        lines += [ALONE] if stage == STAGES[-1] else []  # while nothing optional is there
    return python("\n".join(lines)).split("\n")


@pytest.fixture
def brought_in(told: list[str]) -> dict[str, set[str]]:
    """For each stage, the modules that it loads beyond those of ``import torch``."""
    lines = [line for number, line in enumerate(told) if number != len(STAGES)]
    return {stage: set(line.split()) for stage, line in zip((*STAGES, HELP, HEAVY), lines, strict=True)}


def optional(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} & set(OPTIONAL)


@pytest.mark.parametrize("stage", STAGES)
def test_importing_brings_in_nothing_optional(stage: str, brought_in: dict[str, set[str]]) -> None:
    assert optional(brought_in[stage]) == set()


def test_the_test_above_can_fail(brought_in: dict[str, set[str]]) -> None:
    assert "PIL" in optional(brought_in[HEAVY])


def test_help_needs_no_more_than_what_prints_it(brought_in: dict[str, set[str]]) -> None:
    assert optional(brought_in[HELP]) <= {"rich", "typer"}


def test_submodules_come_when_asked_for(brought_in: dict[str, set[str]]) -> None:
    for before, stage in itertools.pairwise(STAGES):
        assert stage not in brought_in[before]
        assert stage in brought_in[stage]
    with pytest.raises(AttributeError, match="module 'batchtrim' has no attribute 'nothing'"):
        batchtrim.nothing


def test_importing_the_package_imports_nothing_else() -> None:
    before, after = python("import sys; print(*sys.modules); import batchtrim; print(*sys.modules)").split("\n")
    assert set(after.split()) - set(before.split()) - {"importlib"} == {"batchtrim"}


def test_python_editors_and_star_imports_see_the_same_names() -> None:
    block = next(node for node in ast.parse(inspect.getsource(batchtrim)).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    written = {
        name.name: node.module for node in imports for name in node.names if node.module not in (None, "batchtrim")
    }
    assert written == {name: f"batchtrim.{home}" for name, home in batchtrim._HOME.items()}
    assert sorted(written) == batchtrim.__all__


def test_every_module_is_an_attribute_and_can_be_imported_first(told: list[str]) -> None:
    assert int(told[len(STAGES)]) > 20


@pytest.mark.slow
def test_a_compiled_function_may_be_the_first_to_use_a_name() -> None:
    code = """
    import torch, batchtrim
    compiled = torch.compile(lambda losses: batchtrim.focal(losses), backend="eager", fullgraph=True)
    assert "focal" not in vars(batchtrim)
    losses = torch.rand(8)
    assert torch.equal(compiled(losses), batchtrim.focal(losses))
    """
    python(textwrap.dedent(code))


def test_all_is_sorted_and_complete() -> None:
    assert batchtrim.__all__ == sorted(batchtrim.__all__)
    for name in batchtrim.__all__:
        assert getattr(batchtrim, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize(("name", "home"), [("above", "selection"), ("join", "schedules"), ("step", "schedules")])
def test_names_that_moved_work_for_one_more_release(name: str, home: str) -> None:
    assert name not in batchtrim.__all__
    assert name not in dir(batchtrim)
    expected = f"batchtrim.{name} is removed in the next release: use batchtrim.{home}.{name}."
    with pytest.warns(DeprecationWarning, match=re.escape(expected)) as warned:
        old = getattr(batchtrim, name)
    assert old is getattr(getattr(batchtrim, home), name)
    assert [warning.filename for warning in warned] == [__file__]
    with pytest.warns(DeprecationWarning, match=re.escape(expected)) as warned:
        exec(compile(f"from batchtrim import {name}", __file__, "exec"), {})
    assert {warning.filename for warning in warned} == {__file__}


def test_the_old_name_of_a_step_works_for_one_more_release() -> None:
    from batchtrim.engine import batch

    with pytest.warns(
        DeprecationWarning, match=r"batchtrim\.engine\.batch\.Step is removed .* use StepResult"
    ) as warned:
        assert batch.Step is batch.StepResult
    assert [warning.filename for warning in warned] == [__file__]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        batch.nothing


def test_completion_reads_like_a_table_of_contents() -> None:
    modules = {"compat", "errors", "integrations", "keeplog", "lab", "schedules", "selection", "testing"}
    assert dir(batchtrim) == sorted(dir(batchtrim))
    assert set(dir(batchtrim)) == {*batchtrim.__all__, *modules, "__version__"}
    for name in modules:
        assert getattr(batchtrim, name).__name__ == f"batchtrim.{name}"


@pytest.mark.slow
def test_import_adds_at_most_50_ms_to_torch() -> None:
    code = "import time, torch; at = time.perf_counter(); from batchtrim import *; print(time.perf_counter() - at)"
    # as anybody but a machine told to write none has it: with bytecode, which the first of the runs leaves
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    seconds: list[float] = []
    while len(seconds) < 5 and min(seconds, default=1.0) > 0.050:  # other work on the machine only adds
        seconds.append(float(python(code, env)))
    assert min(seconds) <= 0.050


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("Trimer", "Trimmer"), ("per_samples", "per_sample"), ("hardes", "hardest"), ("schedule", "schedules")],
)
def test_a_misspelt_name_gets_a_suggestion(wrong: str, right: str) -> None:
    with pytest.raises(AttributeError, match=rf"has no attribute '{wrong}'\. Did you mean 'batchtrim\.{right}'\?$"):
        getattr(batchtrim, wrong)


def test_a_wrong_name_costs_no_import_of_torch() -> None:
    code = "import sys, batchtrim\ntry:\n    batchtrim.Trimer\nexcept AttributeError as error:\n    print(error)\n"
    assert python(f"{code}assert 'torch' not in sys.modules").endswith("Did you mean 'batchtrim.Trimmer'?")


def test_what_libraries_probe_for_looks_for_no_near_name() -> None:
    probe = "for name in ('__wrapped__', '_ipython_display_'):\n    assert not hasattr(batchtrim, name)\n"
    python(f"import sys, batchtrim\n{probe}assert 'difflib' not in sys.modules")
