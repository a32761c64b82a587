"""A model keeps tensors of its forward, from which the training loop computes a further term of the loss."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import batchtrim
from batchtrim.errors import EngineRefused
from tiers import few

pytestmark = pytest.mark.filterwarnings("ignore::batchtrim.errors.EngineFallback")


class Keeping(nn.Module):
    """Keeps what ``where`` says, with its graph."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.where = where
        self.kept: Any = None
        self.collected: list[Tensor] = []
        if where == "hook":
            collected = self.collected
            self.first.register_forward_hook(lambda _, __, out: collected.append(out.tanh()))

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x).tanh()
        if self.where == "attribute":
            self.kept = z
        elif self.where == "list":
            self.kept = [z]
        elif self.where == "number":
            self.kept = z.square().mean()
        elif self.where == "per sample":
            self.kept = z.square().mean(1)
        elif self.where == "mean":
            self.kept = z.mean(0)
        return self.last(self.second(z).tanh())

    def term(self) -> Tensor:
        kept = self.collected[-1] if self.where == "hook" else self.kept
        return (kept[0] if self.where == "list" else kept).square().mean()


def gradients(
    where: str, engine: str, steps: int = 3, compiled: bool = False, change: Any = None
) -> tuple[list[Tensor], str]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Keeping(where)
    if change is not None:
        change(model)
    if compiled:
        model.compile()
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), engine)
    found = []
    for number in range(steps):
        torch.manual_seed(number)
        x, y = torch.randn(12, 6), torch.randint(0, 5, (12,))
        model.zero_grad()
        loss = step(x, y)
        (loss + model.term()).backward()
        model.collected.clear()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert step.last is not None
    return found, step.last.engine


PLACES = ("attribute", "list", "number", "mean", "hook")


@pytest.mark.slow  # by default two passes refuse it
@pytest.mark.parametrize(
    ("where", "engine"),
    few(itertools.product(PLACES, ["shared", "auto"]), [("hook", "shared")]),
)
def test_its_gradient_reaches_all_rows(where: str, engine: str) -> None:
    change = pruned if where == "hook" else None  # beside a weight that a hook computes, which is no kept tensor
    exact, _ = gradients(where, "exact", change=change)
    own, ran = gradients(where, engine, change=change)
    torch.testing.assert_close(own, exact, rtol=1e-5, atol=1e-7)
    assert engine == "auto" or ran == "shared"


@pytest.mark.slow
def test_a_number_for_each_sample_is_refused_since_it_looks_like_the_losses() -> None:
    exact, _ = gradients("per sample", "exact")
    own, ran = gradients("per sample", "auto")
    torch.testing.assert_close(own, exact)
    assert ran == "exact"
    with pytest.raises(EngineRefused, match="it returns or keeps further vectors with a gradient"):
        gradients("per sample", "shared")


class Words(nn.Module):
    """A small language model that keeps its hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.inner(self.embed(x).cumsum(1)).tanh()
        return self.head(self.kept)


@pytest.mark.slow
@pytest.mark.parametrize("unit", few(["sample", "element"], ["sample"]))
def test_its_gradient_reaches_all_tokens(unit: Any) -> None:
    def run(engine: str) -> Tensor:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Words()
        trim = batchtrim.Trimmer(0.4, unit=unit)
        step = batchtrim.TrimmedForward(model, lambda out, y: batchtrim.token_losses(out, y, shift=True), trim, engine)
        x = torch.randint(0, 11, (12, 6))
        loss = step(x, x)
        (loss + model.kept.square().mean()).backward()
        assert step.last is not None
        assert step.last.engine == engine
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(run("shared"), run("exact"), rtol=1e-5, atol=1e-7)


@pytest.mark.slow  # by default a plain model keeps them
@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("where", ["attribute", "number"])
def test_its_gradient_reaches_all_rows_of_a_compiled_model(where: str) -> None:
    torch.testing.assert_close(
        gradients(where, "shared", compiled=True)[0], gradients(where, "exact")[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("where", PLACES)
def test_two_passes_refuse_it(where: str) -> None:
    with pytest.raises(EngineRefused, match=r"it keeps a tensor with its graph \(.*Keep a detached one"):
        gradients(where, "two_pass", steps=1)


def pruned(net: Keeping) -> None:
    prune.random_unstructured(net.second, "weight", 0.4)


def weight_normed(net: Keeping) -> None:
    nn.utils.weight_norm(net.second)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch has a newer weight norm
@pytest.mark.parametrize(
    ("engine", "change"),
    few(
        itertools.product(["two_pass", "shared"], [pruned, weight_normed]),
        [("two_pass", pruned), ("two_pass", weight_normed)],  # ("hook", "shared") above has a pruned weight too
    ),
)
def test_a_weight_computed_from_parameters_is_not_a_kept_tensor(change: Any, engine: str) -> None:
    found = []
    for name in ("exact", engine):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Keeping("nowhere")
        change(model)
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), name)
        for _ in range(2):
            model.zero_grad()
            step(torch.randn(12, 6), torch.randint(0, 5, (12,))).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


class Auxiliary(nn.Module):
    """Keeps two tensors with parameters of their own, which only some losses use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.one, self.other = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x).tanh()
        self.kept = self.one(z), self.other(z).view(-1, 2, 2)
        return self.last(z)


def backward_in_three_ways(engine: str, compiled: bool = False, hooked: bool = False) -> list[Tensor | None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Auxiliary()
    if compiled:
        model.compile()
    if hooked:
        model.one.weight.register_hook(lambda gradient: 2 * gradient)  # fails for None
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), engine)
    found: list[Tensor | None] = []
    for number, used in enumerate([(), (1,), (0, 1), ()]):
        model.zero_grad()
        loss = step(torch.randn(12, 6), torch.randint(0, 5, (12,)))
        for at in used:
            loss = loss + model.kept[at].square().mean()
        parameters = list(model.parameters())
        for doubly in [False] if compiled else [False, True]:
            found += torch.autograd.grad(loss, parameters, retain_graph=True, create_graph=doubly, allow_unused=True)
        (loss if number else model.kept[0].sum()).backward(retain_graph=True)
        found += [None if each.grad is None else each.grad.clone() for each in parameters]
        loss.backward()
        found += [each.grad for each in parameters]
    return found


@pytest.mark.filterwarnings("ignore")  # torch's own, when it compiles
@pytest.mark.parametrize("compiled", few([False, True], [False]))
def test_what_only_a_kept_tensor_uses_has_no_gradient_without_it(compiled: bool) -> None:
    """Unless the model is compiled: then torch gives zeros, with any engine."""
    exact, own = backward_in_three_ways("exact", compiled), backward_in_three_ways("shared", compiled)
    assert [each is None for each in own] == [each is None for each in exact]
    assert any(each is None for each in own) is not compiled
    torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # without hooks by default
def test_a_hook_gets_no_none() -> None:
    for exact, own in zip(backward_in_three_ways("exact"), backward_in_three_ways("shared", hooked=True), strict=True):
        assert (exact is None) >= (own is None)
