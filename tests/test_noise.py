"""The warning of label noise: the keep log's measures of doubt and of samples that stay hard."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import batchtrim
from batchtrim import keeplog, noise
from batchtrim.keeplog import KeepLog
from keeplogs import choice, record


def test_doubt_is_a_sure_prediction_against_the_label():
    log = KeepLog(8)
    sure = torch.tensor([9.0, 8.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # the first two are the surest quarter, for class 0
    outputs = torch.stack([sure, torch.zeros(8)], 1)
    labels = torch.tensor([0, 1, 1, 1, 0, 0, 0, 0])  # of the surest, one is contradicted; of the others, two
    record(log, torch.arange(8), torch.rand(8), choice([1, 2], 8), outputs=outputs, labels=labels)
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
    record(log, torch.arange(100), losses, choice(range(100), 100))
    first = log.end_epoch()
    assert (first["compared"], first["stay_hard"]) == (0, None)
    moved = losses.clone()
    moved[:5] += 50  # five of the easiest go to the middle; the hardest stay
    record(log, torch.arange(100), moved, choice(range(92, 100), 100))
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
                record(log, rows, losses, select(losses, keep), outputs=outputs, labels=labels[rows])
            log.end_epoch()
    warned = [each for each in caught if each.category is keeplog.NoiseAmplified]
    if stubborn and select == batchtrim.hardest():
        assert "stay the hardest" in str(warned[0].message)
        assert "two_sided" in str(warned[0].message)
    else:
        assert not warned


def _train(noise, method):
    """Digits with part of the labels wrong, trimmed; returns the warnings and the log."""
    lab = pytest.importorskip("batchtrim.lab.run.loop")
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


@pytest.mark.slow
def test_warning_is_silent_without_trimming():
    assert not _train("symmetric:0.2", "full")[0], "without trimming there is nothing to amplify"
