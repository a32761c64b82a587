"""Inputs found by fuzzing (tests/fuzz) that once broke out of the documented errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import batchtrim
from batchtrim import Choice, KeepLog, Trimmer, hardest, linear, percentile, percentile_topk, suspects
from batchtrim.schedules import join

HUGE = 10**400


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(HUGE), "expected `start` below 1e308"),
        (lambda: Trimmer(total=HUGE), "expected `total` to fit in 64 bits"),
        (lambda: KeepLog(HUGE), "expected `n` to fit in 64 bits"),
        (lambda: join(0.5, [0.5]), "expected `schedules` to be a list, got 0.5"),  # type: ignore[arg-type]
        (lambda: join([0.5, 0.4], at=0.5), "expected `at` to be a list, got 0.5"),  # type: ignore[arg-type]
        (lambda: batchtrim.superloss(torch.rand(2), tau=None), "expected `tau` to be a number"),  # type: ignore[arg-type]
    ],
)
def test_wrong_numbers_and_lists_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


STEP = batchtrim.TrimmedForward(torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss(), Trimmer(0.5))
LOSSES, WHOLE = torch.rand(4), hardest()(torch.rand(4), 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: suspects("keep.parquet"), TypeError, "`log` to be a batchtrim.KeepLog, got 'keep.parquet'"),  # type: ignore[arg-type]
        (lambda: suspects(LOSSES), TypeError, "got a tensor of shape"),  # type: ignore[arg-type]
        (lambda: batchtrim.reduce(LOSSES, [0, 1]), TypeError, "`selection` to be a batchtrim.Selection, got"),  # type: ignore[arg-type]
        (
            lambda: batchtrim.reduce(LOSSES, WHOLE, "mean"),
            ValueError,
            "`scale` to be one of 'kept', 'batch', got 'mean'",
        ),
        (lambda: batchtrim.reduce(LOSSES, WHOLE, scale="Batch"), ValueError, "Did you mean 'batch'"),
        (lambda: batchtrim.keep_count(20, 128), ValueError, "`keep` in .* got 20. It is a fraction"),
        (lambda: batchtrim.keep_count(float("nan"), 8), ValueError, "`keep` in .* got nan"),
        (lambda: batchtrim.keep_count("0.2", 8), TypeError, "`keep` to be a number, got '0.2'"),  # type: ignore[arg-type]
        (lambda: hardest()(LOSSES, 50.0), ValueError, "`keep` in .* got 50"),
        (
            lambda: batchtrim.token_losses(torch.ones(2, 3), torch.ones(2, 3)),
            TypeError,
            r"`logits` .* \(B, T, C\), got",
        ),
        (lambda: batchtrim.token_losses(None, None), TypeError, "`logits` .* got None"),  # type: ignore[arg-type]
        (
            lambda: batchtrim.token_losses(torch.rand(2, 4, 5), torch.zeros(2, 3, dtype=torch.long)),
            TypeError,
            r"`labels` to be token ids of shape \(2, 4\), got .*shift=True",
        ),
        (lambda: batchtrim.token_losses(torch.rand(2, 4, 5), torch.rand(2, 4)), TypeError, "`labels` to be token ids"),
        (lambda: next(batchtrim.accumulate(STEP, iter([]))), TypeError, "`batches` to be a list .*Make a list"),  # type: ignore[arg-type]
        (lambda: next(batchtrim.accumulate(STEP, 4)), TypeError, "`batches` to be a list .*got 4"),  # type: ignore[arg-type]
        (lambda: next(batchtrim.accumulate(STEP, "ab")), TypeError, "`batches` to be a list .*got 'ab'"),  # type: ignore[arg-type]
        (lambda: next(batchtrim.accumulate(STEP, [torch.rand(2, 2)])), TypeError, "each of `batches` .*got a tensor"),  # type: ignore[list-item]
        (lambda: KeepLog(3).merge(None), TypeError, "`later` to be a batchtrim.KeepLog, got None"),  # type: ignore[arg-type]
        (lambda: next(batchtrim.accumulate(torch.nn.Linear(2, 2), [(1, 2)])), TypeError, "`step` to be a .*got Linear"),  # type: ignore[arg-type]
    ],
)
def test_another_kind_of_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"expected {message}" if message.startswith(("`", "each")) else message):
        call()


def test_a_tiny_keep_draws_the_hardest() -> None:
    losses = torch.tensor([1.0, 3.0, 2.0])
    assert percentile_topk()(losses, 5e-324, torch.Generator().manual_seed(0)).indices.tolist() == [1]


@pytest.mark.parametrize("value", [{}, -1, float("nan"), float("inf"), "2", None])
@pytest.mark.parametrize("name", ["version", "steps", "total", "accuracy", "generator", "stats"])
def test_a_state_that_is_not_one_leaves_the_trimmer_as_it_was(name: str, value: Any) -> None:
    trim = Trimmer(total=5)
    trim.step(2)
    trim(torch.tensor([1.0, 2.0]))
    before = trim.stats.compute()
    for state in ({**trim.state_dict(), name: value}, {k: v for k, v in trim.state_dict().items() if k != name}):
        with pytest.raises((ValueError, TypeError), match=r"^expected "):
            trim.load_state_dict(state)
    assert trim.steps == 2
    assert trim.stats.compute() == before


def test_a_step_that_is_refused_is_no_step() -> None:
    trim = Trimmer(linear(1.0, 0.5), total=2)
    with pytest.raises(ValueError, match="expected `accuracy` in"):
        trim.step(accuracy=2.0)
    assert (trim.steps, trim.keep) == (0, 1.0)


def test_a_state_of_another_rule_is_refused() -> None:
    plain, drawing = Trimmer(0.5), Trimmer(0.5, select=percentile())
    for trim, other in ((plain, drawing), (drawing, plain)):
        with pytest.raises(ValueError, match="got one of a trimmer with another rule"):
            trim.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": torch.ones(3, dtype=torch.int64)}, "expected `mask` to have dtype torch.bool"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"expected `mask` to have the shape of `losses`, \(3,\)"),
        ({"outputs": torch.rand(3)}, r"expected `outputs` to have shape \(3, C\), got \(3,\)"),
        ({"outputs": torch.rand(2, 4)}, r"expected `outputs` to have shape \(3, C\), got \(2, 4\)"),
        ({"outputs": torch.rand(3, 0)}, r"expected `outputs` to have shape \(3, C\), got \(3, 0\)"),
        ({"outputs": torch.ones(3, 2, dtype=torch.int64)}, "expected `outputs` to be floating point"),
    ],
)
def test_a_keep_log_checks_what_travels_beside_the_losses(given: dict[str, Any], message: str) -> None:
    losses = torch.rand(3)
    beside = dict(given)
    last = Choice(losses, hardest()(losses, 0.5), beside.pop("mask", None))
    with pytest.raises((ValueError, TypeError), match=message):
        KeepLog(3).record(last, ids=torch.arange(3), **beside)


def test_suspects_of_losses_that_are_not_finite_have_scores() -> None:
    log = KeepLog(4)
    losses = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0])
    log.record(Choice(losses, hardest()(losses, 0.5)), ids=torch.arange(4))
    ids, scores = suspects(log)
    assert sorted(ids.tolist()) == [0, 1, 2, 3]
    assert bool(((scores >= 0) & (scores <= 1)).all())


@pytest.mark.parametrize("value", [None, 5, 0.1, ["none"]])
def test_label_noise_that_is_no_text(value: Any) -> None:
    conditions = pytest.importorskip("batchtrim.lab.task.conditions")
    with pytest.raises(ValueError, match="expected `label_noise` to be none"):
        conditions.parse_label_noise(value)


@pytest.mark.parametrize("damage", ["text", "cut", "other"])
def test_a_keep_log_that_is_none(tmp_path: Path, damage: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "log.parquet"
    KeepLog(3).to_parquet(path)
    if damage == "other":
        parquet.write_table(parquet.read_table(path).select(["id"]), path)
    else:
        path.write_bytes(b"no parquet" if damage == "text" else path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"expected a file that KeepLog.to_parquet wrote, got '.*log.parquet'"):
        KeepLog.from_parquet(path)


@pytest.mark.parametrize("damage", [b"", b"no checkpoint", "cut", "other"])
def test_a_checkpoint_that_is_none_is_named(tmp_path: Path, damage: Any) -> None:
    checkpoint = pytest.importorskip("batchtrim.lab.run.checkpoint")
    path = tmp_path / "abc.pt"
    trim = Trimmer(total=3)
    checkpoint.save({"model": torch.rand(9)} if damage == "other" else trim.state_dict(), path)
    if damage != "other":
        path.write_bytes(path.read_bytes()[:200] if damage == "cut" else damage)

    class Run:
        def load_state_dict(self, state: dict[str, Any]) -> None:
            torch.nn.Linear(2, 2).load_state_dict(state["model"])

    with pytest.raises(OSError, match=r"expected a checkpoint of this run in .*abc.pt, got a file that does not fit"):
        checkpoint.load(Run(), path)
