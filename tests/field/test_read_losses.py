"""Loss functions that a trainer's model calls: each is read un-reduced, weights included, or refused by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchtrim import Trimmer
from batchtrim.integrations._loss_finder import LossFinder
from batchtrim.integrations._recorder import NotFound

NUMBERS, SIGNS = torch.randn(6, 3), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
WEIGHT = torch.rand(6, 3) + 0.1
CLASSES = torch.tensor([0, 1, 2, 2, 1, 0])
weighted = pytest.mark.skipif("weight" not in inspect.signature(F.mse_loss).parameters, reason="newer torch has it")

# (loss function of outputs and targets, targets, whether the mean divides by WEIGHT)
CASES = {
    "mse_loss": (lambda o, t, **r: F.mse_loss(o, t, weight=WEIGHT, **r), NUMBERS, True),
    "l1_loss": (lambda o, t, **r: F.l1_loss(o, t, weight=WEIGHT, **r), NUMBERS, True),
    "huber_loss": (lambda o, t, **r: F.huber_loss(o, t, weight=WEIGHT, **r), NUMBERS, False),
    "gaussian": (lambda o, t, **r: F.gaussian_nll_loss(o, t, WEIGHT, **r), NUMBERS, False),
    "cosine": (lambda o, t, **r: F.cosine_embedding_loss(o, o.detach() + 1.0, t, **r), SIGNS, False),
    "ranking": (lambda o, t, **r: F.margin_ranking_loss(o[:, 0], o[:, 1], t, margin=1.0, **r), SIGNS, False),
    "hinge": (lambda o, t, **r: F.hinge_embedding_loss(o[:, 0], t, **r), SIGNS, False),
    "multi margin": (lambda o, t, **r: F.multi_margin_loss(o, t, weight=WEIGHT[0], **r), CLASSES, False),
    "multi-label": (lambda o, t, **r: F.multilabel_margin_loss(o, t, **r), CLASSES.reshape(2, 3).repeat(3, 1), False),
}


def found(loss: Callable[..., Tensor], outputs: Tensor, targets: Tensor, keep: float, unit: str = "sample") -> Tensor:
    losses = LossFinder(unit)(lambda: loss(outputs, targets), lambda output: output, len(outputs), [targets])
    return Trimmer(keep, unit=unit)(losses.losses, rank_by=losses.scores)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=weighted if name in ("mse_loss", "l1_loss", "huber_loss") else ()) for name in CASES],
)
def test_losses_are_those_of_the_function(name: str) -> None:
    """torch's l1_loss does not pass its weight on to a torch function mode: it was read, and trained on, without."""
    loss, targets, divides = CASES[name]
    outputs = torch.randn(6, 3, requires_grad=True)
    torch.testing.assert_close(found(loss, outputs, targets, 1.0), loss(outputs, targets))
    values = loss(outputs, targets, reduction="none").reshape(6, -1)
    divisors = WEIGHT if divides else torch.ones_like(values)
    rows = (values.sum(1) / divisors.sum(1)).topk(3).indices
    expected = values[rows].sum() / divisors[rows].sum()
    kept = found(loss, outputs, targets, 0.5)
    torch.testing.assert_close(kept, expected)
    mine, theirs = (torch.autograd.grad(each, outputs, retain_graph=True)[0] for each in (kept, expected))
    torch.testing.assert_close(mine, theirs)


@weighted
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weighted_losses_that_the_model_reduces_itself(reduction: str) -> None:
    outputs = torch.randn(6, 3, requires_grad=True)

    def loss(o: Tensor, t: Tensor) -> Tensor:
        losses = F.l1_loss(o, t, weight=WEIGHT, reduction=reduction)
        return losses / 18 if reduction == "sum" else losses.mean()

    torch.testing.assert_close(found(loss, outputs, NUMBERS, 1.0), loss(outputs, NUMBERS))
    values = F.l1_loss(outputs, NUMBERS, weight=WEIGHT, reduction="none").flatten()
    if reduction == "none":
        torch.testing.assert_close(found(loss, outputs, NUMBERS, 0.5, "element"), values.topk(9).values.mean())


def test_a_loss_that_cannot_be_read_is_named() -> None:
    outputs = torch.randn(6, 3, requires_grad=True)
    with pytest.raises(NotFound, match="it calls triplet_margin_loss, whose losses cannot be read"):
        found(lambda o, t: F.triplet_margin_loss(o, t, t.flip(0)), outputs, NUMBERS, 0.5)
