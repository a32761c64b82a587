"""The documentation: its programs run, its commands parse, its names exist, and the site builds without a warning."""

from __future__ import annotations

import ast
import builtins
import csv
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import batchtrim
from browser import find_browser
from tiers import few

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.M | re.S)
COMMAND = re.compile(r"^(?:    )?(?:\.venv/bin/)?batchtrim ([a-z]+\b[^#\n]*)", re.M)
# what a browser fetches by itself, from another host
FETCHED = re.compile(
    r"""<(?:script|img|iframe)\b[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link\b(?=[^>]*\srel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*\shref=["']?(?:https?:)?//"""
    r"""|@import[^;]*//|url\(["']?(?:https?:)?//"""
)
PUBLIC = (
    "batchtrim",
    "batchtrim.compat",
    "batchtrim.errors",
    "batchtrim.testing",
    "batchtrim.integrations",
    "batchtrim.integrations.accelerate",
    "batchtrim.integrations.lightning",
    "batchtrim.integrations.transformers",
    "batchtrim.keeplog",
    "batchtrim.schedules",
    "batchtrim.selection",
)


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced code blocks of a page, without the indentation of a tab or a note."""
    return [
        re.sub(f"(?m)^{indent}", "", code) for indent, language, code in BLOCK.findall(text) if language in languages
    ]


def unknown_names(code: str) -> set[str]:
    """Return the names that a block uses and does not set, and ``...`` where it leaves something out."""
    nodes = list(ast.walk(ast.parse(code)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    used |= {"..." for node in nodes if isinstance(node, ast.Constant) and node.value is ...}
    return used - names_set(code) - set(dir(builtins))


def names_set(code: str) -> set[str]:
    """Return the names that a block binds, in whatever way."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return found


def programs(text: str) -> list[str]:
    """Return the Python blocks that run: those that use no names but their own and those of the programs before them.

    The others show a line to change in a loop of the reader's.
    """
    found, known = [], set()
    for code in blocks(text, "python"):
        if "--8<--" in code:  # a file of examples/, tested there
            continue
        try:
            unknown = unknown_names(code)
        except SyntaxError:  # test_its_code_names_what_there_is fails on it
            continue
        if not unknown - known:
            found.append(code)
            known |= names_set(code)
    return found


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


RUNNABLE = [page for page in PAGES if programs(page.read_text())]


# By default test_own.py runs what the guide to own tasks runs, test_keeplog.py what that to kept samples runs.
LONG = {"docs/guides/your-task.md", "docs/guides/see-what-was-kept.md"}


@pytest.mark.parametrize("page", few(RUNNABLE, [page for page in RUNNABLE if title(page) not in LONG]), ids=title)
def test_its_programs_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number that a page says they print had been wrong since it was written."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    text = page.read_text()
    for code in programs(text):
        exec(compile(code, title(page), "exec"), names)
    printed = re.findall(r"\d+\.\d+$", capsys.readouterr().out, re.M)
    for stated in re.findall(r"\bit prints (\d[\d., and]*\d)", text):
        assert re.findall(r"\d+\.\d+", stated) == printed


def test_programs_are_distinguished_from_fragments() -> None:
    codes = ["model(x)\n", "import math\nx = math.pi\n", "print(x)\n", "...\n"]
    assert programs("".join(f"```python\n{code}```\n" for code in codes)) == codes[1:3]
    counts = {title(page): len(programs(page.read_text())) for page in RUNNABLE}
    expected = {
        "docs/quickstart.md": 2,
        "docs/schedules.md": 2,
        "docs/engines.md": 1,
        "docs/guides/see-what-was-kept.md": 3,
        "docs/guides/your-task.md": 5,
    }
    assert {name: counts.get(name, 0) for name in expected} == expected, (
        "a program has become a fragment, or the reverse"
    )


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_its_code_names_what_there_is(page: Path) -> None:
    text = page.read_text()
    for code in blocks(text, "python"):
        if "--8<--" in code:
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "batchtrim":
                assert hasattr(batchtrim, node.attr), f"batchtrim.{node.attr}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "batchtrim":
                assert_importable(node.module or "", [each.name for each in node.names])
    for code in blocks(text, "diff"):  # excerpts, which need not parse
        lines = "\n".join(line[1:] for line in code.splitlines() if not line.startswith("-"))
        for name in re.findall(r"(?<![\w.])batchtrim\.(\w+)(?! import)", re.sub(r"(?m)^ *(from|import) .*", "", lines)):
            assert hasattr(batchtrim, name) or (ROOT / "src" / "batchtrim" / name).is_dir(), f"batchtrim.{name}"
        for module, names in re.findall(r"(?m)^ *from (batchtrim[\w.]*) import ([\w, ]+)", lines):
            assert_importable(module, [name.split(" as ")[0].strip() for name in names.split(",")])


def assert_importable(module: str, names: list[str]) -> None:
    """Each is a submodule or a public name of the module, which need not be importable here."""
    submodules = ROOT / "src" / module.replace(".", "/")
    for name in names:
        assert (submodules / f"{name}.py").exists() or name in public_names(module), f"{module}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_its_fences_and_toml_are_whole(page: Path) -> None:
    """A fence has its language and no more: text behind it is code that ran into its line."""
    text = page.read_text()
    for line in re.findall(r"(?m)^ *```(.*)$", text):
        assert re.fullmatch(r"\w*( (title|hl_lines|linenums)=.*)?", line), line
    for code in blocks(text, "toml"):
        tomllib.loads(code)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_what_it_installs_is_there(page: Path) -> None:
    """There is no release yet: what an index lacks is installed from a clone."""
    assert not re.findall(r"pip install '?batchtrim.*", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_its_blocks_of_html_stand_on_lines_of_their_own(page: Path) -> None:
    """Markdown beside a tag in one line is shown as it is typed."""
    text = BLOCK.sub("", page.read_text())
    assert not re.findall(r"(?m)^.*\S.*</div>.*$|^.*</div>.*\S.*$|^.*\S *<div markdown>.*$", text)


@pytest.mark.parametrize("page", [page for page in PAGES if COMMAND.search(page.read_text())], ids=title)
def test_its_commands_parse(page: Path) -> None:
    commands = typer_commands()
    for line in COMMAND.findall(page.read_text().replace("\\\n", " ")):
        command, *options = shlex.split(line)
        assert command in commands, line
        commands[command].make_context(command, [option for option in options if option != "--help"])


def typer_commands() -> dict[str, Any]:
    main = pytest.importorskip("typer.main", reason="typer is not installed: make test brings it")
    from batchtrim.lab import cli

    return main.get_command(cli.app).commands  # type: ignore[attr-defined]


def test_every_public_name_has_an_api_entry() -> None:
    shown, elsewhere = set(api_entries()), {f"batchtrim.{name}" for name in public_names("batchtrim")}
    for module in PUBLIC:
        for name in public_names(module):
            assert f"{module}.{name}" in shown or f"batchtrim.{name}" in shown & elsewhere, f"{module}.{name}"


def test_the_api_lists_only_what_is_public() -> None:
    """No helper of an internal module, and nothing that its module does not name in ``__all__``."""
    expected = {f"{module}.{name}" for module in PUBLIC for name in public_names(module)}
    entries = {name for name in api_entries() if not name.startswith("batchtrim.lab.")}  # a program's insides
    assert sorted(entries - expected) == []


def api_entries() -> list[str]:
    """Return the names that have an entry on an API page."""
    return [name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"(?m)^::: ([\w.]+)", page.read_text())]


def public_names(module: str) -> list[str]:
    """Return ``__all__``, read without importing: a trainer need not be installed."""
    path = ROOT / "src" / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    return next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )


def test_public_modules_are_all_here() -> None:
    folder = ROOT / "src" / "batchtrim" / "integrations"
    assert {f"batchtrim.integrations.{path.stem}" for path in folder.glob("[!_]*.py")} <= set(PUBLIC)


def test_every_example_is_shown() -> None:
    text = (DOCS / "examples.md").read_text()
    for path in [*(ROOT / "examples").glob("[0-9]*.py"), *(DOCS / "notebooks").glob("*.ipynb")]:
        assert f"{path.parent.name}/{path.name}" in text


def test_the_golden_numbers_are_those_of_the_tests() -> None:
    text = (DOCS / "schedules.md").read_text()
    with (ROOT / "tests/golden/linear_1.0_0.2.csv").open() as file:
        for row in csv.DictReader(file):
            assert "| " + " | ".join(row.values()) + " |" in text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "forms"), [("trimming", ("", "-narrow")), ("schedules", ("",))])
def test_the_drawings_can_be_drawn(
    name: str, forms: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(DOCS / "drawings")
    paths = importlib.import_module(name).main(tmp_path)
    assert {path.name for path in paths} == {
        f"{name}{form}-{scheme}.svg" for form in forms for scheme in ("light", "dark")
    }
    for path in paths:
        drawn, committed = (
            re.findall(r"<text[^>]*>(.*?)</text>", text.read_text()) for text in (path, DOCS / "drawings" / path.name)
        )
        assert drawn == committed, "draw it again"


def shown(page: str) -> str:
    """Return the text of an HTML page, without code."""
    return re.sub(r"<[^>]+>", " ", re.sub(r"<(pre|code|script|style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL))


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed: make docs brings it")
    # not --quiet, under which mkdocs does not count warnings
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]:
        assert not FETCHED.findall(page.read_text()), page.name
        assert not re.findall(r"\*\*\[|\]\(|```", shown(page.read_text())), f"Markdown as it is typed: {page.name}"
    options = (tmp_path / "command-line.html").read_text()
    assert re.search(r'<code>batchtrim <span class="option">--install-completion</span></code>', options)
    assert not re.search(r"<code>[^<]*--[a-z]", options), "an option that breaks after its dashes"
    notebook = (tmp_path / "notebooks" / "first-steps.html").read_text()
    assert "of the backward samples" in notebook, "what the notebook prints"
    command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", (tmp_path / "index.html").as_uri() + "?q=superquantile"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search(r"\d+ matching documents", found), "search in a site opened as a folder"
