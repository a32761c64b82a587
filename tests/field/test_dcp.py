"""Checkpoints by torch.distributed.checkpoint, which fills a state of the object that is there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from batchtrim import KeepLog, Trimmer, linear, percentile

N = 20
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")


def used(batches: int) -> dict[str, Any]:
    """Return a trimmer with a rule that remembers, and a log, after this many batches in epochs of two."""
    trim, log = Trimmer(linear(1.0, 0.2), total=9, select=percentile(history=50)), KeepLog(N, classes=3)
    for batch in range(batches):
        rows = torch.randperm(N)[: 6 + batch]
        trim(torch.rand(len(rows)))
        log.record(trim.last, ids=rows, outputs=torch.randn(len(rows), 3), labels=rows % 3)
        if batch % 2:
            trim.step()
            log.end_epoch()
    return {"trim": trim, "log": log}


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("after", [0, 5])
def test_states_of_whatever_was_seen(before: int, after: int, tmp_path: Path) -> None:
    """It said that a key is missing or that metadata are invalid, as shapes and keys followed what had been seen."""
    saved, found = used(after), used(before)
    save(saved, checkpoint_id=tmp_path)
    load(found, checkpoint_id=tmp_path)
    mine, theirs = found["trim"], saved["trim"]
    assert (mine.keep, mine.steps) == (theirs.keep, theirs.steps)
    for name, value in mine.stats.compute().items():
        assert value == theirs.stats.compute()[name] or math.isnan(value)
    for name, column in found["log"].table().items():
        assert column.equal(saved["log"].table()[name]) or column.isnan().any(), name
    assert found["log"].history == saved["log"].history
    losses = torch.rand(8)
    assert mine(losses) == theirs(losses), "the generator and the recent losses are the saved ones"
