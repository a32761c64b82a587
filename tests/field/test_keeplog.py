"""Keep logs as their users write them: what went wrong without a word, and what ended a training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import batchtrim
from batchtrim import Choice, KeepLog, Selection, Trimmer

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
        with pytest.raises(TypeError, match="unexpected keyword argument 'id'"):
            call(LOSSES, id=IDS)


def test_the_forms_of_before_work_and_say_that_they_go() -> None:
    log = KeepLog(10)
    with pytest.warns(
        DeprecationWarning, match=r"Trimmer\(log=...\) goes in the next release: call `log.record\(trim.last"
    ):
        trim = Trimmer(0.5, log=log)
    with pytest.warns(DeprecationWarning, match=r"trim\(losses, ids=...\) goes in the next release") as caught:
        trim(LOSSES, ids=IDS, labels=torch.zeros(4, dtype=torch.int64))
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"record\(ids, losses, selection\) goes in the next release"):
        log.record(IDS, LOSSES, batchtrim.hardest()(LOSSES, 0.5))  # type: ignore[arg-type]
    assert log.table()["kept"].tolist() == [0] * 7 + [2, 2, 0]


def test_a_masked_sample_is_not_seen() -> None:
    mask = torch.tensor([True, False, True, True])
    trim, log = Trimmer(0.5), KeepLog(10)
    trim(LOSSES, mask=mask)
    log.record(trim.last, ids=IDS)
    assert log.table()["seen"][6:].tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("engine", ["exact", "two_pass", "shared"])
def test_a_sample_whose_labels_are_all_ignored_is_not_seen(engine: str) -> None:
    """What a TrimmedForward leaves had no mask: an ignored sample counted as one that was dropped."""
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
        step = batchtrim.engine.batch.Step(LOSSES.mean(), LOSSES, outputs, selection)
        log.record(step, ids=torch.arange(4), labels=labels)
        return log.table()["predicted"].tolist()

    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    assert predicted(logits) == predicted(Output(logits=logits)) == [1, 0, 1, 0]
    for outputs in (logits[:, :1], logits[:2], logits[:, :, None], logits.long(), (logits,), {"a": 1}, None, "text"):
        assert predicted(outputs) == [-1] * 4


@pytest.mark.parametrize(
    ("last", "ids", "message"),
    [
        (None, IDS, "expected `last` to be what was chosen, got None. Record after the trimmer was called"),
        (Choice(LOSSES, Selection(torch.tensor([1]), 5, 5)), IDS, "expected `last.selection` to be of 4 losses"),
        (Choice(LOSSES, Selection(torch.tensor([1]), 4, 4)), IDS[:3], "`ids` to be integers of shape"),
        (Choice(LOSSES, Selection(torch.tensor([1]), 4, 4)), None, "expected `ids`, the samples' row numbers"),
        (Choice(LOSSES, Selection(torch.tensor([1]), 4, 4)), IDS + 1, "expected `ids` from 0 to 9, got some from 7"),
        (LOSSES, IDS, "expected `last` to be what was chosen, such as `trim.last`, got a tensor"),
        ("last", IDS, "expected `last` to have losses and a selection"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded(last: object, ids: Tensor | None, message: str) -> None:
    log = KeepLog(10)
    with pytest.raises((ValueError, TypeError), match=message):
        log.record(last, ids=ids)  # type: ignore[arg-type]
    assert log.steps == 0


def test_entries_are_no_samples() -> None:
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
