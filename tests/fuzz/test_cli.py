"""Arbitrary words and files: the command line ends with a known code and a sentence, never with a traceback."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from batchtrim.lab import cli
from batchtrim.lab import options as lab_options
from batchtrim.lab.execute import scheduler
from batchtrim.lab.execute.grid import expand
from batchtrim.lab.terminal import FAILED, MISTAKE
from lab.conftest import _make_row

pytestmark = pytest.mark.slow
FUZZ = settings.get_profile("fuzz")

WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["0", "-1", "0.5", "1e400", "nan", "inf", ",", "1,2", "trim", "full,full", "none", "auto", "digits"]
    ),
    st.sampled_from(
        ["symmetric:0.1", "symmetric:x", "human:worst", "small_loss.noise_rate=0.1", "a.b=", "../..", "\0"]
    ),
)
OPTIONS = sorted(f"--{name.replace('_', '-')}" for name in lab_options.NAMES)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
)


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "run_all", lambda configs, shared, watcher, **_: [])
    monkeypatch.delenv("BATCHTRIM_DATA", raising=False)


def ends_well(*words: str) -> None:
    done = CliRunner().invoke(cli.app, list(words))
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code in (0, FAILED, MISTAKE), done.output
    assert "Traceback" not in done.output
    if done.exit_code == MISTAKE:
        assert done.stderr.strip()


def changed(draw: st.DrawFn, value: Any) -> Any:
    """``value`` with something in it, at any depth, dropped or put in place of something else."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 4)):
        value = copy.copy(value)
        place = (
            draw(st.sampled_from(sorted(value))) if isinstance(value, dict) else draw(st.integers(0, len(value) - 1))
        )
        if draw(st.integers(0, 5)):
            value[place] = changed(draw, value[place])
        else:
            del value[place]
        return value
    return draw(VALUES)


@settings(FUZZ)
@given(
    st.sampled_from(["compare", "sweep", "train", "demo", "report", "show", "methods"]),
    st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS), max_size=4),
    st.lists(WORDS, max_size=1),
)
def test_options(command: str, options: list[tuple[str, str]], more: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = ["--out", folder] if command not in ("methods", "report", "show") else []
        ends_well(command, *out, *(word for option in options for word in option), *more)


@settings(FUZZ)
@given(st.data())
def test_grid_files(data: st.DataObject) -> None:
    names = [*lab_options.MANY, *lab_options.NAMES, "params", "epoch"]
    settings_ = data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.toml"
        text = data.draw(
            st.one_of(
                st.binary(max_size=40),
                st.just("\n".join(f"{name} = {json.dumps(value)}" for name, value in settings_.items()).encode()),
            )
        )
        grid.write_bytes(text)
        ends_well("compare", "--out", folder, str(grid))
    with contextlib.suppress(ValueError, TypeError):
        expand(settings_)


@settings(FUZZ)
@given(st.data())
def test_records(data: st.DataObject) -> None:
    rows = [_make_row(method, seed, 0.1 + seed / 100) for method in ("full", "trim") for seed in range(2)]
    rows[0] = changed(data.draw, rows[0])
    with tempfile.TemporaryDirectory() as folder:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        extra = data.draw(st.one_of(st.just(b""), st.binary(max_size=30)))
        (Path(folder) / "runs.jsonl").write_bytes(text + extra + b"\n" * data.draw(st.integers(0, 1)))
        ends_well("report", folder)
        ends_well("report", folder, "--json", "--baseline", data.draw(WORDS))


@settings(FUZZ)
@given(st.data())
def test_keep_logs(data: st.DataObject) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    from batchtrim import KeepLog

    row = _make_row("trim")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keep" / f"{row['key']}.parquet"
        path.parent.mkdir()
        KeepLog(data.draw(st.sampled_from([3, 1198])), classes=10).to_parquet(path)
        table = parquet.read_table(path)
        known = changed(data.draw, json.loads(table.schema.metadata[b"batchtrim"]))
        name = data.draw(st.sampled_from(table.column_names))
        if data.draw(st.booleans()):
            table = table.drop_columns([name])
        else:
            kind = data.draw(st.sampled_from([pyarrow.string(), pyarrow.float64(), pyarrow.int8(), pyarrow.null()]))
            empty = kind == pyarrow.null() or data.draw(st.booleans())
            column = pyarrow.nulls(len(table), kind) if empty else table[name].cast(kind, safe=False)
            table = table.set_column(table.column_names.index(name), name, column)
        parquet.write_table(table.replace_schema_metadata({"batchtrim": json.dumps(known)}), path)
        if not data.draw(st.integers(0, 3)):
            whole = bytearray(path.read_bytes())
            whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
            path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        row["config"] = changed(data.draw, row["config"]) if data.draw(st.booleans()) else row["config"]
        (Path(folder) / "runs.jsonl").write_text(json.dumps(row) + "\n")
        ends_well("show", folder)
