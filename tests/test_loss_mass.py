"""The rule `loss_mass`: against an oracle, and each case in which a share could mean two things."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchtrim
import oracles
from batchtrim import KeepLog, Losses, Trimmer, loss_mass, smoothing_floor, uniform
from batchtrim.keeplog import NoiseAmplified
from batchtrim.selection import above
from tiers import often

VALUES = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, float("inf"), float("nan"), -0.0, 0.125])
LOSSES = st.lists(st.one_of(VALUES, st.floats(0, 10, width=16)), min_size=1, max_size=60)
SHARES = st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.5, 0.9, 1.0]))
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


def rows(selection: batchtrim.Selection) -> set[int]:
    return set(selection.indices.tolist())


drawn = given(
    LOSSES, SHARES, DTYPES, st.sampled_from([0.0, 0.2, 0.9]), st.sampled_from([(0.0, 1.0), (0.3, 0.6), (1.0, 1.0)])
)


@settings(max_examples=100, deadline=None)
@drawn
def test_against_the_oracle(
    values: list[float], keep: float, dtype: torch.dtype, skip: float, ends: tuple[float, float]
) -> None:
    losses = torch.tensor(values, dtype=dtype)
    expected = oracles.loss_mass(losses.double().numpy(), keep, skip, *ends)
    rule = loss_mass(skip, *ends)
    assert rows(rule(losses, keep)) == expected
    share = torch.tensor(keep, dtype=torch.float64)
    assert set(rule.compiled_mask(losses, share, len(values)).nonzero().flatten().tolist()) == expected


test_against_the_oracle_often = often(drawn, test_against_the_oracle, 400)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=50), st.floats(0.05, 1.0))
def test_what_is_dropped_is_bounded(values: list[float], share: float) -> None:
    losses = torch.tensor(values, dtype=torch.float64)
    trimmed = Trimmer(share, select=loss_mass(), scale="batch")(losses)
    assert trimmed >= share * losses.mean() * (1 - 1e-9)
    assert trimmed <= losses.mean() * (1 + 1e-9)


@pytest.mark.parametrize("n", [3, 10, 70, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_equal_losses_are_counted_not_rounded(n: int, dtype: torch.dtype) -> None:
    for tenths in range(1, 11):
        assert loss_mass()(torch.full((n,), 0.1, dtype=dtype), tenths / 10).k == math.ceil(tenths * n / 10)


def test_zeros_keep_one_and_keep_one_keeps_everything() -> None:
    zeros = torch.zeros(8)
    assert rows(loss_mass()(zeros, 0.9)) == {0}
    losses = torch.tensor([1.0, 0.0, 0.0, 3.0], requires_grad=True)
    assert rows(loss_mass()(losses.detach(), 0.9999)) == {0, 3}
    trim = Trimmer(1.0, select=loss_mass())
    assert torch.equal(trim(losses), losses.mean())
    assert trim.last_selection is not None
    assert trim.last_selection.everything
    assert loss_mass()(torch.tensor([0.7]), 0.1).k == 1


@pytest.mark.parametrize("n", [6, 5000])
def test_nan_and_inf_hold_all_the_mass(n: int) -> None:
    losses = torch.rand(n)
    losses[3], losses[1] = float("nan"), float("inf")
    assert rows(loss_mass()(losses, 0.5)) == {1, 3}
    assert rows(loss_mass(offset=0.5)(losses.nan_to_num(nan=math.nan, posinf=2.0) + 0.5, 0.5)) == {3}
    assert Trimmer(0.5, select=loss_mass())(losses).isnan()
    assert loss_mass(at_least=0.5)(losses, 0.5).k == n // 2
    assert rows(loss_mass(skip=2 / n)(losses, 0.5)).isdisjoint({1, 3}), "skip drops them first, as `between` does"


NEGATIVE = "expected `losses` of at least 0 for loss_mass, got -0.5. Losses that can be negative"


@pytest.mark.parametrize("n", [4, 5000])
def test_negative_losses_are_refused_with_a_way_out(n: int) -> None:
    losses = torch.rand(n)
    losses[2] = -0.5
    with pytest.raises(ValueError, match=NEGATIVE) as refused:
        Trimmer(0.9, select=loss_mass())(losses)
    assert "rank_by" in str(refused.value)
    assert "hardest()" in str(refused.value)
    Trimmer(0.9, select=loss_mass())(losses, rank_by=losses.abs())  # the way out
    for bad in (float("-inf"), -1e-3):
        losses[2] = bad
        with pytest.raises(ValueError, match="expected `losses` of at least 0"):
            loss_mass()(losses, 0.9)
    losses[0], losses[2] = float("nan"), -0.5
    with pytest.raises(ValueError, match=NEGATIVE):
        loss_mass()(losses, 0.9)
    with pytest.raises(ValueError, match=NEGATIVE):
        loss_mass()(losses, 1.0)


def test_a_zero_that_rounded_below_is_a_zero() -> None:
    assert rows(loss_mass()(torch.tensor([1.0, -1e-7, 0.0]), 0.9)) == {0}
    with pytest.raises(ValueError, match="expected `losses` of at least 0"):
        loss_mass()(torch.tensor([1.0, -1e-7, 0.0], dtype=torch.float64), 0.9)


def test_masked_negative_losses_do_not_count() -> None:
    losses, mask = torch.tensor([-3.0, 1.0, 2.0, 50.0]), torch.tensor([False, True, True, False])
    trim = Trimmer(0.6, select=loss_mass(), scale="batch")
    assert trim(losses, mask=mask) == 1.0  # 2 of the 3 that count, over 2 samples
    assert trim(losses, mask=torch.zeros(4, dtype=torch.bool)) == 0.0


def test_the_floor_of_label_smoothing_is_not_a_loss() -> None:
    logits = torch.tensor([[9.0, 0, 0, 0], [9.0, 0, 0, 0], [9.0, 0, 0, 0], [0.0, 3.0, 0, 0]])
    targets = torch.zeros(4, dtype=torch.int64)
    floor = smoothing_floor(0.2, 4)
    best = torch.tensor([[0.85, 0.05, 0.05, 0.05]]).log()
    assert F.cross_entropy(best, targets[:1], label_smoothing=0.2).item() == pytest.approx(floor)
    smoothed = F.cross_entropy(best.expand(4, 4).clone(), targets, label_smoothing=0.2, reduction="none")
    assert loss_mass(offset=floor)(smoothed, 0.9).k == 1, "all at the floor: nothing left to lose"
    assert loss_mass()(smoothed, 0.9).k == 4
    smoothed = F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="none")
    assert loss_mass(offset=floor)(smoothed, 0.5).k <= loss_mass()(smoothed, 0.5).k
    assert rows(loss_mass(offset=floor)(smoothed, 0.4)) == {3}
    with pytest.raises(ValueError, match=r"at least 0\.58.* Is `offset` larger than the loss's own floor\?"):
        loss_mass(offset=floor)(F.cross_entropy(logits, targets, reduction="none"), 0.9)
    assert smoothing_floor(0.0, 7) == 0.0
    assert smoothing_floor(1.0, 7) == pytest.approx(math.log(7))


def test_skip_keeps_wrong_labels_out() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(200, generator=generator)
    losses[:20] += 8.0  # a tenth is wrong
    assert len(rows(loss_mass()(losses, 0.5)) & set(range(20))) == rows(loss_mass()(losses, 0.5)).__len__()
    kept = rows(loss_mass(skip=0.1)(losses, 0.5))
    assert kept.isdisjoint(range(20))
    rest = losses[20:].sort(descending=True).values
    assert rest[: len(kept)].sum() >= 0.5 * rest.sum() > rest[: len(kept) - 1].sum()


def test_floor_and_ceiling() -> None:
    losses = torch.tensor([100.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert loss_mass()(losses, 0.9).k == 1
    assert loss_mass(at_least=0.3)(losses, 0.9).k == 3
    assert loss_mass(at_most=0.4)(torch.ones(10), 0.9).k == 4
    assert loss_mass(at_most=0.4)(torch.ones(10), 1.0).k == 4
    assert loss_mass(skip=0.5, at_least=1.0)(losses, 0.9).k == 5


def test_a_schedule_falls_on_the_share() -> None:
    losses = torch.arange(10.0)
    trim = Trimmer(batchtrim.linear(1.0, 0.4), total=3, select=loss_mass())
    ks = []
    for _ in range(3):
        trim(losses)
        ks.append(trim.last_selection.k)  # type: ignore[union-attr]
        trim.step()
    assert ks == [10, 5, 3]  # 45; 0.7 of it: 9 + 8 + 7 + 6 + 5; 0.4: 9 + 8 + 7


def test_class_weights_and_elements() -> None:
    criterion = batchtrim.per_sample(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0])))
    outputs, targets = torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])
    trim = Trimmer(0.7, select=loss_mass())
    assert trim(criterion(outputs, targets)).item() == pytest.approx(math.log(2))
    assert rows(trim.last_selection) == {3}  # type: ignore[arg-type]
    values = torch.tensor([[4.0, 1.0], [0.0, 7.0]])
    mask = torch.tensor([[True, True], [True, False]])
    trim = Trimmer(0.8, select=loss_mass(), unit="element", scale="batch")
    assert trim(Losses(values, mask)).item() == pytest.approx(4.0 / 3)


def test_samples_that_count_differently_are_bounded_by_the_mean_of_their_means() -> None:
    losses, mask = torch.ones(2, 100), torch.ones(2, 100, dtype=torch.bool)
    losses[0], mask[0, 1:] = 10.0, False
    padded = batchtrim.Losses(losses, mask)
    by_sample, by_token = (Trimmer(0.9, select=loss_mass(), scale="batch", unit=unit) for unit in ("sample", "element"))
    by_sample(padded)
    assert by_sample.last is not None
    assert by_sample.last.selection.indices.tolist() == [0], "10 of 11 of the means, 10 of 110 of the tokens"
    assert float(by_token(padded)) == pytest.approx(0.9 * float(padded.mean()))


def test_no_gradient_through_the_choice_and_rank_by() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    trim = Trimmer(0.7, select=loss_mass(), scale="batch")
    trim(losses, rank_by=torch.tensor([9.0, 1.0, 0.0, 0.0])).backward()
    assert losses.grad.tolist() == [0.25, 0.0, 0.0, 0.0]  # type: ignore[union-attr]


def test_the_control_draws_as_many() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(50) ** 4
    control = uniform(like=loss_mass())
    ks = {control(losses, 0.9, generator).k for _ in range(20)}
    assert ks == {loss_mass()(losses, 0.9).k}
    assert len({tuple(sorted(rows(control(losses, 0.9, generator)))) for _ in range(20)}) > 15
    assert repr(control) == f"uniform(like={loss_mass()!r})"
    assert repr(uniform()) == "uniform()"
    with pytest.raises(TypeError, match="expected `like` to be a selection rule"):
        uniform(like=loss_mass)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected `like` to be a rule without state, got percentile"):
        uniform(like=batchtrim.percentile())


def test_wrong_parameters() -> None:
    for arguments, message in (
        ({"skip": 1.0}, r"expected `skip` in \[0, 1\), got 1"),
        ({"at_least": 5}, r"expected `at_least` in \[0, 1\], got 5"),
        ({"at_most": 0.0}, r"expected `at_most` in \(0, 1\], got 0"),
        ({"at_least": 0.6, "at_most": 0.5}, r"expected `at_least` up to `at_most`, got 0\.6 and 0\.5"),
        ({"offset": -1.0}, "expected `offset` to be positive and finite, got -1"),
        ({"offset": float("nan")}, "expected `offset` to be positive and finite, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_mass(**arguments)
    with pytest.raises(ValueError, match=r"expected `label_smoothing` in \[0, 1\], got 2"):
        smoothing_floor(2.0, 10)
    with pytest.raises(ValueError, match="expected `classes` to be at least 2"):
        smoothing_floor(0.1, 1)


def test_it_pickles_compares_and_prints() -> None:
    rule = loss_mass(skip=0.1)
    assert pickle.loads(pickle.dumps(rule)) == rule == copy.deepcopy(rule)
    assert repr(rule) == "loss_mass(skip=0.1, at_least=0.0, at_most=1.0, offset=0.0)"


def test_the_log_records_what_was_kept_and_warns_of_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    n, classes = 2000, 2
    log = KeepLog(n, classes=classes)
    trim = Trimmer(0.9, select=loss_mass())
    labels = torch.randint(classes, (n,), generator=generator)
    wrong = torch.rand(n, generator=generator) < 0.1

    def epochs() -> None:
        for epoch in range(8):
            # right samples are learnt, wrong ones contradicted ever more surely
            sure = (0.2 + epoch) * (1 + torch.rand(n, generator=generator))
            outputs = F.one_hot(torch.where(wrong, 1 - labels, labels), classes) * sure[:, None]
            losses = F.cross_entropy(outputs, labels, reduction="none")
            trim(losses)
            log.record(trim.last, ids=torch.arange(n), outputs=outputs, labels=labels)
            line = log.end_epoch()
            assert line["kept"] == trim.last_selection.k  # type: ignore[union-attr]

    with pytest.warns(NoiseAmplified):
        epochs()
    assert log.history[-1]["keep"] < 0.15 < log.history[0]["keep"]


class OverHalf:
    """A rule of the user's own whose k depends on the losses."""

    k_follows_losses = True

    def __call__(self, losses: Any, keep: float, generator: Any = None) -> batchtrim.Selection:
        rows = (losses > 0.5).nonzero().squeeze(1)
        return batchtrim.Selection(rows, len(losses), len(losses))


@pytest.mark.parametrize(
    "rule", [loss_mass(), above(0.5), batchtrim.percentile(), uniform(like=loss_mass()), OverHalf()]
)
def test_what_will_be_kept_is_what_was_kept_where_k_follows_losses(rule: Any) -> None:
    trim = Trimmer(1.0 if isinstance(rule, batchtrim.percentile) else 0.9, select=rule)
    assert trim.expected_keep == trim.keep
    losses = torch.rand(40) ** 6
    trim(losses)
    assert trim.expected_keep == trim.last_selection.k / 40 < trim.keep  # type: ignore[union-attr]
    trim(losses, mask=losses > 2.0)
    assert trim.expected_keep == trim.keep, "nothing counted: nothing known"
    assert Trimmer(0.3).expected_keep == 0.3


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside its compiler
def test_one_compile_whatever_the_share_and_the_losses(backend: str) -> None:
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    rule = loss_mass(skip=0.05, at_least=0.1)
    compiled, eager = (Trimmer(batchtrim.linear(0.95, 0.3), total=12, select=rule, scale="batch") for _ in range(2))
    step = torch.compile(lambda losses, mask: compiled(losses * 2.0, mask=mask), backend=counter, fullgraph=True)
    frames = []
    for _ in range(12):
        losses, mask = torch.rand(64) ** 6, torch.rand(64) > 0.2
        losses = torch.where(mask, losses, -1.0)
        ours, theirs = losses.clone().requires_grad_(), losses.clone().requires_grad_()
        loss, expected = step(ours, mask), eager(theirs * 2.0, mask=mask)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        compiled.step()
        eager.step()
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1, "compiled in the first step, forward and backward, and never again"
    with pytest.raises(RuntimeError, match="expected losses of at least 0 for loss_mass"):
        step(torch.full((64,), -1.0), torch.ones(64, dtype=torch.bool))


def test_nothing_to_choose_from_gives_an_empty_selection() -> None:
    for rule in (loss_mass(), loss_mass(skip=0.2, at_least=0.1), uniform(like=loss_mass())):
        selection = rule(torch.zeros(0), 0.9)
        assert (selection.k, selection.size, selection.candidates) == (0, 0, 0)


def test_rows_of_other_processes_do_not_travel_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over ranks the rule chooses from the joined vector: the rule itself starts no collective."""
    called: list[str] = []
    for name in ("all_gather", "all_reduce", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, lambda *a, _name=name, **k: called.append(_name))
    loss_mass()(torch.rand(16), 0.9)
    assert not called
