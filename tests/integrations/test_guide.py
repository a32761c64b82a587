"""docs/guides/trainers.md: its diffs are at most four lines, and applied, they give the examples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "trainers.md").read_text()
SECTIONS = {
    "Plain PyTorch": 1, "DDP": 1, "FSDP2": 1, "GradScaler and bf16": 1, "Accumulation": 1, "torch.compile": 1,
    "Lightning": 1, "Hugging Face Trainer": 2, "Accelerate": 1,
}  # fmt: skip


def diffs() -> list[tuple[str, str, list[str]]]:
    """Section, example named last before the diff, its lines."""
    found = []
    for section in re.split(r"^## ", GUIDE, flags=re.MULTILINE)[1:]:
        for match in re.finditer(r"^```diff\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
            example = re.findall(r"`examples/(\w+)\.py`", section[: match.start()])[-1]
            found.append((section.splitlines()[0], example, match[1].splitlines()))
    return found


def code(line: str) -> str:
    return line.partition("  # ")[0].rstrip()


def test_every_trainer_has_its_section_and_diff() -> None:
    sections = [section for section, _, _ in diffs()]
    assert {name: sections.count(name) for name in sections} == SECTIONS


@pytest.mark.parametrize(("section", "example", "lines"), diffs(), ids=[example for _, example, _ in diffs()])
def test_each_diff_leads_to_its_example(section: str, example: str, lines: list[str]) -> None:
    assert all(not line or line[0] in "+- " for line in lines)
    added, removed = ([line[1:] for line in lines if line.startswith(sign)] for sign in "+-")
    assert 1 <= len(added) <= 4, "lines to change"
    assert len(removed) <= 4
    program = [code(line) for line in (ROOT / "examples" / f"{example}.py").read_text().splitlines()]
    rest = iter(program)
    for line in lines:
        if line[1:].strip() and line[0] in "+ ":
            assert line[1:].rstrip() in rest, f"not in {example}.py, or not in this order: {line}"
    assert not {line for line in removed if line.rstrip() in program}


def test_the_examples_named_exist_and_none_is_left_out() -> None:
    named = set(re.findall(r"`?examples/(\w+)\.py`?", GUIDE))
    here = {path.stem for path in (ROOT / "examples").glob("[0-9]*.py")}
    assert named <= here
    assert {f"{number:02}" for number in range(1, 11)} <= {name[:2] for name in named}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "src" / "batchtrim" / "integrations").glob("*.py")), ids=lambda p: p.stem
)
def test_a_shim_is_thin(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 200
