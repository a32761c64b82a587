"""The trimmer as a person uses it: golden values, the clock, resuming, and every way to pass it losses."""

from __future__ import annotations

import copy
import csv
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchtrim
from batchtrim import Losses, Trimmer, linear
from batchtrim.errors import ClockPastTotal, PassUnreducedLosses, ScheduleOutOfRange

GOLDEN = list(csv.DictReader((Path(__file__).parent / "golden" / "linear_1.0_0.2.csv").read_text().splitlines()))
LOSSES = torch.tensor([0.5, 3.0, 1.0, 0.1, 2.0])


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"B{row['batch']}-epoch{row['epoch']}of{row['epochs']}")
def test_keep_k_and_loss_are_the_golden_ones(row: dict[str, str]) -> None:
    trim = Trimmer(total=int(row["epochs"]))
    trim.step(int(row["epoch"]))
    losses = torch.rand(int(row["batch"]), dtype=torch.float64)
    loss = trim(losses)
    assert trim.keep == pytest.approx(float(row["keep"]), abs=1e-12)
    assert trim.last_selection.k == int(row["k"])
    assert float(loss) == pytest.approx(float(losses.topk(int(row["k"])).values.mean()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 5, 128, 3000])
def test_keep_one_is_the_plain_mean_bit_for_bit(n: int, dtype: torch.dtype) -> None:
    losses = torch.rand(n).to(dtype).requires_grad_()
    plain = losses.detach().clone().requires_grad_()
    ours, theirs = Trimmer(1.0)(losses), plain.mean()
    ours.backward()
    theirs.backward()
    assert torch.equal(ours, theirs)
    assert torch.equal(losses.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", ["kept", "batch"])
def test_loss_and_gradient_are_those_of_the_kept_samples(dtype: torch.dtype, scale: str) -> None:
    losses = LOSSES.to(dtype, copy=True).requires_grad_()
    loss = Trimmer(0.6, scale=scale)(losses)
    loss.backward()
    share = 1 / 3 if scale == "kept" else 1 / 5
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype in (torch.float16, torch.bfloat16) else {}
    torch.testing.assert_close(
        loss.detach().double(), torch.tensor(6.0 * share).double(), **tolerance, check_dtype=False
    )
    expected = torch.tensor([0, share, share, 0, share]).to(dtype)
    torch.testing.assert_close(losses.grad, expected, **tolerance)
    assert loss.dtype == dtype


def test_dropped_infinities_and_kept_nan() -> None:
    low = torch.tensor([float("-inf"), 1.0, 2.0, 3.0])
    assert float(Trimmer(0.5)(low)) == 2.5
    high = torch.tensor([float("inf"), 1.0, 2.0, 3.0], requires_grad=True)
    loss = Trimmer(0.5, select=batchtrim.between(skip=0.25))(high)
    loss.backward()
    assert loss.isfinite()
    assert high.grad.tolist() == [0.0, 0.0, 0.5, 0.5]
    assert Trimmer(0.25)(torch.tensor([1.0, float("nan"), 5.0, 0.0])).isnan(), "as in plain training"
    assert Trimmer(0.25)(torch.tensor([1.0, float("inf"), 5.0, 0.0])).isinf()


def test_the_clock_clamps_and_one_epoch_works() -> None:
    trim = Trimmer(linear(1.0, 0.2), total=3)
    seen = [trim.keep]
    for _ in range(3):
        trim.step()
        seen.append(trim.keep)
    with pytest.warns(ClockPastTotal, match="expected at most total=3 calls of step.., got 4"):
        trim.step()
    seen.append(trim.keep)
    trim.step()
    seen.append(trim.keep)
    assert seen == [1.0, 0.6, 0.2, 0.2, 0.2, 0.2]
    assert trim.progress == 1.0
    one = Trimmer(linear(0.9, 0.2), total=1)
    one.step()
    assert one.keep == 0.9, "one epoch in all: q = a"


def test_accuracy_drives_ordered_sgd() -> None:
    trim = Trimmer(batchtrim.by_accuracy())
    assert trim.keep == 1.0
    trim.step(accuracy=0.91)
    assert trim.keep == 0.25
    with pytest.raises(ValueError, match=r"expected `accuracy`, which drives this schedule, got None"):
        trim.step()
    twin = Trimmer(batchtrim.by_accuracy())
    twin.load_state_dict(trim.state_dict())
    assert twin.keep == 0.25


@pytest.mark.parametrize("keep", [0.5, linear(1.0, 0.2), lambda p: 1.0 - 0.5 * p, batchtrim.cosine()])
def test_keep_is_a_number_a_schedule_or_any_callable(keep: Any) -> None:
    trim = Trimmer(keep, total=5)
    trim.step(4)
    assert 0 < trim.keep <= 0.5


def test_repr_tells_the_state() -> None:
    trim = Trimmer(linear(1.0, 0.2), total=30, scale="batch", select=batchtrim.between(0.1))
    trim.step(3)
    assert repr(trim) == (
        "Trimmer(keep=linear(start=1.0, end=0.2), total=30, select=between(skip=0.1), scale='batch', "
        "at step 3, keeping 0.9172)"
    )


@pytest.mark.parametrize("rule", [batchtrim.uniform(), batchtrim.percentile(), batchtrim.percentile_topk()])
def test_a_resumed_run_equals_an_uninterrupted_one(rule: Any) -> None:
    def run(trim: Trimmer, batches: range) -> list[list[int]]:
        chosen = []
        for number in batches:
            trim(torch.rand(20, generator=torch.Generator().manual_seed(number)))
            chosen.append(trim.last_selection.indices.tolist())
            trim.step()
        return chosen

    whole = Trimmer(total=8, select=copy.deepcopy(rule), seed=3)
    expected = run(whole, range(8))
    first = Trimmer(total=8, select=copy.deepcopy(rule), seed=3)
    run(first, range(4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Trimmer(total=8, select=copy.deepcopy(rule), seed=99)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert run(second, range(4, 8)) == expected[4:]
    assert second.stats.compute() == pytest.approx(whole.stats.compute())


def test_state_of_another_training_is_refused() -> None:
    state = Trimmer(total=5).state_dict()
    with pytest.raises(ValueError, match=r"total=9, got total=5\. Progress would jump"):
        Trimmer(total=9).load_state_dict(state)
    with pytest.raises(ValueError, match="expected the state of a Trimmer, got one without 'version'"):
        Trimmer(total=9).load_state_dict({"epoch": 3})


def test_pickle_and_deepcopy() -> None:
    trim = Trimmer(total=5)
    trim(LOSSES)
    trim.step(2)
    for twin in (pickle.loads(pickle.dumps(trim)), copy.deepcopy(trim)):
        assert twin.keep == trim.keep
        assert float(twin(LOSSES)) == float(trim(LOSSES))


def test_ranks_samples_by_their_mean_or_each_element() -> None:
    losses = torch.tensor([[1.0, 9.0], [4.0, 5.0], [0.0, 2.0]])
    assert float(Trimmer(0.4)(losses)) == 5.0, "the sample of largest mean"
    assert float(Trimmer(0.34, unit="element")(losses)) == 7.0, "the two largest entries"
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    trim = Trimmer(0.5)
    assert float(trim(losses, mask=mask)) == 4.5
    assert trim.last_selection.candidates == 2
    assert float(Trimmer(1.0, unit="element")(losses, mask=mask)) == pytest.approx(10 / 3)


def test_nothing_counts_gives_an_attached_zero() -> None:
    losses = torch.rand(4, requires_grad=True)
    loss = Trimmer(0.5)(losses * 1.0, mask=torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert losses.grad.tolist() == [0.0] * 4


def test_rank_by_another_loss() -> None:
    losses = LOSSES.clone().requires_grad_()
    loss = Trimmer(0.2)(losses, rank_by=-LOSSES)
    assert float(loss.detach()) == pytest.approx(0.1)
    loss.backward()
    assert losses.grad.tolist() == [0, 0, 0, 1, 0]


def test_losses_need_no_gradient() -> None:
    assert not Trimmer(0.5)(LOSSES).requires_grad


def test_select_and_reduce_give_the_call() -> None:
    for rule in (batchtrim.hardest(), batchtrim.superquantile(), batchtrim.easiest()):
        trim = Trimmer(0.5, select=rule)
        selection = trim.select(LOSSES)
        torch.testing.assert_close(batchtrim.reduce(LOSSES, selection), trim(LOSSES))


def test_a_drop_in_for_plain_training_lowers_the_loss() -> None:
    model = nn.Linear(6, 3)
    x = torch.randn(64, 6)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trim = Trimmer(linear(1.0, 0.2), total=20)
    first = F.cross_entropy(model(x), y).item()
    for _ in range(20):
        optimizer.zero_grad()
        trim(F.cross_entropy(model(x), y, reduction="none")).backward()
        optimizer.step()
        trim.step()
    assert F.cross_entropy(model(x), y).item() < 0.7 * first


def test_label_noise_is_amplified_and_two_sided_trimming_is_the_cure() -> None:
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(10_000, generator=generator) < 0.09
    # clean samples are mostly learnt, wrong labels mostly not
    losses = torch.where(wrong, 3.0, 0.5) + 0.8 * torch.randn(10_000, generator=generator)
    share = {}
    for name, rule in {"hardest": batchtrim.hardest(), "between": batchtrim.between(0.09)}.items():
        share[name] = wrong[Trimmer(0.2, select=rule).select(losses).indices].float().mean().item()
    assert share["hardest"] > 0.35
    assert share["between"] < 0.1


BAD_LOSSES = [
    (
        torch.rand(4).mean(),
        PassUnreducedLosses,
        "shape (B,), one loss per sample, got (). Did the loss function average",
    ),
    (torch.rand(0), ValueError, "at least one sample, got shape (0,)"),
    (torch.arange(4), TypeError, "floating point, got dtype torch.int64. Are these labels"),
    ([1.0, 2.0], TypeError, "expected `losses` to be a tensor, got [1.0, 2.0]"),
]


@pytest.mark.parametrize(("losses", "error", "message"), BAD_LOSSES)
def test_bad_losses_are_refused(losses: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        Trimmer(0.5)(losses)
    assert message in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1.5, -1, float("nan")])
def test_bad_keep_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=r"expected `keep` in \(0, 1\], got .* It is a fraction of the batch"):
        Trimmer(keep)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected `keep` to be a schedule, a number .*, got '20%'"):
        Trimmer("20%")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected `total`, the number of times"):
        Trimmer(linear(1.0, 0.2))
    with pytest.raises(ValueError, match=r"expected `total` to be at least 1, got -1\. If the length of training"):
        Trimmer(total=-1)
    with pytest.raises(ScheduleOutOfRange, match=r"got -0\.01\d* at progress 0\.5051"):
        Trimmer(lambda p: 1.0 - 2 * p, total=100)
    with pytest.raises(ScheduleOutOfRange, match="got None at progress 0"):
        Trimmer(lambda p: None, total=10)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="expected `scale` to be one of 'kept', 'batch', got 'mean'"):
        Trimmer(0.5, scale="mean")
    with pytest.raises(TypeError, match="expected `select` to be a selection rule"):
        Trimmer(0.5, select=batchtrim.hardest)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected `mask` to have the shape of `losses`, \(5,\), got \(4,\)"):
        Trimmer(0.5)(LOSSES, mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"expected `mask` to have dtype torch\.bool, got torch\.float32"):
        Trimmer(0.5)(Losses(LOSSES), mask=torch.ones(5))


def test_statistics_are_those_of_all_batches_since_the_start() -> None:
    trim = Trimmer(0.4)
    for losses in (LOSSES, 2 * LOSSES):
        scratch = losses.clone()
        trim(scratch)
        scratch.zero_()  # the caller may change the losses afterwards
    found = trim.stats.compute()
    assert (found["batches"], found["seen"]) == (2, 10)
    assert found["kept"] == 4
    assert found["keep"] == 0.4
    assert found["mean_loss"] == pytest.approx((6.6 + 13.2) / 10)
    assert found["kept_loss"] == pytest.approx((5 + 10) / 4)
    assert found["threshold"] == pytest.approx((2 + 4) / 2)
    assert found["ratio"] == pytest.approx(3.75 / 1.98)
    assert "kept=4 of 10" in repr(trim.stats)
    trim.stats.reset()
    empty = trim.stats.compute()
    assert empty["seen"] == 0
    assert empty["mean_loss"] != empty["mean_loss"]
    trim(torch.tensor([5.0, 1.0, 2.0]), mask=torch.tensor([False, True, True]))
    assert trim.stats.compute()["mean_loss"] == 1.5


def test_statistics_over_many_batches_of_many_sizes() -> None:
    trim = Trimmer(0.3)
    generator = torch.Generator().manual_seed(1)
    whole, kept = [], []
    for number in range(300):
        losses = torch.rand(1 + number % 40, generator=generator, dtype=torch.float64)
        trim(losses)
        whole.append(losses)
        kept.append(losses.topk(trim.last_selection.k).values)
    found = trim.stats.compute()
    assert found["mean_loss"] == pytest.approx(float(torch.cat(whole).mean()))
    assert found["kept_loss"] == pytest.approx(float(torch.cat(kept).mean()))
    assert found["threshold"] == pytest.approx(float(torch.stack([part.min() for part in kept]).mean()))
