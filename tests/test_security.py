"""Untrusted files: nothing in them is run or becomes markup, and no name in them leads out of its folder."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import batchtrim
from batchtrim import Choice, KeepLog, hardest

SOURCES = sorted(Path(batchtrim.__file__).parent.rglob("*.py"))
# pickle and its kin run what a file says; archives write where a file says; yaml's loaders make what a file says
BANNED_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "yaml",
    "tarfile",
    "zipfile",
}
HARMLESS = {"from joblib import cpu_count"}  # reads the machine, no file
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "shutil.unpack_archive"}
NEEDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
# the last name of each call that is looked at; writing out every call as text takes ten times as long
LAST_NAMES = {each.rpartition(".")[2] for each in (*BANNED_CALLS, *NEEDED)} | {"read_pickle", "extractall"}
LAST_NAMES |= {each for each in subprocess.__all__ if callable(getattr(subprocess, each))}

HOSTILE = """<img src=x onerror=alert(1)>"'</script><!--<script>`</title>|\n```\n&"""


def dangers(source: str) -> Iterator[str]:
    """Yield the imports and calls in a source file that could run code from a file it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {each.name}" for each in node.names if each.name.partition(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in BANNED_MODULES and ast.unparse(node) not in HARMLESS:
                yield f"from {node.module} import"
        elif isinstance(node, ast.Call) and LAST_NAMES & {getattr(node.func, "id", ""), getattr(node.func, "attr", "")}:
            name = ast.unparse(node.func)
            if name in BANNED_CALLS or name.endswith((".read_pickle", ".extractall")):
                yield f"{name}()"
            if name.startswith("subprocess.") and any(
                each.arg == "shell" and ast.unparse(each.value) != "False" for each in node.keywords
            ):
                yield f"{name}(shell=True)"
            if name in NEEDED:
                keyword, value = NEEDED[name]
                if not any(each.arg == keyword and ast.unparse(each.value) == str(value) for each in node.keywords):
                    yield f"{name}() without {keyword}={value}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_in_a_file_is_run(path: Path) -> None:
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import tarfile as t",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "archive.extractall(folder)",
        "pd.read_pickle(path)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_test_above_can_fail(source: str) -> None:
    assert len(list(dangers(source))) == 1


class Tags(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def everything_hostile(value: Any) -> Any:
    """The same with hostile text for every string and after every name."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, dict):
        return {name: everything_hostile(each) for name, each in value.items()} | {f"new{HOSTILE}": HOSTILE}
    return [everything_hostile(each) for each in value] if isinstance(value, list) else value


def harmless(page: str, scripts: int) -> bool:
    found = Tags(page)
    marked = {name for name in found.attributes if name.startswith("on")} | ({"img"} & set(found.tags))
    # a comment that opens a script hides the page's own closing tag from a browser
    return not marked and found.tags.count("script") == scripts and "<!--" not in page


def test_the_report_escapes_all_that_a_record_says(tmp_path: Path) -> None:
    report = pytest.importorskip("batchtrim.lab.present.report")
    from lab.conftest import _make_row

    rows = [_make_row(method, seed, 0.1 + seed / 100) for method in ("full", "trim") for seed in range(3)]
    for row in rows:
        row["config"] = everything_hostile(row["config"])
        row["environment"] = everything_hostile(row["environment"])
    page = report.write_report(rows, tmp_path, baseline=rows[0]["config"]["method"]).read_text(encoding="utf-8")
    assert "onerror" in page, "the hostile text got as far as the page"
    assert harmless(page, scripts=1)
    outside = re.sub(r"^```\n.*\n```$", "", (tmp_path / "report.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert "onerror" in outside
    assert not re.search(r"(?<!\\)<[a-zA-Z!/]", outside), "no tag, and no way out of the block of code"


@pytest.mark.parametrize("kind", ["images", "rows"])
def test_the_gallery_escapes_names_texts_and_titles(tmp_path: Path, kind: str) -> None:
    gallery = pytest.importorskip("batchtrim.lab.present.gallery")
    log = KeepLog(6, classes=2, warn=False)
    log.record(Choice(torch.rand(6), hardest()(torch.rand(6), 0.5)), ids=torch.arange(6), labels=torch.arange(6) % 2)
    log.end_epoch()
    shown: Any = {"images": torch.zeros(6, 1, 4, 4, dtype=torch.uint8), "rows": [{HOSTILE: HOSTILE}] * 6}[kind]
    samples = gallery.Samples(
        torch.arange(6) % 2, [HOSTILE, f"b{HOSTILE}"], title=HOSTILE, facts={HOSTILE: HOSTILE}, **{kind: shown}
    )
    page = gallery.write(log, samples, tmp_path / "page.html").read_text(encoding="utf-8")
    assert harmless(page, scripts=2)
    data = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert json.loads(data[0])["classes"][0] == HOSTILE


@pytest.mark.parametrize("key", ["../../x", "/etc/x", "a/b", "..", "a\\b", "", "a b", "x" * 65, 3, None])
def test_a_record_s_key_cannot_name_a_file_outside(tmp_path: Path, key: object) -> None:
    records = pytest.importorskip("batchtrim.lab.records")
    gallery = pytest.importorskip("batchtrim.lab.present.gallery")
    run = tmp_path / "run"
    (run / "keep").mkdir(parents=True)
    KeepLog(3).to_parquet(tmp_path / "x.parquet")
    row = {"schema": 1, "key": key, "config": {"method": "trim"}, "status": "finished", "started": ""}
    (run / "runs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(records.ReplaceRecords, match="expected a run on each line"):
        gallery.build(run)
    assert not (tmp_path / "x.html").exists()


def test_a_key_or_data_set_asked_for_cannot_either(tmp_path: Path, make_run: Path) -> None:
    gallery = pytest.importorskip("batchtrim.lab.present.gallery")
    data = pytest.importorskip("batchtrim.lab.task.data")
    with pytest.raises(ValueError, match=r"expected a run with a keep log, got '../../x'"):
        gallery.build(make_run, key="../../x")
    with pytest.raises(ValueError, match="expected `dataset` to be one of"):
        data.load("../../x", data_dir=tmp_path)


@pytest.fixture
def make_run(tmp_path: Path) -> Path:
    """A folder with one record and its keep log."""
    run = tmp_path / "run"
    (run / "keep").mkdir(parents=True)
    KeepLog(3).to_parquet(run / "keep" / "abc.parquet")
    row = {"schema": 1, "key": "abc", "config": {"method": "trim"}, "status": "finished", "started": ""}
    (run / "runs.jsonl").write_text(json.dumps(row) + "\n")
    return run


def test_a_checkpoint_that_holds_code_is_refused(tmp_path: Path) -> None:
    """``weights_only=True``, which every ``torch.load`` in the package passes, keeps its promise in this torch."""

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"version": Code()}, tmp_path / "trimmer.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        torch.load(tmp_path / "trimmer.pt", weights_only=True)
    assert not (tmp_path / "ran").exists()
