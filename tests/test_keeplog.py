"""The keep log against a plain oracle that loops over batches and samples."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import batchtrim
from batchtrim import keeplog
from batchtrim.keeplog import KeepLog
from keeplogs import Oracle, choice, random_batches, record

# Trimmer(log=...), which is removed in the next release
AS_BEFORE = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize(
    ("n", "count", "size"), [(50, 10, 16), (7, 200, 5), (1000, 70, 128), (3, 65, 1), (5, 2, 40000)]
)
def test_table_equals_a_plain_loop(n, count, size):
    log, oracle = KeepLog(n), Oracle(n)
    for batch in random_batches(n, count, size):
        record(log, *batch)
        oracle.record(*batch)
    oracle.check(log.table())


def test_table_is_as_by_hand():
    log = KeepLog(3)
    record(log, torch.tensor([0, 1]), torch.tensor([1.0, 3.0]), choice([1], 2))
    record(log, torch.tensor([0, 0]), torch.tensor([2.0, 6.0]), choice([1], 2))
    table = log.table()
    assert table["seen"].tolist() == [3, 1, 0]
    assert table["kept"].tolist() == [1, 1, 0]
    assert table["last_dropped"].tolist() == [1, -1, -1]
    assert table["mean"][0] == 3.0
    assert table["variance"][0] == pytest.approx((4 + 1 + 9) / 3)
    assert (table["first"][0], table["last"][0]) == (1.0, 6.0)


def test_reading_midway_changes_nothing():
    read, unread = KeepLog(30), KeepLog(30)
    for i, batch in enumerate(random_batches(30, 40, 8)):
        record(read, *batch)
        record(unread, *batch)
        if i % 7 == 0:
            read.table()
    for name, column in unread.table().items():
        torch.testing.assert_close(read.table()[name], column, equal_nan=True)


def test_thirty_two_bytes_a_sample():
    assert sum(dtype.itemsize for dtype, _ in keeplog.columns.COLUMNS.values()) <= 32
    log = KeepLog(1_000_000)
    assert sum(column.untyped_storage().nbytes() for column in log._columns.values()) < 64 * 2**20


def test_losses_may_be_changed_in_place_afterwards():
    log = KeepLog(2)
    ids, losses = torch.tensor([0, 1]), torch.tensor([1.0, 2.0])
    record(log, ids, losses, choice([1], 2))
    ids.zero_()
    losses.zero_()
    assert log.table()["last"].tolist() == [1.0, 2.0]


def test_mask_leaves_samples_out():
    log = KeepLog(3)
    ids, losses = torch.tensor([0, 2, -1]), torch.tensor([1.0, 2.0, 9.0])
    record(log, ids, losses, choice([1], 3), mask=torch.tensor([True, True, False]))
    assert log.table()["seen"].tolist() == [1, 0, 1]
    assert log.end_epoch()["seen"] == 2


def test_masked_entries_are_not_compared_with_earlier_ones():
    log, mask = KeepLog(4), torch.tensor([True, True, False, False])
    for losses in ([1.0, 2.0, 9.0, 9.0], [2.0, 1.0, 9.0, 9.0]):
        record(log, torch.arange(4), torch.tensor(losses), choice([0, 1], 4), mask=mask)
        log.end_epoch()
    assert (log.history[-1]["compared"], log.history[-1]["stay_hard"]) == (1, 0.0)


def test_last_prediction_and_its_confidence():
    log = KeepLog(3)
    outputs = torch.log(torch.tensor([[0.1, 0.9], [0.75, 0.25]]))
    record(log, torch.tensor([0, 1]), torch.ones(2), choice([0], 2), outputs=outputs)
    record(log, torch.tensor([1]), torch.ones(1), choice([0], 1))
    table = log.table()
    assert table["predicted"].tolist() == [1, 0, -1]
    assert table["confidence"][:2].tolist() == pytest.approx([0.9, 0.75], abs=1e-3)


def test_epoch_line_counts_by_class():
    log = KeepLog(4, classes=3)
    labels = torch.tensor([0, 0, 2, 2])
    record(log, torch.arange(4), torch.arange(4.0), choice([1, 2, 3], 4), labels=labels)
    line = log.end_epoch()
    assert (line["seen"], line["kept"], line["keep"], line["steps"]) == (4, 3, 0.75, 1)
    assert line["class_seen"] == [2, 0, 2]
    assert line["class_kept"] == [1, 0, 2]
    record(log, torch.arange(1), torch.ones(1), choice([0], 1), labels=labels[:1])
    assert log.end_epoch()["class_seen"] == [1, 0, 0]


def test_samples_without_a_label_and_masked_ones_are_not_in_doubt():
    log, mask = KeepLog(5, classes=2), torch.tensor([True, True, True, True, False])
    outputs = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 9.0], [0.0, 9.0], [9.0, 0.0]])
    labels = torch.tensor([0, 1, -1, -1, 1])
    record(log, torch.arange(5), torch.ones(5), choice([0, 2, 4], 5), mask=mask, outputs=outputs, labels=labels)
    line = log.end_epoch()
    assert (line["doubt"], line["doubt_kept"], line["class_seen"]) == (0.0, 0.0, [1, 1])


def test_merge_is_as_if_recorded_one_after_the_other():
    batches = list(random_batches(40, 30, 12))
    batches.append((torch.tensor([40]), torch.tensor([5.0]), choice([0], 1)))  # a sample that the first log lacks
    whole, first, second = KeepLog(41), KeepLog(41), KeepLog(41)
    for i, batch in enumerate(batches):
        record(whole, *batch)
        record(first if i < 17 else second, *batch)
    first.merge(second)
    assert first.steps == whole.steps
    for name, column in whole.table().items():
        torch.testing.assert_close(first.table()[name], column, equal_nan=True)


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    whole, part = KeepLog(40, classes=2), KeepLog(40, classes=2)
    for i, (ids, losses, selection) in enumerate(random_batches(40, 30, 12)):
        if i == 11:
            torch.save(part.state_dict(), tmp_path / "log.pt")
            part = KeepLog(40, classes=2)
            part.load_state_dict(torch.load(tmp_path / "log.pt", weights_only=True))
        for log in (whole, part):
            record(log, ids, losses, selection, labels=ids % 2, outputs=torch.stack([losses, 1.5 - losses], 1))
    assert part.end_epoch() == whole.end_epoch()
    for name, column in whole.table().items():
        torch.testing.assert_close(part.table()[name], column, equal_nan=True)
    with pytest.raises(ValueError, match="log with n=41, got n=40"):
        KeepLog(41, classes=2).load_state_dict(whole.state_dict())
    with pytest.raises(ValueError, match="of version 2, got 1"):
        KeepLog(40, classes=2).load_state_dict({**whole.state_dict(), "version": 1})


def test_parquet_round_trip(tmp_path):
    pytest.importorskip("pyarrow")
    log = KeepLog(40, classes=2)
    for ids, losses, selection in random_batches(40, 9, 12):
        record(log, ids, losses, selection, labels=ids % 2, outputs=torch.rand(12, 2))
    log.end_epoch()
    log.to_parquet(tmp_path / "log.parquet", label=[i % 2 for i in range(40)])
    found = KeepLog.from_parquet(tmp_path / "log.parquet")
    assert (found.steps, found.history, found.classes) == (log.steps, log.history, 2)
    for name, column in log.table().items():
        torch.testing.assert_close(found.table()[name], column, equal_nan=True)
    import pyarrow.parquet

    assert "label" in pyarrow.parquet.read_table(tmp_path / "log.parquet").column_names


def test_parquet_without_pyarrow_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'batchtrim\[lab\]'"):
        KeepLog(3).to_parquet(tmp_path / "log.parquet")


@AS_BEFORE
def test_trimmer_records_what_it_keeps():
    log = KeepLog(10)
    trim = batchtrim.Trimmer(0.5, log=log)
    losses = torch.tensor([0.1, 4.0, 3.0, 0.2], requires_grad=True)
    loss = trim(losses, ids=torch.tensor([9, 8, 7, 6]))
    assert loss.item() == 3.5
    assert log.table()["kept"].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]
    trim.select(losses, ids=torch.tensor([9, 8, 7, 6]))
    assert log.table()["seen"][6:].tolist() == [2, 2, 2, 2]
    other = batchtrim.Trimmer(0.5, log=KeepLog(10))
    other.load_state_dict(trim.state_dict())
    assert other.log.table()["kept"].tolist() == [0, 0, 0, 0, 0, 0, 0, 2, 2, 0]


_RANK = """
import sys, torch
import torch.distributed as dist
import batchtrim
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
log = batchtrim.KeepLog(40, classes=2, distributed=True)
for step in range(70):  # more than a log holds back, and batches of unequal size
    ids, losses = torch.load(f"{folder}/{step}-{rank}.pt")
    last = batchtrim.Choice(losses, batchtrim.hardest()(losses, 0.5))
    log.record(last, ids=ids, labels=ids % 2, outputs=torch.stack([losses, -losses], 1))
try:
    log.table()
except RuntimeError as error:
    assert "Call it on every rank" in str(error)
log.end_epoch()
torch.save((log.table(), log.history), f"{folder}/out-{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_hold_the_log_of_one(tmp_path):
    """Each rank ends with what one process would have recorded from both ranks' batches in turn."""
    generator = torch.Generator().manual_seed(0)
    one = KeepLog(40, classes=2)
    for step in range(70):
        for rank in range(2):
            ids = torch.randint(40, (8 - 3 * rank * (step % 2),), generator=generator)
            losses = torch.rand(len(ids), generator=generator)
            torch.save((ids, losses), tmp_path / f"{step}-{rank}.pt")
            selection = batchtrim.hardest()(losses, 0.5)
            record(one, ids, losses, selection, labels=ids % 2, outputs=torch.stack([losses, -losses], 1))
    line, table = one.end_epoch(), one.table()
    ranks = [subprocess.Popen([sys.executable, "-c", _RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for rank in range(2):
        found, history = torch.load(tmp_path / f"out-{rank}.pt")
        assert history[0]["class_kept"] == line["class_kept"]
        assert (history[0]["steps"], line["steps"]) == (70, 140)
        for name in ("seen", "kept", "first", "last", "mean", "variance", "predicted", "confidence"):
            torch.testing.assert_close(found[name], table[name], equal_nan=True, rtol=1e-5, atol=1e-6)


@AS_BEFORE
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: KeepLog(0), "expected `n` to be at least 1"),
        (lambda: batchtrim.Trimmer(0.5, log=KeepLog(3))(torch.ones(2)), "expected `ids`"),
        (lambda: batchtrim.Trimmer(0.5, unit="element", log=KeepLog(3)), "expected `unit` 'sample' with a `log`"),
        (
            lambda: record(KeepLog(3), torch.tensor([0, 3]), torch.ones(2), choice([0], 2)),
            "expected `ids` from 0 to 2",
        ),
        (
            lambda: record(KeepLog(3), torch.tensor([0, -1]), torch.ones(2), choice([0], 2)),
            "expected `ids` from 0 to 2",
        ),
        (lambda: record(KeepLog(3), torch.tensor([0.0, 1.0]), torch.ones(2), choice([0], 2)), "`ids` to be integers"),
        (
            lambda: record(KeepLog(3), torch.tensor([True, False]), torch.ones(2), choice([0], 2)),
            "got a tensor of shape",
        ),
        (lambda: record(KeepLog(3), torch.ones(2) * 1j, torch.ones(2), choice([0], 2)), "`ids` to be integers"),
        (lambda: record(KeepLog(3), torch.tensor([0]), torch.ones(2), choice([0], 2)), "one per sample"),
        (
            lambda: record(
                KeepLog(3, classes=2), torch.arange(3), torch.ones(3), choice([0], 3), labels=torch.tensor([0, 1, 2])
            ),
            "expected `labels` from 0 to 1, got 2",
        ),
        (lambda: KeepLog(3).merge(KeepLog(4)), "expected a log of 3 samples, got one of 4"),
    ],
)
def test_errors_say_what_was_expected(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@AS_BEFORE
@pytest.mark.parametrize("name", ["labels", "outputs"])
def test_lists_are_not_tensors(name):
    given = {"ids": torch.arange(2), "labels": torch.arange(2), "outputs": torch.ones(2, 2), name: [0, 1]}
    with pytest.raises(TypeError, match=rf"expected `{name}` to be a tensor, got \[0, 1\]"):
        batchtrim.Trimmer(0.5, log=KeepLog(3))(torch.ones(2), **given)
