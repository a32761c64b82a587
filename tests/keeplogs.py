"""Batches for the tests of the keep log, and the same log kept in plain lists."""

from __future__ import annotations

import math

import pytest
import torch

import batchtrim
from batchtrim.selection import Selection


def choice(rows, size):
    return Selection(indices=torch.tensor(rows, dtype=torch.int64), size=size, candidates=size)


def record(log, ids, losses, selection, mask=None, **beside):
    log.record(batchtrim.Choice(losses, selection, mask), ids=ids, **beside)


def random_batches(n, count, size, seed=0, duplicates=True):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        if duplicates:
            ids = torch.randint(n, (size,), generator=generator)
        else:
            ids = torch.randperm(n, generator=generator)[:size]
        losses = torch.rand(size, generator=generator) * 3
        yield ids, losses, batchtrim.hardest()(losses, 0.4)


class Oracle:
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
