"""A step can be pickled and copied, whatever its engine has traced or measured."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from batchtrim import TrimmedForward, Trimmer
from tiers import few


@pytest.mark.parametrize(
    ("engine", "used"),
    few(
        itertools.product(["exact", "two_pass", "shared", "auto"], [False, True]),
        [("exact", True), ("two_pass", True), ("shared", True)],
    ),
)
def test_a_step_continues_unchanged_after_pickle_and_deepcopy(engine: str, used: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    step = TrimmedForward(model, nn.CrossEntropyLoss(), Trimmer(0.5), engine)
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    if used:
        step(x, y).backward()
    copies = [pickle.loads(pickle.dumps(step)), copy.deepcopy(step)]
    loss = step(x, y)
    for each in copies:
        assert each.last is None
        assert each(x, y).item() == pytest.approx(loss.item())
        assert repr(each).partition(" ")[0] == repr(step).partition(" ")[0]
