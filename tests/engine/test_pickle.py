"""A step can be pickled and copied, whatever its engine has traced or measured."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from batchtrim import TrimmedForward, Trimmer
from tiers import few

COPIES: dict[str, Callable[[TrimmedForward], TrimmedForward]] = {
    "pickle": lambda step: pickle.loads(pickle.dumps(step)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize(
    ("engine", "used", "how"),
    few(
        itertools.product(["exact", "two_pass", "shared", "auto"], [False, True], COPIES),
        [
            ("exact", True, "pickle"),
            ("exact", True, "deepcopy"),
            ("two_pass", True, "pickle"),
        ],
    ),
)
def test_a_step_continues_unchanged_after_pickle_and_deepcopy(engine: str, used: bool, how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    step = TrimmedForward(model, nn.CrossEntropyLoss(), Trimmer(0.5), engine)
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    if used:
        step(x, y).backward()
    copied = COPIES[how](step)
    loss = step(x, y)
    assert copied.last is None
    assert copied(x, y).item() == pytest.approx(loss.item())
    assert repr(copied).partition(" ")[0] == repr(step).partition(" ")[0]
