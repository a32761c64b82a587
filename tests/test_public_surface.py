"""What `import batchtrim` is: sorted, complete, and torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

import batchtrim

OPTIONAL = (
    "lightning", "lightning_fabric", "pytorch_lightning", "transformers", "accelerate", "datasets", "ray", "sklearn",
    "scipy", "matplotlib", "rich", "typer", "pandas", "pyarrow", "tensorboard",
)  # fmt: skip


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def brought_in(code: str) -> set[str]:
    """Optional libraries that are loaded after ``code`` and were not after ``import torch``."""
    listing = "sorted({name.partition('.')[0] for name in sys.modules})"
    out = python(f"import sys, torch; before = set({listing}); {code}; print(*(set({listing}) - before))")
    return set(out.split()) & set(OPTIONAL)


def test_importing_brings_in_nothing_optional() -> None:
    assert brought_in("import batchtrim, batchtrim.testing") == set()


def test_the_test_above_can_fail() -> None:
    assert "scipy" in brought_in("import batchtrim, scipy.special")


def test_all_is_sorted_and_complete() -> None:
    assert batchtrim.__all__ == sorted(batchtrim.__all__)
    for name in batchtrim.__all__:
        assert getattr(batchtrim, name).__doc__, f"{name} has no docstring"


@pytest.mark.slow
def test_import_adds_at_most_50_ms_to_torch() -> None:
    code = "import time, torch; start = time.perf_counter(); import batchtrim; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(4)) <= 0.050  # the least: other work on the machine only adds
