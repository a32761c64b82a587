"""Gradients that the kept rows alone cannot give come from all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attacks.base import C, D, Net, backward_of
from torch import Tensor, nn

from batchtrim.testing import check_engine

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says about odd models is not the subject

ones = backward_of(torch.ones_like)


def _run(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(ones(x)))


def test_a_constant_gradient_of_the_batch_is_that_of_all_rows() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    batch = torch.randn(12, D, requires_grad=True), torch.randint(0, C, (12,))
    report = check_engine(Net(_run, {}), batch, nn.CrossEntropyLoss(), engine="shared", verbose=False)
    assert report.verdict == "right", report
