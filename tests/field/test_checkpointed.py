"""A trimmer inside a function that torch.utils.checkpoint computes a second time, in the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import batchtrim
from batchtrim import Trimmer

X, Y = torch.randn(8, 5), torch.arange(8) % 3


def gradient(trim: Trimmer, **options: Any) -> Tensor:
    weight = torch.linspace(-1.0, 1.0, 15).reshape(5, 3).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return trim(F.cross_entropy(x @ weight, Y, reduction="none"))

    (checkpoint(loss, X.clone().requires_grad_(), **options) if options else loss(X)).backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rule", [batchtrim.hardest(), batchtrim.between(skip=0.2), batchtrim.loss_mass()], ids=repr)
def test_the_same_choice_counted_once(rule: Any, reentrant: bool) -> None:
    trim = Trimmer(0.5, select=rule)
    torch.testing.assert_close(gradient(trim, use_reentrant=reentrant), gradient(Trimmer(0.5, select=rule)))
    assert trim.stats.compute()["batches"] == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rule", [batchtrim.uniform(), batchtrim.percentile()], ids=repr)
def test_a_rule_that_would_choose_otherwise(rule: Any, reentrant: bool) -> None:
    """The backward pass drew again: the gradient was that of other samples than the loss."""
    with pytest.raises(ValueError, match=r"chooses the same again inside torch\.utils\.checkpoint"):
        gradient(Trimmer(0.5, select=rule), use_reentrant=reentrant)
