"""Trimmers inside torch.func: gradients as functions, second derivatives, ensembles by torch.vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim import Trimmer, per_sample

X, Y = torch.randn(10, 4, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 3
W = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
RULES = [batchtrim.hardest(), batchtrim.between(skip=0.1)]
OTHERS = [batchtrim.loss_mass(), batchtrim.uniform(), batchtrim.superquantile(), batchtrim.percentile()]


def losses(weight: Tensor) -> Tensor:
    return F.cross_entropy(X @ weight, Y, reduction="none")


def by_hand(weight: Tensor) -> Tensor:
    return losses(weight).topk(4).values.mean()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("rule", [*RULES, *OTHERS], ids=repr)
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_gradients_as_functions(transform: Callable[..., Any], rule: Any) -> None:
    """functorch's MAML and influence functions: the loss is a function whose gradient is asked for."""
    trim, same = Trimmer(0.4, select=rule), Trimmer(0.4, select=rule)
    found = transform(lambda weight: trim(losses(weight)))(W)
    rows = same.select(losses(W))
    expected = transform(lambda weight: batchtrim.reduce(losses(weight), rows))(W)
    torch.testing.assert_close(found, expected)
    assert trim.last is not None
    assert torch.equal(trim.last.losses, losses(W)), "nothing of the transform is left in it"
    assert trim.stats.compute()["batches"] == 1
    trim(losses(W))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_vmap_over_an_ensemble_equals_a_loop(rule: Any, masked: bool) -> None:
    """torch's tutorial on ensembles: a stack of models, each with its own loss, in one call."""
    trim, stack = Trimmer(0.4, select=rule), torch.stack([W, 2.0 * W, -W])
    mask = Y != 1 if masked else None
    found = torch.vmap(lambda weight: trim(losses(weight), mask=mask))(stack)
    assert trim.last is None, "as after a compiled step"
    torch.testing.assert_close(found, torch.stack([trim(losses(weight), mask=mask) for weight in stack]))
    gradients = torch.vmap(torch.func.grad(lambda weight: trim(losses(weight), mask=mask)))(stack)
    for weight, gradient in zip(stack, gradients, strict=True):
        torch.testing.assert_close(gradient, torch.func.grad(lambda w: trim(losses(w), mask=mask))(weight))


def test_an_ensemble_with_a_criterion() -> None:
    trim, stack = Trimmer(0.5), torch.stack([W, -W])
    criterion = per_sample(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0]), ignore_index=2))
    found = torch.vmap(lambda weight: trim(criterion(X @ weight, Y)))(stack)
    torch.testing.assert_close(found, torch.stack([trim(criterion(X @ weight, Y)) for weight in stack]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("weights", ["mapped", "the same", "none"])
@pytest.mark.parametrize("transform", [torch.vmap, torch.func.jacrev, torch.func.jacfwd])
def test_a_sum_of_losses(transform: Callable[..., Any], weights: str) -> None:
    """Two terms of which one is weighted: to add them under vmap ended in an error of torch's about aten::equal."""
    trim, stack = Trimmer(0.5), torch.stack([W, -W, 2 * W])
    given = {"mapped": stack[:, 0, 0].abs() + torch.arange(1.0, 11)[:, None], "the same": torch.arange(1.0, 11)}

    def loss(weight: Tensor, of_each: Tensor | None) -> Tensor:
        return trim(batchtrim.Losses(losses(weight), weights=of_each) + 0.5 * batchtrim.Losses(losses(2 * weight)))

    each = {"mapped": list(given["mapped"].T), "the same": [given["the same"]] * 3, "none": [None] * 3}[weights]
    if transform is torch.vmap:
        mapped = given.get(weights)
        dims = (0, 1 if weights == "mapped" else None)
        found = torch.vmap(lambda weight, of_each: loss(weight, of_each), in_dims=dims)(stack, mapped)
        torch.testing.assert_close(found, torch.stack([loss(w, e) for w, e in zip(stack, each, strict=True)]))
        return
    for weight, of_each in zip(stack, each, strict=True):
        leaf = weight.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, of_each), leaf)
        torch.testing.assert_close(transform(lambda w, of_each=of_each: loss(w, of_each))(weight), expected)


@pytest.mark.parametrize("rule", OTHERS, ids=repr)
def test_limits_under_vmap_are_reported(rule: Any) -> None:
    trim = Trimmer(0.4, select=rule)
    for function in (lambda weight: trim(losses(weight)), torch.func.grad(lambda weight: trim(losses(weight)))):
        with pytest.raises(TypeError, match=r"expected losses of one batch for .*inside torch\.vmap"):
            torch.vmap(function, randomness="different")(torch.stack([W, -W]))
    with pytest.raises(TypeError, match=r"expected losses of one batch for hardest\(\)"):
        torch.vmap(lambda weight: Trimmer(0.4).select(losses(weight)).indices)(torch.stack([W, -W]))


def test_a_mapped_trimmer_follows_its_clock_and_a_loaded_state() -> None:
    trim, resumed = (Trimmer(batchtrim.linear(1.0, 0.25), total=2) for _ in range(2))
    trim.step()
    resumed.load_state_dict(trim.state_dict())
    batches = torch.rand(3, 8)
    for each in (trim, resumed):
        torch.testing.assert_close(torch.vmap(each)(batches), batches.topk(2).values.mean(1))


def test_a_criterion_that_was_never_looked_at() -> None:
    class Squared(nn.Module):
        reduction = "mean"

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            found = (outputs - targets).square()
            return found if self.reduction == "none" else found.mean()

    trim, criterion, targets = Trimmer(0.4), per_sample(Squared()), torch.zeros(10, 3)

    def mapped() -> Tensor:
        return torch.vmap(lambda weight: trim(criterion(X @ weight, targets)))(torch.stack([W, -W]))

    with pytest.raises(TypeError, match=r"for the first check of Squared\(\), whose divisor is unknown"):
        mapped()
    criterion(X @ W, targets)
    torch.testing.assert_close(mapped()[0], trim(criterion(X @ W, targets)))
