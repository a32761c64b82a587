"""Relatives of the field cases: criteria of newer torch releases, devices and modes, custom rules, clocks."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim import KeepLog, Losses, Selection, Trimmer, per_sample
from batchtrim.criteria import Criterion
from batchtrim.errors import ClockPastTotal, PassUnreducedLosses
from batchtrim.integrations._loss_finder import LossFinder
from batchtrim.integrations._recorder import NotFound

LOSSES = torch.tensor([0.5, 3.0, 1.0, 0.1, 2.0])
RULES = (
    batchtrim.hardest(), batchtrim.easiest(), batchtrim.between(0.2), batchtrim.superquantile(), batchtrim.loss_mass(),
    batchtrim.uniform(), batchtrim.percentile(), batchtrim.percentile_topk(), batchtrim.selection.above(1.0),
)  # fmt: skip


def labelled() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2, 0, 1, -100, -100, 2])
    return torch.randn(8, 4, generator=draw), labels, torch.rand(3, generator=draw) + 0.1


class TestLinearCrossEntropy:
    """New in torch 2.13: it was taken for a criterion that divides by the number of entries."""

    pytestmark = pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has none yet")

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("keep", [1.0, 0.5])
    def test_its_own_value(self, keep: float, weighted: bool, reduction: str) -> None:
        inputs, labels, weight = labelled()
        weight = weight if weighted else None
        criterion = nn.LinearCrossEntropyLoss(4, 3, weight=weight, reduction=reduction)
        logits = criterion.linear(inputs).detach()
        losses = F.cross_entropy(logits, labels, weight, reduction="none").masked_fill(labels == -100, -1.0)
        rows = losses.sort(descending=True).indices[: batchtrim.keep_count(keep, 6)]
        expected = F.cross_entropy(logits[rows], labels[rows], weight, reduction=reduction)
        torch.testing.assert_close(Trimmer(keep)(per_sample(criterion)(inputs, labels)).detach(), expected)

    def test_the_function_and_its_three_arguments(self) -> None:
        inputs, labels, weight = labelled()
        criterion = functools.partial(F.linear_cross_entropy, weight=weight)
        layer = torch.randn(3, 4)
        found = Trimmer(1.0)(per_sample(criterion)(inputs, layer, labels))
        torch.testing.assert_close(found, F.linear_cross_entropy(inputs, layer, labels, weight=weight))
        with pytest.raises(TypeError, match=r"expected \(input, linear_weight, target\) for .*, got 2 arguments"):
            per_sample(criterion)(inputs, labels)

    def test_pixels_and_another_ignored_label(self) -> None:
        inputs = labelled()[0]
        labels = torch.randint(0, 3, (8, 5))
        for unit in ("sample", "element"):
            criterion = nn.LinearCrossEntropyLoss(4, 3, out_features=(5,), ignore_index=1)
            found = Trimmer(1.0, unit=unit)(per_sample(criterion, unit=unit)(inputs, labels))
            torch.testing.assert_close(found, criterion(inputs, labels))

    def test_it_is_named_where_losses_are_read(self) -> None:
        inputs, labels, _ = labelled()
        layer = torch.randn(3, 4, requires_grad=True)
        with pytest.raises(NotFound, match="it calls linear_cross_entropy, whose losses cannot be read"):
            LossFinder()(lambda: F.linear_cross_entropy(inputs, layer, labels), lambda loss: loss, 8, [labels])


def test_a_criterion_that_a_newer_torch_has_is_compared() -> None:
    """Whatever lives in torch.nn was trusted; what is known is listed, and the rest is compared like anybody's."""

    class Newer(nn.modules.loss._Loss):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            losses = (outputs - targets).abs()
            return losses if self.reduction == "none" else losses.sum() / (losses > 0.5).sum()

    Newer.__module__ = nn.modules.loss.__name__
    assert Criterion(Newer()).foreign
    with pytest.raises(ValueError, match="uses another divisor"):
        per_sample(Newer())(torch.linspace(0.0, 1.0, 6), torch.zeros(6))
    known = [each for each in vars(nn).values() if isinstance(each, type) and issubclass(each, nn.modules.loss._Loss)]
    needs = {nn.AdaptiveLogSoftmaxWithLoss: (4, 9, [3])} | (
        {nn.LinearCrossEntropyLoss: (4, 3)} if hasattr(nn, "LinearCrossEntropyLoss") else {}
    )
    made = [each(*needs.get(each, ())) for each in known if each is not nn.NLLLoss2d]  # deprecated
    assert [each for each in made if Criterion(each).foreign] == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: per_sample(nn.CrossEntropyLoss())(torch.randn(3), torch.tensor(1)),
            r"Its inputs are of one sample: give them a batch dimension of 1",
        ),
        (
            lambda: per_sample(lambda o, t, **kw: F.mse_loss(o, t, **kw))(LOSSES, LOSSES),
            r"it takes no `reduction` by name\. If it can be told otherwise, bind that: .*partial\(criterion, reduct",
        ),
    ],
)
def test_why_a_criterion_returned_one_number(call: Callable[[], Any], words: str) -> None:
    """It was said to take no reduction, of torch's own too."""
    with pytest.raises(PassUnreducedLosses, match=words):
        call()


def test_arguments_by_name() -> None:
    with pytest.raises(TypeError, match=r"takes in its order, without names, got \['input', 'target'\]"):
        per_sample(nn.CrossEntropyLoss())(input=torch.randn(2, 3), target=torch.tensor([0, 1]))


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Another default device, as ``torch.set_default_device("cuda")`` makes it; meta is one that every machine has."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


class TestDefaultDevice:
    @pytest.mark.parametrize("rule", RULES, ids=repr)
    def test_rules_and_statistics(self, rule: Any, elsewhere: None) -> None:
        losses = LOSSES.clone()
        trim = Trimmer(batchtrim.linear(1.0, 0.2), total=3, select=copy.deepcopy(rule))
        trim.step()
        first = trim(losses)
        trim(losses[:4])  # another size: another way to sum up
        assert first.device.type == "cpu"
        assert trim.stats.compute()["batches"] == 2
        trim.load_state_dict(trim.state_dict())

    def test_a_compiled_step(self, elsewhere: None) -> None:
        trim = Trimmer(batchtrim.linear(1.0, 0.2), total=3)
        trim.step()
        assert torch.compile(lambda losses: trim(losses), backend="eager", fullgraph=True)(LOSSES).item() == 2.0

    def test_ctc_a_keep_log_and_a_window(self, elsewhere: None) -> None:
        draw = torch.Generator().manual_seed(0)
        logits = torch.randn(6, 2, 4, generator=draw, device="cpu").log_softmax(2)
        targets = torch.tensor([[1, 2], [3, 1]], device="cpu")
        assert Trimmer(1.0)(per_sample(nn.CTCLoss())(logits, targets, (6, 6), (2, 1))).isfinite()

        trim, log = Trimmer(0.4), KeepLog(5)
        trim(LOSSES)
        log.record(trim.last, ids=[4, 3, 2, 1, 0])
        log.end_epoch()
        assert log.table()["kept"].tolist() == [1, 0, 0, 1, 0]

        with torch.device("cpu"):
            model = nn.Linear(2, 2)
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), trim, "exact")
        x, y = torch.ones(3, 2, device="cpu"), torch.zeros(3, dtype=torch.int64, device="cpu")
        for loss in batchtrim.accumulate(step, [(x, y), (x[:1], y[:1])], over="micro"):
            loss.backward()


def test_a_trimmer_made_in_inference_mode_can_be_stepped() -> None:
    with torch.inference_mode():
        trim = Trimmer(batchtrim.linear(1.0, 0.2), total=3)
    trim.step()
    assert trim(LOSSES).item() == 2.0


def test_a_trimmer_copied_in_inference_mode_can_be_stepped() -> None:
    """As weight averaging copies a module; a shallow copy goes on sharing its clock."""
    trim = Trimmer(batchtrim.linear(1.0, 0.2), total=3)
    with torch.inference_mode():
        copies = [copy.deepcopy(trim), pickle.loads(pickle.dumps(trim))]
    for each in copies:
        each.step()
        assert each(LOSSES).item() == 2.0
    copy.copy(trim).step()
    assert trim._keep_tensor.item() == trim.keep == 0.6


def test_torch_jit_trace() -> None:
    """The rows of the example were kept in every batch, with torch's warnings at most."""
    with pytest.warns(), pytest.raises(TypeError, match=r"expected a trimmer outside of torch\.jit\.trace"):
        torch.jit.trace(Trimmer(0.5).__call__, LOSSES)


def test_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replay would keep as many rows as the step that was captured, whatever the schedule says by then."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    trim = Trimmer(batchtrim.linear(1.0, 0.2), total=3)
    with pytest.raises(TypeError, match=r"expected a trimmer outside of a CUDA graph.* mode='reduce-overhead'"):
        trim(LOSSES)
    with pytest.raises(TypeError, match="CUDA graph"):
        trim.select(LOSSES)
    compiled = torch.compile(trim.__call__, backend="eager", fullgraph=True)
    assert compiled(LOSSES) == LOSSES.mean()


def test_losses_of_eight_bits() -> None:
    with pytest.raises(TypeError, match=r"half precision or more, got dtype torch\.float8_e4m3fn"):
        Trimmer(0.5)(LOSSES.to(torch.float8_e4m3fn))


class TestRankBy:
    def test_entries_without_a_score(self) -> None:
        """They were ranked by 0: last of losses, first of scores that are negative."""
        outputs, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        losses = per_sample(nn.CrossEntropyLoss())(outputs, labels)
        scores = per_sample(nn.CrossEntropyLoss())(outputs, torch.tensor([0, -100, -100, 0]))
        with pytest.raises(ValueError, match=r"`rank_by` to rank every entry that counts, got 2 left out of it"):
            Trimmer(0.5)(losses, rank_by=-scores)
        mask = torch.tensor([True, False, False, True])
        rows = (-scores.values).masked_fill(~mask, -math.inf).argmax()
        torch.testing.assert_close(Trimmer(0.5)(losses, rank_by=-scores, mask=mask), losses.values[rows])
        assert Trimmer(0.5)(losses, rank_by=scores.values).isfinite()

    @pytest.mark.parametrize("window", [False, True])
    def test_in_an_engine(self, window: bool) -> None:
        """There, they were still ranked by 0; and of a tensor (B, T), padding counted in each sample's mean."""
        torch.manual_seed(0)
        x, y = torch.randn(6, 3, 4), torch.randint(0, 3, (6, 4))
        y[:, 2:], y[0] = -100, torch.tensor([1, -100, -100, -100])
        ce, model = per_sample(nn.CrossEntropyLoss()), nn.Identity()

        def loss_of(rank_by: Any) -> float:
            step = batchtrim.TrimmedForward(model, ce, Trimmer(0.4), "exact", rank_by=rank_by)
            losses = batchtrim.accumulate(step, [(x[:4], y[:4]), (x[4:], y[4:])]) if window else [step(x, y)]
            return sum(each.item() for each in losses)

        with pytest.raises(ValueError, match="`rank_by` to rank every entry that counts, got "):
            loss_of(lambda outputs, y: per_sample(nn.CrossEntropyLoss())(outputs, torch.full_like(y, -100)))
        with pytest.raises(ValueError, match=r"`rank_by` to return `Losses` of the entries that count, .*\(\d, 4\)"):
            loss_of(lambda outputs, y: F.cross_entropy(outputs, y, reduction="none"))
        with pytest.raises(PassUnreducedLosses, match=r"expected `rank_by\(outputs, y\)` to have shape"):
            loss_of(F.cross_entropy)
        assert loss_of(lambda outputs, y: ce(outputs, y)) == pytest.approx(Trimmer(0.4)(ce(x, y)).item())
        assert loss_of(lambda outputs, y: -ce(outputs, y)) == pytest.approx(
            Trimmer(0.4, select=batchtrim.easiest())(ce(x, y)).item()
        )

    def test_a_mask_on_both(self) -> None:
        mask = torch.tensor([True, True, False, True, True])
        found = Trimmer(0.5)(Losses(LOSSES, mask), rank_by=Losses(-LOSSES, mask.clone()))
        torch.testing.assert_close(found, torch.tensor(0.3))


class TestRulesOfOnesOwn:
    @pytest.mark.parametrize(
        ("rows", "error", "words"),
        [
            (lambda losses: losses.topk(2).indices, TypeError, r"a batchtrim\.Selection, got a tensor of shape \(2,\)"),
            (lambda losses: losses > 1.0, TypeError, r"a batchtrim\.Selection, got a tensor of shape \(5,\)"),
            (lambda losses: Selection(torch.tensor([1, 1, 4]), 5, 5), ValueError, "distinct rows from 0 to 4"),
            (lambda losses: Selection(torch.tensor([-1]), 5, 5), ValueError, "distinct rows from 0 to 4"),
            (lambda losses: Selection(torch.tensor([5]), 5, 5), ValueError, "distinct rows from 0 to 4"),
            (lambda losses: Selection(torch.tensor([0.5]), 5, 5), ValueError, r"rows of 5 losses, int64 of shape"),
            (lambda losses: Selection(torch.tensor([0]), 9, 9), ValueError, r"rows of 5 losses, int64 .* of 9 from"),
            (lambda losses: Selection(torch.tensor([0, 1]), 5, 5, torch.ones(1)), ValueError, "a weight for each of 2"),
            (lambda losses: Selection(torch.tensor([0, 1]), 5, 5, [1.0, 2.0]), ValueError, r"tensor, got \[1\.0"),
            (lambda losses: Selection(torch.tensor([0]), 5, 0), ValueError, "`candidates` from the 1 kept to"),
            (lambda losses: Selection(torch.tensor([0]), 5, 5, None, 0.0), ValueError, "positive `normalizer`, got 0"),
            (lambda losses: Selection(torch.tensor([0]), 5, 5, None, -2.0), ValueError, "`normalizer`, got -2"),
        ],
    )  # fmt: skip
    def test_an_invalid_selection(self, rows: Callable[[Tensor], Any], error: type[Exception], words: str) -> None:
        """A row drawn twice counted once, -1 was the last row, and one weight was all rows'."""
        with pytest.raises(error, match=words):
            Trimmer(0.5, select=lambda losses, keep, generator=None: rows(losses))(LOSSES)

    def test_one_of_other_arguments(self) -> None:
        with pytest.raises(TypeError, match=r"cannot be called with \(losses, keep, generator\) as a rule is"):
            Trimmer(0.5, select=lambda losses: losses)  # type: ignore[arg-type, misc]
        with pytest.raises(TypeError) as caught:
            Trimmer(0.5, select=lambda *parts: torch.topk(*parts))(LOSSES)
        assert "a selection rule with (losses, keep, generator)" in caught.value.__notes__[0]

    def test_one_that_writes_into_its_losses(self) -> None:
        def rule(losses: Tensor, keep: float, generator: Any = None) -> Selection:
            return batchtrim.hardest()(losses.neg_(), keep)

        losses = LOSSES.clone()
        assert Trimmer(0.4, select=rule)(losses).item() == pytest.approx(0.3)
        assert torch.equal(losses, LOSSES)

    def test_its_divisor_for_the_whole_batch_with_a_mask(self) -> None:
        def rule(losses: Tensor, keep: float, generator: Any = None) -> Selection:
            return Selection(torch.tensor([0]), len(losses), len(losses), batch_normalizer=10.0)

        mask = torch.tensor([False, True, True, True, True])
        assert Trimmer(0.5, select=rule, scale="batch")(LOSSES, mask=mask).item() == pytest.approx(0.3)

    def test_percentiles_after_losses_that_are_nan(self) -> None:
        """A search among sorted losses took NaN for smaller than any number: all were kept, for 1,024 losses."""
        rule, draw = batchtrim.percentile(beta=1.0, history=1000), torch.Generator().manual_seed(1)
        assert rule(torch.full((600,), math.nan), 1.0, draw).k == 600, "NaN is kept"
        kept = rule(torch.rand(400), 1.0, draw).k  # each has at most 400 of the history of 1,000 below it
        assert 50 < kept < 110

    def test_an_invalid_threshold(self) -> None:
        with pytest.raises(ValueError, match="expected `threshold` to be a number to compare losses with, got nan"):
            batchtrim.selection.above(math.nan)


class TestSettingsOfATrimmer:
    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("unit", "pixel", "`unit` to be one of 'sample', 'element', got 'pixel'"),
            ("scope", "all", "`scope` to be one of 'local', 'global', got 'all'"),
            ("scale", "sum", "`scale` to be one of 'kept', 'batch', got 'sum'"),
            ("rule", batchtrim.hardest, "`rule` to be a selection rule"),
        ],
    )
    def test_set_later(self, name: str, value: Any, words: str) -> None:
        """An unknown unit chose samples, and an unknown scope asked no other rank."""
        trim = Trimmer(0.5)
        with pytest.raises((ValueError, TypeError), match=words):
            setattr(trim, name, value)
        trim.unit = "element"
        assert trim(torch.tensor([[1.0, 4.0], [3.0, 2.0]])).item() == 3.5

    def test_a_seed_set_later(self) -> None:
        """It was taken, and nothing was drawn from it."""
        trim = Trimmer(0.5, seed=3)
        with pytest.raises(AttributeError):
            trim.seed = 4  # type: ignore[misc]
        assert trim.seed == 3

    def test_a_state_that_is_damaged_changes_nothing(self) -> None:
        saved = Trimmer(0.5, select=batchtrim.percentile())
        saved(LOSSES)
        for damaged in ({}, {"recent": "all"}, {"recent": torch.zeros(2, 2)}):
            trim = Trimmer(0.5, select=batchtrim.percentile())
            with pytest.raises(ValueError, match=r"state of a percentile rule|to be a vector of losses"):
                trim.load_state_dict({**saved.state_dict(), "rule": damaged})
            assert trim.stats.compute()["batches"] == 0

    @pytest.mark.parametrize("total", [10.0, True])
    def test_a_total_that_is_not_an_integer(self, total: Any) -> None:
        with pytest.raises(TypeError, match=r"expected `total` to be an int, got .*\. It counts calls of step\(\)\.$"):
            Trimmer(total=total)


class TestClock:
    def test_a_failed_step_does_not_move_the_clock(self) -> None:
        sound = [True]

        def schedule(progress: float) -> float:
            if not sound[0]:
                raise RuntimeError("no")
            return 1.0 - 0.5 * progress

        trim = Trimmer(schedule, total=5)
        sound[0] = False
        with pytest.raises(RuntimeError, match="no") as caught:
            trim.step()
        assert (trim.steps, trim.progress, trim.keep) == (0, 0.0, 1.0)
        assert "with one number in [0, 1]: progress" in caught.value.__notes__[0]

    def test_an_accuracy_in_percent(self) -> None:
        with pytest.raises(ValueError, match=r"expected `accuracy` in \[0, 1\], got 83\. It is a fraction"):
            Trimmer(batchtrim.by_accuracy()).step(accuracy=83.0)
        with pytest.raises(ValueError, match=r"expected `levels key` in \[0, 1\], got 80\. A level is an accuracy"):
            batchtrim.by_accuracy({80: 0.5})

    def test_the_number_of_the_epoch_given_to_step(self) -> None:
        """As schedulers of learning rates once took it: the schedule is over early, and another reason was given."""
        trim = Trimmer(total=5)
        for epoch in range(3):
            trim.step(epoch)
        with pytest.warns(ClockPastTotal, match=r"or is the epoch's number passed to step\(\), which advances by"):
            trim.step(3)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.999])
def test_the_gradient_of_the_focal_loss_at_zero(gamma: float) -> None:
    """A sample learnt to the last bit has a loss of 0, and made the whole gradient NaN."""
    losses = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    values = batchtrim.focal(losses, gamma)
    values.sum().backward()
    p = math.exp(-1.0)
    expected = (1 - p) ** gamma + gamma * (1 - p) ** (gamma - 1) * p
    torch.testing.assert_close(values.detach(), torch.tensor([0.0, (1 - p) ** gamma], dtype=torch.float64))
    torch.testing.assert_close(losses.grad, torch.tensor([0.0, expected], dtype=torch.float64))
