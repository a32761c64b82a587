"""The page on the command line names every option with what its help says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from batchtrim.lab import cli, files, options, own
from batchtrim.lab.execute import grid
from batchtrim.lab.task import own_code

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
COMMANDS: Any = typer.main.get_command(cli.app)
REFERENCE = "compare"  # sweep, train and demo have its options, with presets that the page tells in words


def row(option: Any) -> str:
    meaning, default = option.help, ""
    if meaning.endswith("]"):
        meaning, _, default = meaning.removesuffix("]").rpartition(" [")
    return f"| {', '.join(f'`{name}`' for name in option.opts)} | {meaning} | {default} |"


@pytest.mark.parametrize("command", [REFERENCE, "report", "claims", "show", "methods"])
def test_every_option_is_on_the_page(command: str) -> None:
    options = [each for each in COMMANDS.commands[command].params if each.param_type_name == "option"]
    assert options
    missing = [line for line in map(row, options) if line not in PAGE.splitlines()]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize(("command", "own"), [("sweep", set()), ("train", {"method", "seed"}), ("demo", set())])
def test_the_other_commands_have_no_option_beside(command: str, own: set[str]) -> None:
    known = {each.name for each in COMMANDS.commands[REFERENCE].params}
    assert {each.name for each in COMMANDS.commands[command].params} - known == own


def test_presets_of_a_sweep_are_documented() -> None:
    for values in cli.SWEEP.values():
        if isinstance(values, list):
            assert f"`{','.join(map(str, values))}`" in PAGE or ", ".join(f"`{each}`" for each in values) in PAGE


def test_the_comparison_of_the_readme_is_the_recorded_one() -> None:
    """It lacked the width: its plain training came out three points better than the row it was said to give."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"batchtrim compare (--dataset fashion_mnist[^#]*)#", text)
    assert command is not None
    words = shlex.split(command[1].replace("\\\n", " "))
    given = COMMANDS.commands["compare"].make_context("compare", words).params
    record = files.load_toml(ROOT / "records" / "2026-11-24-fashion-mnist" / "config.toml")
    typed = {config.key for config in grid.expand({**cli.COMPARE, **options.read_settings(given)})}
    assert len(typed) == 15
    assert typed <= {config.key for config in grid.expand(record)}


def test_pages_show_the_folders_that_their_commands_write_to() -> None:
    """An example named a folder with the suffix of its file, which the command leaves out."""
    count = 0
    for path in (*(ROOT / "examples").glob("*.py"), *(ROOT / "docs" / "guides").glob("*.md"), ROOT / "README.md"):
        text = path.read_text(encoding="utf-8")
        for words, folder in re.findall(r"batchtrim (compare --task .*)\n\s*batchtrim show (\S+)", text):
            given = COMMANDS.commands["compare"].make_context("compare", shlex.split(words)[1:]).params
            settings = options.read_settings(given)
            code = own_code.Code.in_file(str(ROOT / settings.pop("task")), "task")
            assert own.default_out(grid.expand_task(code, settings)) == Path(folder), path
            count += 1
    assert count >= 2


def test_the_first_lines_of_the_readme_count_its_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = re.search(
        r"on (\d+) problems, it lowered the test\s+error on (\d+), made .* on (\d+), and raised it on (\d+)\b", text
    )
    assert told is not None
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and " % error" not in line]
    head = next(row for row in rows if row[0] == "| problem")
    column = head.index("`trim`, points")
    cells = [row[column] for row in rows[rows.index(head) + 1 :] if len(row) == len(head) and "|---" not in row[0]]
    ends = [re.search(r"\((\S+) to (\S+);", cell.replace("\N{MINUS SIGN}", "-")) for cell in cells]
    pairs = [(float(each[1]), float(each[2])) for each in ends if each is not None]
    lower, higher = sum(high < 0 for _, high in pairs), sum(low > 0 for low, _ in pairs)
    assert tuple(map(int, told.groups())) == (len(pairs), lower, len(pairs) - lower - higher, higher)
