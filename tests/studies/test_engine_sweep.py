"""The sweep over transformers' classes: its counts, resuming it, and a part of the sweep itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from batchtrim.testing import EngineReport
from studies import engine_sweep as sweep
from tiers import in_part

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    sweep.quiet()


def test_every_dropout_is_set_in_the_parts_too() -> None:
    config = sweep.tiny_config("clip", 5)
    for on in (True, False):
        sweep.with_dropout(config, on)
        assert config.vision_config.attention_dropout == (0.1 if on else 0.0)
        assert config.text_config.attention_dropout == (0.1 if on else 0.0)


@pytest.mark.slow
def test_every_architecture_comes_first_by_every_engine_with_dropout() -> None:
    tasks = ["ForCausalLM", "ForMaskedLM"]
    found = [case[2:] for case in sweep.cases(tasks, ["gpt2", "bert"], ["two_pass", "exact"])]
    expected = [
        (name, on, engine)
        for on in (True, False)
        for names in (("BertLMHeadModel", "GPT2LMHeadModel"), ("BertForMaskedLM",))
        for name in names
        for engine in ("two_pass", "exact")
    ]
    assert found == expected
    first = [case[2:] for case in sweep.cases(tasks, ["gpt2", "bert"], ["two_pass", "exact"], every=False)]
    assert first == expected[:4]
    assert len({case[2] for case in sweep.cases([], [], ["exact"])}) >= 300


def row(verdict: str, model: str = "A", **given: Any) -> sweep.CheckResult:
    return sweep.CheckResult(
        **{"task": "t", "kind": "a", "model": model, "dropout": True, "engine": "shared"} | given | {"verdict": verdict}
    )


def test_the_table_counts_and_gives_reasons() -> None:
    rows = [
        row("right", error=2e-7),
        row("right", "B", error=3e-6),
        row("refused", "C", reason="it | mixes"),
        row("not run", "D", reason="no"),
        row("wrong", "E", dropout=False),
    ]
    lines = sweep.table(rows).splitlines()
    assert lines[0] == "4 model classes."
    assert "| shared | on | t | 2 | 0 | 1 | 0 | 1 | 3e-06 |" in lines
    assert "| shared | off | all | 0 | 0 | 0 | 1 | 0 | 0e+00 |" in lines
    assert "| shared | on | C | it / mixes |" in lines
    assert lines.index("## Wrong") < lines.index("## Refused")


def test_two_model_types_of_one_class_are_two_cases() -> None:
    assert row("right").key != row("right", kind="b").key


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def judged(task: Any, kind: str, name: str, dropout: bool, engine: str, seconds: int) -> sweep.CheckResult:
        asked.append((name, dropout))
        return sweep.CheckResult(task.family, kind, name, dropout, engine, "wrong" if dropout else "right")

    monkeypatch.setattr(sweep, "judged", judged)
    arguments = ["--out", str(tmp_path), "--engines", "shared", "--tasks", "ForCausalLM", "--only", "gpt2", "bert"]
    assert sweep.main([*arguments, "--part", "1/2"]) == 1
    assert sweep.main([*arguments, "--part", "2/2"]) == 1
    assert sorted(asked) == sorted((n, on) for n in ("GPT2LMHeadModel", "BertLMHeadModel") for on in (True, False))
    results = tmp_path / "results.jsonl"
    with results.open("a") as file:
        file.write(json.dumps(asdict(row("right")))[:20])  # a process was stopped in a line
    assert sweep.main(arguments) == 1
    assert sweep.main([*arguments, "--table"]) == 1
    assert len(asked) == 4
    assert "| shared | off | all | 2 |" in (tmp_path / "table.md").read_text()


def test_a_model_that_does_not_train_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "make", lambda *_: (nn.Linear(2, 2), [({"input": torch.ones(2, 3)}, None)] * 3))
    found = sweep.judged(sweep.TASKS[0], "a", "A", True, "exact")
    assert found.verdict == "not run"
    assert "RuntimeError: mat1 and mat2" in found.reason


def test_a_wrong_engine_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    report = EngineReport("shared", gradient_error=0.5, steps=6)
    monkeypatch.setattr(sweep, "check_engine", lambda *_, **__: report)
    found = sweep.judged(
        next(t for t in sweep.TASKS if t.family == "ForCausalLM"), "gpt2", "GPT2LMHeadModel", True, "shared"
    )
    assert found.verdict == "wrong"
    assert found.error == 0.5
    assert "NOT THE SAME" in found.reason


PART = {
    "ForSequenceClassification": ["bert", "funnel"],
    "ForImageClassification": ["vit", "resnet"],
    "ForAudioClassification": ["wav2vec2"],
    "ForCausalLM": ["gpt2", "mixtral"],
    "ForSeq2SeqLM": ["t5"],
}
ENGINES = ["exact", "shared", "two_pass"]
CASES = [case for task, kinds in PART.items() for case in sweep.cases([task], kinds, ENGINES)]
CASES = [case for case in CASES if case[4] != "exact" or not case[3]]  # exact against itself: once a model


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "case", in_part(CASES), ids=lambda case: f"{case[2]}-{'drop' if case[3] else 'plain'}-{case[4]}"
)
def test_no_engine_is_wrong(case: Any) -> None:
    task, kind, name, dropout, engine = case
    found = sweep.judged(task, kind, name, dropout, engine, seconds=400)
    assert found.verdict not in ("wrong", "not run"), found
    if engine == "exact":
        assert found.verdict == "right"
    first = dropout and kind == PART[task.family][0]
    if engine == "shared" and (found.verdict != "right" or first):  # elsewhere auto runs shared
        auto = sweep.judged(task, kind, name, dropout, "auto", seconds=400)
        assert auto.verdict not in ("wrong", "not run"), auto
