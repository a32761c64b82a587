"""Inputs found by fuzzing (tests/fuzz) that once broke out of the documented errors."""

from __future__ import annotations

import re
from functools import partial
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


@pytest.mark.parametrize("value", ["8", None, [8], 8.0, True, -1, float("nan"), 10**400, torch.rand(2), int])
def test_an_invalid_count_of_samples(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^expected `n` .*, got .*It is the number of samples"):
        batchtrim.keep_count(0.5, value)


@pytest.mark.parametrize("value", [8, torch.tensor(8)])
def test_a_count_of_samples_in_another_form(value: Any) -> None:
    assert batchtrim.keep_count(0.5, value) == 4


SCHEDULES = [
    linear(),
    batchtrim.cosine(),
    batchtrim.constant(0.5),
    batchtrim.piecewise({0.0: 1.0, 1.0: 0.2}),
    batchtrim.by_accuracy(),
    batchtrim.schedules.step({0.5: 0.5}),
    join([batchtrim.constant(1.0), linear()], at=[0.5]),
]


@pytest.mark.parametrize("value", ["0.5", None, [0.5], 1.5, -0.1, float("nan"), float("inf"), 50, 1j, torch.rand(2)])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: type(each).__name__)
def test_a_schedule_called_with_something_other_than_progress(schedule: Any, value: Any) -> None:
    """Beyond 1 a straight line went on below 0."""
    with pytest.raises((TypeError, ValueError), match=r"^expected `(progress|accuracy)` .*, got "):
        schedule(value)


RULES = [
    hardest(),
    batchtrim.easiest(),
    batchtrim.between(0.1),
    batchtrim.uniform(),
    batchtrim.superquantile(),
    batchtrim.loss_mass(),
    batchtrim.selection.above(1.0),
    percentile(),
    percentile_topk(),
]


@pytest.mark.parametrize("losses", [None, 0.5, [0.5, 1.0], "losses", torch.rand(6, 2), torch.tensor(1.0)])
@pytest.mark.parametrize("rule", RULES, ids=lambda each: type(each).__name__)
def test_a_rule_called_with_something_other_than_a_vector(rule: Any, losses: Any) -> None:
    """Of rows, hardest() returned indices of two dimensions."""
    with pytest.raises((TypeError, ValueError), match=r"^expected `losses` .*, got "):
        rule(losses, 0.2)


@pytest.mark.parametrize("keep", ["0.2", None, 50.0, -1.0, float("nan")])
@pytest.mark.parametrize("rule", [*RULES[:6], RULES[8]], ids=lambda each: type(each).__name__)
def test_a_rule_called_with_something_other_than_a_fraction(rule: Any, keep: Any) -> None:
    """superquantile and loss_mass kept everything at 50, one sample at -1."""
    with pytest.raises((TypeError, ValueError), match=r"^expected `keep` .*, got "):
        rule(torch.rand(8), keep)


@pytest.mark.parametrize("rule", [batchtrim.uniform(), percentile(), percentile_topk()])
def test_a_seed_is_not_a_generator(rule: Any) -> None:
    with pytest.raises(TypeError, match=r"expected `generator` to be a torch\.Generator, got 5\. .*manual_seed"):
        rule(torch.rand(8), 0.5, 5)


@pytest.mark.parametrize("losses", [torch.rand(3), torch.rand(5), torch.rand(4, 2), [0.1] * 4])
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_losses_that_a_selection_was_not_made_from(losses: Any, keep: float) -> None:
    """With all kept, the mean of any losses came out."""
    with pytest.raises(ValueError, match=r"expected `losses` of shape \(4,\), which the selection was made from, got"):
        batchtrim.reduce(losses, hardest()(LOSSES, keep))


@pytest.mark.parametrize("weights", [torch.rand(5), torch.rand(4, 1), 2.0])
def test_weights_that_are_not_those_of_the_losses(weights: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="expected `weights` to"):
        batchtrim.reduce(LOSSES, WHOLE, weights=weights)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batchtrim.focal(LOSSES, float("nan")), "`gamma` to be at least 0, got nan"),
        (lambda: batchtrim.superloss(LOSSES, tau=torch.rand(3)), r"`tau` to be a number or of the shape .*\(4,\), got"),
        (lambda: batchtrim.superloss(LOSSES, tau=torch.rand(4, 1)), "`tau` to be a number or of the shape"),
        (lambda: batchtrim.superloss(LOSSES, tau=float("nan")), "`tau` to be a number to compare losses"),
        (lambda: tokens(ignore_index="-100"), "`ignore_index` to be an int, got '-100'"),
        (lambda: tokens(ignore_index=1.5), "`ignore_index` to be an int, got 1.5"),
        (lambda: tokens(shift="no"), "`shift` to be True or False, got 'no'"),
    ],
)
def test_settings_of_losses(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^expected {message}"):
        call()


def tokens(**given: Any) -> Any:
    return batchtrim.token_losses(torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), **given)


class OwnLoss(torch.nn.Module):
    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).square().mean(1)


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        (torch.nn.CrossEntropyLoss, "CrossEntropyLoss. Give an instance: nn.CrossEntropyLoss()."),
        (torch.nn.MSELoss, "MSELoss. Give an instance: nn.MSELoss()."),
        (OwnLoss, "OwnLoss. Give an instance: OwnLoss()."),
        (partial(torch.nn.CrossEntropyLoss, label_smoothing=0.1), "CrossEntropyLoss. .* nn.CrossEntropyLoss(...)."),
        (int, "int. Give an instance"),
    ],
)
@pytest.mark.parametrize("name", ["criterion", "per_sample_loss", "rank_by"])
def test_the_class_of_a_loss_is_not_a_loss(name: str, given: Any, cure: str) -> None:
    """It was taken, and the first batch failed in torch."""
    makes = {
        "criterion": lambda: batchtrim.per_sample(given),
        "per_sample_loss": lambda: batchtrim.TrimmedForward(torch.nn.Linear(2, 2), given, Trimmer(0.5)),
        "rank_by": lambda: batchtrim.TrimmedForward(torch.nn.Linear(2, 2), OwnLoss(), Trimmer(0.5), rank_by=given),
    }
    words = re.escape(cure).replace(r"\.\*", ".*")
    with pytest.raises(TypeError, match=f"expected `{name}` to be a loss to call on a batch, got the class {words}"):
        makes[name]()


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


def test_a_refused_step_does_not_count() -> None:
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
def test_a_keep_log_checks_the_tensors_beside_the_losses(given: dict[str, Any], message: str) -> None:
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
def test_label_noise_that_is_not_a_string(value: Any) -> None:
    conditions = pytest.importorskip("batchtrim.lab.task.conditions")
    with pytest.raises(ValueError, match="expected `label_noise` to be none"):
        conditions.parse_label_noise(value)


@pytest.mark.parametrize("damage", ["text", "cut", "other"])
def test_something_that_is_not_a_keep_log(tmp_path: Path, damage: str) -> None:
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
def test_a_file_that_is_not_a_checkpoint_is_named(tmp_path: Path, damage: Any) -> None:
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
