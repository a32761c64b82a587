"""Learning-rate schedules against torch's own."""

from __future__ import annotations

import pytest
import torch

from batchtrim.lab.run.optimizers import lr_factor


def test_onecycle_is_torch_s() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=101, cycle_momentum=False)
    for step in range(101):
        # torch ends the rise one step early: its 30 % are 0.3 * total - 1 steps
        assert lr_factor("onecycle", step / 100) == pytest.approx(theirs.get_last_lr()[0], abs=0.04)
        if step < 100:
            optimizer.step()
            theirs.step()


def test_the_other_learning_rates() -> None:
    assert [lr_factor("step", p) for p in (0, 0.49, 0.5, 0.75)] == [1.0, 1.0, 0.1, pytest.approx(0.01)]
    assert [lr_factor("cosine", p) for p in (0, 0.5, 1)] == pytest.approx([1.0, 0.5, 0.0])
    assert [lr_factor("triangle", p) for p in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])
    assert lr_factor("constant", 0.9) == 1.0
