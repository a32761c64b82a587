"""Keep logs as their users write them: cases that were silently wrong, or ended a training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchtrim
from batchtrim import Choice, KeepLog, Selection, Trimmer
from batchtrim.keeplog import NoiseAmplified
from batchtrim.keeplog.batch import Entries
from tiers import few

IDS = torch.tensor([9, 8, 7, 6])
LOSSES = torch.tensor([0.1, 4.0, 3.0, 0.2])


def kept(log: KeepLog) -> list[int]:
    return log.table()["kept"].nonzero().flatten().tolist()


def test_the_log_is_beside_the_trimmer() -> None:
    trim, log = Trimmer(0.5), KeepLog(10)
    assert trim.last is None
    assert trim(LOSSES).item() == 3.5
    log.record(trim.last, ids=IDS)
    assert kept(log) == [7, 8]
    assert trim.last is not None
    assert trim.last.losses.tolist() == LOSSES.tolist()
    assert not trim.last.losses.requires_grad
    with pytest.raises(AttributeError):
        trim.last.losses = LOSSES  # type: ignore[misc]


def test_ids_without_a_log_are_an_error() -> None:
    """They went nowhere, silently."""
    for call in (Trimmer(0.5), Trimmer(0.5).select):
        with pytest.raises(
            ValueError, match=r"expected no `ids` without a log, got one. To log the batch, call `log.rec"
        ):
            call(LOSSES, ids=IDS)
        with pytest.raises(ValueError, match="expected no `labels` without a log"):
            call(LOSSES, labels=IDS)
        with pytest.raises(TypeError, match=r"beside the losses of trim.*, got `id`"):
            call(LOSSES, id=IDS)


def test_the_old_forms_work_with_a_deprecation_warning() -> None:
    log = KeepLog(10)
    with pytest.warns(
        DeprecationWarning, match=r"Trimmer\(log=...\) is removed in the next release: call `log.record\(trim.last"
    ):
        trim = Trimmer(0.5, log=log)
    with pytest.warns(DeprecationWarning, match=r"trim\(losses, ids=...\) is removed in the next release") as caught:
        trim(LOSSES, ids=IDS, labels=torch.zeros(4, dtype=torch.int64))
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"record\(ids, losses, selection\) is removed in the next release"):
        log.record(IDS, LOSSES, batchtrim.hardest()(LOSSES, 0.5))  # type: ignore[arg-type]
    assert log.table()["kept"].tolist() == [0] * 7 + [2, 2, 0]


def test_a_masked_sample_is_not_seen() -> None:
    mask = torch.tensor([True, False, True, True])
    trim, log = Trimmer(0.5), KeepLog(10)
    trim(LOSSES, mask=mask)
    log.record(trim.last, ids=IDS)
    assert log.table()["seen"][6:].tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("engine", few(["exact", "two_pass", "shared"], ["exact", "two_pass"]))
def test_a_sample_whose_labels_are_all_ignored_is_not_seen(engine: str) -> None:
    """A TrimmedForward's choice had no mask: an ignored sample counted as dropped."""
    model, log = nn.Linear(3, 4), KeepLog(6, classes=4)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), Trimmer(0.5), engine)
    y = torch.tensor([0, -100, 1, 2, -100, 3])
    x = torch.randn(6, 3)
    step(x, y).backward()
    log.record(step.last, ids=torch.arange(6), labels=y)
    assert log.table()["seen"].tolist() == [1, 0, 1, 1, 0, 1]
    assert log.end_epoch()["class_seen"] == [1, 1, 1, 1]
    predicted = torch.where(y < 0, -1, model(x).argmax(1))
    assert log.table()["predicted"].tolist() == predicted.tolist(), "the outputs come with the step"


class Output(dict):
    """As a ModelOutput: logits among other things."""


def test_outputs_of_another_form_are_left_out() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    selection = batchtrim.hardest()(LOSSES, 0.5)

    def predicted(outputs: object) -> list[int]:
        log = KeepLog(4)
        step = batchtrim.engine.batch.StepResult(LOSSES.mean(), LOSSES, outputs, selection)
        log.record(step, ids=torch.arange(4), labels=labels)
        return log.table()["predicted"].tolist()

    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    assert predicted(logits) == predicted(Output(logits=logits)) == [1, 0, 1, 0]
    for outputs in (logits[:, :1], logits[:2], logits[:, :, None], logits.long(), (logits,), {"a": 1}, None, "text"):
        assert predicted(outputs) == [-1] * 4


@pytest.mark.parametrize(
    ("last", "ids", "message"),
    [
        (None, IDS, "expected `last` to be a batchtrim.Choice, got None. Record after the trimmer was called"),
        (Choice(LOSSES, Selection(torch.tensor([1]), 5, 5)), IDS, "expected `last.selection` to be of 4 losses"),
        (Choice(LOSSES, Selection(torch.tensor([1]), 4, 4)), IDS[:3], "`ids` to be integers of shape"),
        (Choice(LOSSES, Selection(torch.tensor([1]), 4, 4)), None, "expected `ids`, the samples' row numbers"),
        (Choice(LOSSES, Selection(torch.tensor([1]), 4, 4)), IDS + 1, "expected `ids` from 0 to 9, got some from 7"),
        (LOSSES, IDS, "expected `last` to be a batchtrim.Choice, such as `trim.last`, got a tensor"),
        ("last", IDS, "expected `last` to have losses and a selection"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded(last: object, ids: Tensor | None, message: str) -> None:
    log = KeepLog(10)
    with pytest.raises((ValueError, TypeError), match=message):
        log.record(last, ids=ids)  # type: ignore[arg-type]
    assert log.steps == 0


def test_entries_are_not_samples() -> None:
    """A trimmer of tokens leaves one loss a token: ids of samples do not fit."""
    trim = Trimmer(0.5, unit="element")
    trim(torch.rand(4, 3))
    with pytest.raises(ValueError, match=r"`ids` to be integers of shape \(12,\), one per sample"):
        KeepLog(10).record(trim.last, ids=IDS)


def test_a_compiled_step_leaves_nothing_to_record() -> None:
    """And not what an earlier batch left."""
    trim = Trimmer(0.5)
    trim(LOSSES)
    torch.compile(trim, backend="eager", fullgraph=True)(LOSSES)
    assert trim.last is None
    with pytest.raises(ValueError, match="a compiled step leaves no choice to record"):
        KeepLog(10).record(trim.last, ids=IDS)


def test_a_window_is_recorded_as_one_batch() -> None:
    model, log = nn.Linear(3, 4), KeepLog(8)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), Trimmer(0.25), "exact")
    x, y = torch.randn(8, 3), torch.randint(0, 4, (8,))
    for loss in batchtrim.accumulate(step, list(zip(x.split(5), y.split(5), strict=True))):
        loss.backward()
    log.record(step.trim.last, ids=torch.arange(8))
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    assert kept(log) == sorted(losses.topk(2).indices.tolist())


def record(log: KeepLog, losses: Tensor, keep: float = 0.5, **beside: Tensor) -> None:
    selection = batchtrim.hardest()(losses, keep)
    log.record(Choice(losses, selection), ids=torch.arange(len(losses)), **beside)


@pytest.mark.parametrize("classes", [32_768, 32_769, 40_000, 50_000, None])
def test_more_classes_than_int16_holds(classes: int | None, tmp_path: Path) -> None:
    """Accepted when made, then an overflow at the end of the epoch, or "none given" without a word."""
    c = classes or 70_000
    log = KeepLog(4, classes=classes)
    labels = torch.tensor([0, c // 2, c - 2, c - 1])
    outputs = nn.functional.one_hot(labels.roll(1), c).float()  # each row contradicts its label
    record(log, LOSSES, outputs=outputs, labels=labels)
    line = log.end_epoch()
    assert log.table()["predicted"].tolist() == labels.roll(1).tolist()
    assert line["doubt"] == 1.0
    if classes:
        assert [line["class_seen"][label] for label in labels.tolist()] == [1, 1, 1, 1]
        assert sum(line["class_seen"]) == 4
        assert sum(line["class_kept"]) == 2
    again = KeepLog(4, classes=classes)
    again.load_state_dict(log.state_dict())
    record(again, LOSSES, outputs=outputs.roll(1, 0), labels=labels)
    assert again.table()["predicted"].tolist() == labels.roll(2).tolist()
    merged = KeepLog(4, classes=classes)
    record(merged, LOSSES)
    merged.merge(log)
    assert merged.table()["predicted"].tolist() == labels.roll(1).tolist()
    pytest.importorskip("pyarrow")
    log.to_parquet(tmp_path / "log.parquet")
    table = KeepLog.from_parquet(tmp_path / "log.parquet").table()
    assert table["predicted"].tolist() == labels.roll(1).tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_labels_beyond_int16_are_compared_as_they_are(dtype: torch.dtype) -> None:
    """Without classes labels may be anything; none is taken for another by wrapping around."""
    log = KeepLog(4)
    largest = min(torch.iinfo(dtype).max, 2**40)
    labels = torch.tensor([largest, 200 % largest, 1, 0], dtype=dtype)
    outputs = nn.functional.one_hot(torch.tensor([0, 200, 1, 0]), 201).float()
    record(log, LOSSES, outputs=outputs, labels=labels)
    # the surest quarter is one of four alike: all four count as surest
    assert log.end_epoch()["doubt"] == (0.25 if labels[1] == 200 else 0.5)


def test_epochs_ended_twice_by_loop_and_callback() -> None:
    """A TypeError, three epochs later, in training."""
    n = 2000
    log = KeepLog(n, classes=2)
    draw = torch.Generator().manual_seed(0)
    for keep in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2):
        for ids in torch.randperm(n, generator=draw).split(500):
            losses = torch.rand(len(ids), generator=draw)
            outputs, labels = torch.rand(len(ids), 2, generator=draw), ids % 2
            last = Choice(losses, batchtrim.hardest()(losses, keep))
            log.record(last, ids=ids, outputs=outputs, labels=labels)
        line = log.end_epoch()
        assert log.end_epoch() == line
    assert len(log.history) == 9


def test_an_epoch_of_a_log_made_before_may_hold_nothing() -> None:
    """States saved by earlier releases hold such lines, and an epoch may see nothing but what a mask leaves out."""
    log = KeepLog(4)
    nothing = log.end_epoch()
    assert (nothing["seen"], nothing["keep"]) == (0, None)
    none = torch.zeros(4, dtype=torch.bool)
    for keep in (1.0, 0.5, 0.4, 0.3):
        record(log, LOSSES, keep, outputs=torch.rand(4, 3), labels=torch.zeros(4, dtype=torch.int64))
        log.end_epoch()
        log.record(Choice(LOSSES, Selection(torch.tensor([], dtype=torch.int64), 4, 0), none), ids=IDS)
        assert log.end_epoch()["keep"] is None
    assert [line["seen"] for line in log.history] == [0, 4, 0, 4, 0, 4, 0, 4, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("part", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("below", [2.0, 0.45])
def test_losses_that_are_not_finite_do_not_end_training(value: float, part: float, below: float) -> None:
    """From the start, or in the middle of training: a hardest tenth of the last epoch and none of this one."""
    n = 2000
    log = KeepLog(n)
    draw = torch.Generator().manual_seed(0)
    labels = torch.zeros(n, dtype=torch.int64)
    for keep in (1.0, 0.5, 0.4, 0.3, 0.2):
        losses = torch.rand(n, generator=draw)
        if keep < below:
            losses[: int(n * part)] = value
        outputs = torch.rand(n, 2, generator=draw)
        outputs[0] = value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoiseAmplified)
            record(log, losses, keep, outputs=outputs, labels=labels)
            assert log.end_epoch()["seen"] == n
    ids, scores = batchtrim.suspects(log)
    assert len(ids) == n
    assert torch.isfinite(scores).all()


def test_a_loss_that_is_not_finite_has_no_variance_in_a_file_either(tmp_path: Path) -> None:
    """It came back as 0."""
    pytest.importorskip("pyarrow")
    log = KeepLog(4)
    record(log, torch.tensor([float("inf"), 1.0, float("nan"), 2.0]))
    log.to_parquet(tmp_path / "log.parquet")
    found = KeepLog.from_parquet(tmp_path / "log.parquet").table()
    torch.testing.assert_close(found, log.table(), equal_nan=True)
    assert found["variance"].isnan().tolist() == [True, False, True, False]


def test_a_merged_log_counts_an_open_epoch() -> None:
    """An epoch that the later log had not closed was missing from the next line."""
    one, later = KeepLog(4), KeepLog(4)
    record(one, LOSSES)
    record(later, LOSSES)
    record(later, LOSSES)
    one.merge(later)
    assert one.end_epoch()["seen"] == 12
    with pytest.raises(ValueError, match="expected a log of None classes, got one of 2"):
        one.merge(KeepLog(4, classes=2))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", torch.tensor([0, 1, 2, 4]), "expected `ids` from 0 to 3, got some from 0 to 4"),
        ("ids", torch.tensor([0, 1, 2, 2**62]), "expected `ids` from 0 to 3"),
        ("ids", torch.tensor([0, 1, 2, -(2**40)]), "expected `ids` from 0 to 3"),
        ("labels", torch.tensor([0, 1, 2, 3]), "expected `labels` from 0 to 2, got 3"),
        ("labels", torch.tensor([0, 1, 2, 2**16]), "expected `labels` from 0 to 2, got 65536"),
        ("labels", torch.tensor([0, 1, 2, 2**32 + 1]), "expected `labels` from 0 to 2"),
    ],
)
def test_ids_and_labels_out_of_range_are_refused(name: str, value: Tensor, message: str) -> None:
    log = KeepLog(4, classes=3)
    given = {"ids": torch.arange(4), name: value}
    with pytest.raises(ValueError, match=message):
        log.record(Choice(LOSSES, batchtrim.hardest()(LOSSES, 0.5)), **given)
    assert log.steps == 0


def test_out_of_range_on_a_device() -> None:
    """Find it at the end of the epoch, where looking at once would stall the device."""
    log = KeepLog(4, classes=3)
    for ids, labels, wrong in (([0, 1, 2, 4], [0, 1, 2, 0], 1), ([0, -1, 2, 3], [0, 1, 3, -1], 2)):
        entries = Entries(
            torch.tensor([i if 0 <= i < 4 else -1 for i in ids]),
            LOSSES,
            torch.ones(4, dtype=torch.bool),
            torch.full((4,), log.steps, dtype=torch.int32),
            *(torch.full((4,), -1, dtype=dtype) for dtype in (torch.int32, torch.float16)),
            torch.tensor(labels, dtype=torch.int32),
        )
        log._pending.append(entries)
        log.steps += 1
        with pytest.raises(ValueError, match=f"from 0 to 3, and `labels` below 3, got {wrong} outside in the epoch"):
            log.end_epoch()
    assert [line["seen"] for line in log.history] == [3, 3], "the epochs are closed all the same"


@pytest.mark.parametrize("damage", ["seen", "epoch", "predicted"])
def test_a_state_of_other_shapes(damage: str) -> None:
    log = KeepLog(4, classes=3)
    state = log.state_dict()
    inside = state if damage == "epoch" else state["columns"]
    inside[damage] = inside[damage][:-1]
    with pytest.raises(ValueError, match=f"expected `state` to hold '{damage}' of shape"):
        log.load_state_dict(state)


class TestWhatIsGivenAndKept:
    @pytest.mark.parametrize("ids", [[2, 0], (2, 0), np.array([2, 0]), np.array([2, 0], dtype=np.uint8), range(2)])
    def test_row_numbers_of_any_collator(self, ids: Any) -> None:
        log, trim = KeepLog(3), Trimmer(0.5)
        trim(torch.tensor([1.0, 5.0]))
        log.record(trim.last, ids=ids)
        assert log.table()["last"][torch.as_tensor(list(ids)).long()].tolist() == [1.0, 5.0]

    def test_names_in_place_of_row_numbers(self) -> None:
        log, trim = KeepLog(3), Trimmer(0.5)
        trim(torch.ones(2))
        with pytest.raises(TypeError, match=r"row numbers in the data set, got \['a', 'b'\]\. Samples with names"):
            log.record(trim.last, ids=["a", "b"])

    def test_an_added_column_does_not_replace_the_logs_own(self, tmp_path: Path) -> None:
        """``seen=...`` stood in the file, and in the log that was read from it."""
        log = _recorded()
        with pytest.raises(ValueError, match="expected `columns` of other names than the log's own, got 'seen'"):
            log.to_parquet(tmp_path / "log.parquet", seen=[9] * log.n)
        with pytest.raises(ValueError, match="expected column 'group' of 3 values, one per sample, got "):
            log.to_parquet(tmp_path / "log.parquet", group=[1, 2])
        log.to_parquet(tmp_path / "log.parquet", group=torch.arange(3, dtype=torch.float32, requires_grad=True))
        assert KeepLog.from_parquet(tmp_path / "log.parquet").table()["seen"].tolist() == [2, 1, 1]

    def test_an_epoch_continues_in_a_log_read_from_a_file(self, tmp_path: Path) -> None:
        log = _recorded()
        log.to_parquet(tmp_path / "log.parquet")
        read = KeepLog.from_parquet(tmp_path / "log.parquet")
        assert read.end_epoch() == log.end_epoch()

    def test_one_huge_loss_has_no_variance(self) -> None:
        log, trim = KeepLog(1), Trimmer(1.0)
        trim(torch.tensor([1e30]))
        log.record(trim.last, ids=torch.tensor([0]))
        assert log.table()["variance"].tolist() == [0.0]

    @pytest.mark.parametrize(
        "damage",
        [
            {"pending": [[1, 2]]},
            {"history": None},
            {"steps": "x"},
            {"pending": [[torch.zeros(1)] * 6 + [torch.zeros(2)]]},
        ],
    )
    def test_a_damaged_state_leaves_the_log_as_it_was(self, damage: dict[str, Any]) -> None:
        log = _recorded()
        with pytest.raises((ValueError, TypeError), match="expected `state"):
            log.load_state_dict({**KeepLog(3).state_dict(), **damage})
        assert log.table()["seen"].tolist() == [2, 1, 1]


def _recorded() -> KeepLog:
    log, trim = KeepLog(3), Trimmer(0.5)
    for ids in ([0, 1], [0, 2]):
        trim(torch.tensor([1.0, 2.0]))
        log.record(trim.last, ids=torch.tensor(ids))
    return log
