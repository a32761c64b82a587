"""The keep log against a plain oracle that loops over batches and samples."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import pytest
import torch

import batchtrim
from batchtrim import keeplog, noise
from batchtrim.keeplog import KeepLog
from batchtrim.selection import Selection

# Trimmer(log=...), which goes in the next release
AS_BEFORE = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _choice(rows, size):
    return Selection(indices=torch.tensor(rows, dtype=torch.int64), size=size, candidates=size)


def _record(log, ids, losses, selection, mask=None, **beside):
    log.record(batchtrim.Choice(losses, selection, mask), ids=ids, **beside)


def _batches(n, count, size, seed=0, duplicates=True):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        if duplicates:
            ids = torch.randint(n, (size,), generator=generator)
        else:
            ids = torch.randperm(n, generator=generator)[:size]
        losses = torch.rand(size, generator=generator) * 3
        yield ids, losses, batchtrim.hardest()(losses, 0.4)


class _Oracle:
    """The same record as lists, kept one sample at a time."""

    def __init__(self, n):
        self.losses = [[] for _ in range(n)]
        self.kept = [0] * n
        self.last_dropped = [-1] * n
        self.steps = 0

    def record(self, ids, losses, selection):
        kept = set(selection.indices.tolist())
        for row, (sample, loss) in enumerate(zip(ids.tolist(), losses.tolist(), strict=True)):
            self.losses[sample].append(loss)
            if row in kept:
                self.kept[sample] += 1
            else:
                self.last_dropped[sample] = self.steps
        self.steps += 1

    def check(self, table):
        for sample, losses in enumerate(self.losses):
            row = {name: column[sample].item() for name, column in table.items()}
            assert row["seen"] == len(losses)
            assert row["kept"] == self.kept[sample]
            assert row["last_dropped"] == self.last_dropped[sample]
            if not losses:
                assert all(math.isnan(row[name]) for name in ("first", "last", "mean", "variance", "keep_rate"))
                continue
            mean = sum(losses) / len(losses)
            assert row["first"] == pytest.approx(losses[0])
            assert row["last"] == pytest.approx(losses[-1])
            assert row["mean"] == pytest.approx(mean, rel=1e-5)
            assert row["variance"] == pytest.approx(sum((x - mean) ** 2 for x in losses) / len(losses), abs=1e-5)
            assert row["keep_rate"] == pytest.approx(self.kept[sample] / len(losses))


@pytest.mark.parametrize(
    ("n", "count", "size"), [(50, 10, 16), (7, 200, 5), (1000, 70, 128), (3, 65, 1), (5, 2, 40000)]
)
def test_table_equals_a_plain_loop(n, count, size):
    log, oracle = KeepLog(n), _Oracle(n)
    for batch in _batches(n, count, size):
        _record(log, *batch)
        oracle.record(*batch)
    oracle.check(log.table())


def test_by_hand():
    log = KeepLog(3)
    _record(log, torch.tensor([0, 1]), torch.tensor([1.0, 3.0]), _choice([1], 2))
    _record(log, torch.tensor([0, 0]), torch.tensor([2.0, 6.0]), _choice([1], 2))
    table = log.table()
    assert table["seen"].tolist() == [3, 1, 0]
    assert table["kept"].tolist() == [1, 1, 0]
    assert table["last_dropped"].tolist() == [1, -1, -1]
    assert table["mean"][0] == 3.0
    assert table["variance"][0] == pytest.approx((4 + 1 + 9) / 3)
    assert (table["first"][0], table["last"][0]) == (1.0, 6.0)


def test_reading_midway_changes_nothing():
    read, unread = KeepLog(30), KeepLog(30)
    for i, batch in enumerate(_batches(30, 40, 8)):
        _record(read, *batch)
        _record(unread, *batch)
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
    _record(log, ids, losses, _choice([1], 2))
    ids.zero_()
    losses.zero_()
    assert log.table()["last"].tolist() == [1.0, 2.0]


def test_mask_leaves_samples_out():
    log = KeepLog(3)
    ids, losses = torch.tensor([0, 2, -1]), torch.tensor([1.0, 2.0, 9.0])
    _record(log, ids, losses, _choice([1], 3), mask=torch.tensor([True, True, False]))
    assert log.table()["seen"].tolist() == [1, 0, 1]
    assert log.end_epoch()["seen"] == 2


def test_last_prediction_and_its_confidence():
    log = KeepLog(3)
    outputs = torch.log(torch.tensor([[0.1, 0.9], [0.75, 0.25]]))
    _record(log, torch.tensor([0, 1]), torch.ones(2), _choice([0], 2), outputs=outputs)
    _record(log, torch.tensor([1]), torch.ones(1), _choice([0], 1))
    table = log.table()
    assert table["predicted"].tolist() == [1, 0, -1]
    assert table["confidence"][:2].tolist() == pytest.approx([0.9, 0.75], abs=1e-3)


def test_epoch_line_counts_by_class():
    log = KeepLog(4, classes=3)
    labels = torch.tensor([0, 0, 2, 2])
    _record(log, torch.arange(4), torch.arange(4.0), _choice([1, 2, 3], 4), labels=labels)
    line = log.end_epoch()
    assert (line["seen"], line["kept"], line["keep"], line["steps"]) == (4, 3, 0.75, 1)
    assert line["class_seen"] == [2, 0, 2]
    assert line["class_kept"] == [1, 0, 2]
    _record(log, torch.arange(1), torch.ones(1), _choice([0], 1), labels=labels[:1])
    assert log.end_epoch()["class_seen"] == [1, 0, 0]


def test_doubt_is_a_sure_prediction_against_the_label():
    log = KeepLog(8)
    sure = torch.tensor([9.0, 8.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # the first two are the surest quarter, for class 0
    outputs = torch.stack([sure, torch.zeros(8)], 1)
    labels = torch.tensor([0, 1, 1, 1, 0, 0, 0, 0])  # of the surest, one is contradicted; of the others, two
    _record(log, torch.arange(8), torch.rand(8), _choice([1, 2], 8), outputs=outputs, labels=labels)
    line = log.end_epoch()
    assert (line["doubt"], line["doubt_kept"]) == (1 / 8, 1 / 2)


def _history(keeps, doubts, kept=1000):
    return [{"keep": keep, "kept": kept, "doubt_kept": doubt} for keep, doubt in zip(keeps, doubts, strict=True)]


@pytest.mark.parametrize(
    ("keeps", "doubts", "kept", "amplified"),
    [
        ([1.0, 0.6, 0.2], [0.06, 0.04, 0.10], 1000, True),
        ([1.0, 0.6, 0.2], [0.06, 0.04, 0.055], 1000, False),  # has not risen half as much again
        ([1.0, 0.6, 0.2], [0.15, 0.09, 0.06], 1000, False),  # a network that learns little, on clean data
        ([1.0, 0.6, 0.2], [0.02, 0.002, 0.01], 1000, False),  # rises, but next to nothing is in doubt
        ([1.0, 1.0, 1.0], [0.06, 0.04, 0.10], 1000, False),  # nothing is dropped
        ([1.0, 0.6, 0.2], [0.06, 0.04, 0.10], 100, False),  # ten samples
        ([1.0, 0.6, 0.2], [None, None, None], 1000, False),
        ([0.2], [0.3], 1000, False),
    ],
)
def test_when_doubt_rises(keeps, doubts, kept, amplified):
    assert noise.doubt_rises(_history(keeps, doubts, kept)) is amplified


def _lines(keeps, excess, compared=500, hard_kept=1.0):
    return [
        {
            "keep": keep,
            "doubt_kept": 0.1,
            "compared": compared,
            "stay_hard": 0.5 + excess,
            "stay_easy": 0.5,
            "hard_kept": hard_kept,
        }
        for keep in keeps
    ]


@pytest.mark.parametrize(
    ("lines", "stay"),
    [
        (_lines([1.0, 0.5, 0.45, 0.4], 0.2), True),
        (_lines([1.0, 0.5, 0.45, 0.4], 0.1), False),  # as on clean data
        (_lines([1.0, 0.5, 0.45, 0.41], 0.2), False),  # too much is kept to judge
        (_lines([1.0, 0.5, 0.45, 0.4], 0.2, compared=100), False),
        (_lines([1.0, 0.9, 0.7, 0.4], 0.2), False),  # one epoch below 0.6 is 500 samples
        (_lines([0.4, 0.4, 0.4, 0.4], 0.2), False),  # keep does not fall
        (_lines([1.0, 0.5, 0.45, 0.4], 0.2, hard_kept=0.5), False),  # half of the hardest is left out
        ([{**line, "doubt_kept": None} for line in _lines([1.0, 0.5, 0.45, 0.4], 0.2)], False),
        ([{**line, "compared": 0, "stay_hard": None} for line in _lines([1.0, 0.5, 0.45, 0.4], 0.2)], False),
    ],
)
def test_when_the_hardest_stay(lines, stay):
    assert noise.hardest_stay(lines) is stay


def _stay_by_sorting(before, now, kept):
    """As noise.stays says it, with the losses of samples that have both; no ties."""
    k = math.ceil(len(now) * noise.EXTREME_PART)
    order = [sorted(range(len(now)), key=losses.__getitem__) for losses in (before.tolist(), now.tolist())]
    hard, easy = [set(each[-k:]) for each in order], [set(each[:k]) for each in order]
    return [k, len(hard[0] & hard[1]), k, len(easy[0] & easy[1]), k, len(hard[1] & set(kept))]


@pytest.mark.parametrize("n", [1, 7, 10, 300])
def test_stays_counts_the_extremes(n):
    generator = torch.Generator().manual_seed(n)
    before = torch.rand(n, generator=generator)
    now = before + 0.3 * torch.rand(n, generator=generator)
    kept = batchtrim.hardest()(now, 0.05).indices.tolist()
    expected = _stay_by_sorting(before, now, kept)
    rows = torch.randperm(2 * n, generator=generator)  # among as many that have no earlier loss
    at = rows[:n]
    mixed = [torch.full((2 * n,), math.nan), torch.rand(2 * n, generator=generator) * 9 - 3]
    mixed[0][at], mixed[1][at] = before, now
    compared, mask = torch.zeros(2 * n, dtype=torch.bool), torch.zeros(2 * n, dtype=torch.bool)
    compared[at] = True
    mask[at[kept]] = True
    assert noise.stays(*mixed, compared, mask).tolist() == expected


def test_epoch_line_says_who_stayed():
    log = KeepLog(100)
    losses = torch.arange(100.0)
    _record(log, torch.arange(100), losses, _choice(range(100), 100))
    first = log.end_epoch()
    assert (first["compared"], first["stay_hard"]) == (0, None)
    moved = losses.clone()
    moved[:5] += 50  # five of the easiest go to the middle; the hardest stay
    _record(log, torch.arange(100), moved, _choice(range(92, 100), 100))
    line = log.end_epoch()
    assert (line["compared"], line["stay_hard"], line["stay_easy"], line["hard_kept"]) == (10, 1.0, 0.5, 0.8)


@pytest.mark.parametrize("stubborn", [True, False])
@pytest.mark.parametrize("select", [batchtrim.hardest(), batchtrim.between(skip=0.1), batchtrim.uniform()])
def test_warning_where_the_hardest_stay_however_often_kept(stubborn, select):
    """Losses of a made-up training: each sample's is new in every epoch, but for a stubborn tenth."""
    generator = torch.Generator().manual_seed(0)
    n = 6000
    log, labels = KeepLog(n), torch.zeros(n, dtype=torch.int64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for keep in (1.0, 0.8, 0.6, 0.5, 0.45, 0.4):
            for rows in torch.randperm(n, generator=generator).split(500):
                losses = torch.rand(len(rows), generator=generator) + (stubborn & (rows < n // 20))
                outputs = torch.tensor([1.0, 0.0]).expand(len(rows), 2)  # contradicts no label
                _record(log, rows, losses, select(losses, keep), outputs=outputs, labels=labels[rows])
            log.end_epoch()
    warned = [each for each in caught if each.category is keeplog.NoiseAmplified]
    if stubborn and select == batchtrim.hardest():
        assert "stay the hardest" in str(warned[0].message)
        assert "two_sided" in str(warned[0].message)
    else:
        assert not warned


def _train(noise, method):
    """Digits with part of the labels wrong, trimmed; returns the warnings and the log."""
    lab = pytest.importorskip("batchtrim.lab.run.train")
    from batchtrim.lab.run.config import RunConfig
    from batchtrim.lab.run.loading import load_images

    config = RunConfig(method=method, epochs=20, label_noise=noise, seed=1).resolved()
    images = load_images(config)
    log = KeepLog(len(images.train_labels), classes=10)
    training = lab.Training(config, images, log=log)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", keeplog.NoiseAmplified)
        for _ in range(20):
            training.train_epoch()
    clean = load_images(RunConfig(seed=1).resolved()).train_labels
    return [each for each in caught if each.category is keeplog.NoiseAmplified], log, clean != images.train_labels


def test_warning_is_right_on_noisy_and_silent_on_clean_data():
    warned, log, wrong = _train("symmetric:0.2", "trim")
    assert len(warned) == 1, [line["doubt_kept"] for line in log.history]
    assert "two_sided" in str(warned[0].message)
    ids, scores = batchtrim.suspects(log, top=int(wrong.sum()))
    assert wrong[ids].float().mean() > 0.9
    assert scores[0] == 1.0
    assert (scores.diff() <= 0).all()
    assert not _train("none", "trim")[0]
    assert not _train("symmetric:0.2", "full")[0], "without trimming there is nothing to amplify"


def test_merge_is_as_if_recorded_one_after_the_other():
    batches = list(_batches(40, 30, 12))
    whole, first, second = KeepLog(40), KeepLog(40), KeepLog(40)
    for i, batch in enumerate(batches):
        _record(whole, *batch)
        _record(first if i < 17 else second, *batch)
    first.merge(second)
    assert first.steps == whole.steps
    for name, column in whole.table().items():
        torch.testing.assert_close(first.table()[name], column, equal_nan=True)


def test_resumed_log_goes_on_as_an_uninterrupted_one(tmp_path):
    whole, part = KeepLog(40, classes=2), KeepLog(40, classes=2)
    for i, (ids, losses, selection) in enumerate(_batches(40, 30, 12)):
        if i == 11:
            torch.save(part.state_dict(), tmp_path / "log.pt")
            part = KeepLog(40, classes=2)
            part.load_state_dict(torch.load(tmp_path / "log.pt", weights_only=True))
        for log in (whole, part):
            _record(log, ids, losses, selection, labels=ids % 2, outputs=torch.stack([losses, 1.5 - losses], 1))
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
    for ids, losses, selection in _batches(40, 9, 12):
        _record(log, ids, losses, selection, labels=ids % 2, outputs=torch.rand(12, 2))
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
    assert "Call end_epoch() on every rank" in str(error)
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
            _record(one, ids, losses, selection, labels=ids % 2, outputs=torch.stack([losses, -losses], 1))
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
            lambda: _record(KeepLog(3), torch.tensor([0, 3]), torch.ones(2), _choice([0], 2)),
            "expected `ids` from 0 to 2",
        ),
        (
            lambda: _record(KeepLog(3), torch.tensor([0, -1]), torch.ones(2), _choice([0], 2)),
            "expected `ids` from 0 to 2",
        ),
        (lambda: _record(KeepLog(3), torch.tensor([0.0, 1.0]), torch.ones(2), _choice([0], 2)), "`ids` to be integers"),
        (
            lambda: _record(KeepLog(3), torch.tensor([True, False]), torch.ones(2), _choice([0], 2)),
            "got a tensor of shape",
        ),
        (lambda: _record(KeepLog(3), torch.ones(2) * 1j, torch.ones(2), _choice([0], 2)), "`ids` to be integers"),
        (lambda: _record(KeepLog(3), torch.tensor([0]), torch.ones(2), _choice([0], 2)), "one per sample"),
        (
            lambda: _record(
                KeepLog(3, classes=2), torch.arange(3), torch.ones(3), _choice([0], 3), labels=torch.tensor([0, 1, 2])
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
@pytest.mark.parametrize("name", ["ids", "labels", "outputs"])
def test_lists_are_no_tensors(name):
    given = {"ids": torch.arange(2), "labels": torch.arange(2), "outputs": torch.ones(2, 2), name: [0, 1]}
    with pytest.raises(TypeError, match=rf"expected `{name}` to be a tensor, got \[0, 1\]"):
        batchtrim.Trimmer(0.5, log=KeepLog(3))(torch.ones(2), **given)
