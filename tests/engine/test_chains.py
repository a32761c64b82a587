"""Products of which only a sum or a copy is kept: followed where that is so, noticed where it no longer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from harness import BATCH, error, gradient, prove_all
from torch import Tensor, nn

import batchtrim
from batchtrim.engine.chains import Awaited
from batchtrim.engine.layouts import Layout
from batchtrim.engine.plan import Diverged


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchtrim.engine.chains._LEAST", 0)


kept: list[Any] = []

# of Block; autograd keeps what tanh and log_softmax give
ALL = [["mul", "add"], ["add", "tanh"], ["_log_softmax"]]


class Block(nn.Module):
    """Two products, added to what goes around them; ``look`` is shown the first one, which a weight scales."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.full((8,), 0.5), requires_grad=False)
        self.look: Callable[[Tensor], Any] = lambda product: None

    def forward(self, x: Tensor) -> Tensor:
        product = self.a(x)
        self.look(product)
        x = x + product * self.scale
        x = x + self.b(torch.tanh(x))
        return self.head(torch.tanh(x))


def both(make: Callable[[], nn.Module]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = make().train()
    return tuple(
        batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine)
        for engine in ("exact", "shared")
    )


def compare(exact: Any, shared: Any, data: Callable[[int], Tensor] = zoo.vectors) -> float:
    """The error of one step's gradient."""
    x, y = data(BATCH), torch.randint(0, 5, (BATCH,))
    state = torch.get_rng_state()
    found = []
    for step in (exact, shared):
        torch.set_rng_state(state)
        step.forward.model.zero_grad(set_to_none=True)
        step(x, y).backward()
        found.append(gradient(step.forward.model))
    return error(*found)


def plan_of(step: Any) -> Any:
    (plan,) = step.engine.plans.values()
    return plan


def followed(step: Any) -> list[list[str]]:
    return [
        [link._schema.name.removeprefix("aten::") for link in planned.chain.links]
        for planned in plan_of(step).steps
        if planned.chain is not None
    ]


def test_seen_then_tried_then_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, shared = both(Block)
    made_up: list[tuple[int, ...]] = []
    add_void = Awaited.add_void
    monkeypatch.setattr(
        Awaited,
        "add_void",
        lambda self, entry, room: (made_up.append(tuple(room.shape)), add_void(self, entry, room))[1],
    )
    for number, expected in enumerate([[], ALL, ALL]):
        assert compare(exact, shared) <= 1e-6
        assert followed(shared) == expected, number
        assert len(made_up) == (5 if number == 2 else 0)
    assert not shared.engine._failures


def test_they_can_be_left_alone() -> None:
    exact, shared = both(Block)
    shared.engine.follow_chains = False
    assert all(compare(exact, shared) <= 1e-6 for _ in range(3))
    assert followed(shared) == []


def test_the_second_pass_writes_less() -> None:
    exact, shared = both(Block)
    compare(exact, shared)
    written, remembered = plan_of(shared).written, plan_of(shared).remembered
    compare(exact, shared)
    assert plan_of(shared).written == pytest.approx(written - 4 * (4 * 8 + 5)), (
        "a row of each product and of what lies between"
    )
    assert plan_of(shared).remembered == remembered


def test_a_sum_of_two_products_is_the_end_of_one_chain() -> None:
    class Parallel(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) + self.b(x)
            return self.head(x * x)

    exact, shared = both(Parallel)
    assert all(compare(exact, shared) <= 1e-6 for _ in range(6))
    assert followed(shared) == [["add"], ["_log_softmax"]]


def test_a_link_that_changes_the_shape_is_the_last() -> None:
    class Spread(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) + self.scale * torch.arange(3.0)[:, None, None]  # (3, B, 8)
            return self.head(torch.tanh(x).mean(0))

    exact, shared = both(Spread)
    assert all(compare(exact, shared) <= 1e-6 for _ in range(6))
    assert followed(shared) == [["add"], ["_log_softmax"]]


def test_a_product_read_by_a_product_is_no_link() -> None:
    class Frozen(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.b(self.a(x))))

    exact, shared = both(Frozen)
    shared.forward.model.b.requires_grad_(False)  # so autograd does not keep what goes in
    assert all(compare(exact, shared) <= 1e-6 for _ in range(6))
    assert followed(shared) == [["tanh"], ["_log_softmax"]]


def test_an_end_that_tells_nothing_is_computed_until_it_does() -> None:
    class Gated(Block):
        def forward(self, x: Tensor) -> Tensor:
            times = torch.stack([x, x.roll(1, 1)]).flatten(0, 1)  # batch-minor: by its shape alone it might be either
            return self.head(torch.tanh(self.a(times) * self.scale).unflatten(0, (2, -1)).sum(0) + x)

    exact, shared = both(Gated)
    with torch.no_grad():
        shared.forward.model.scale.zero_()
    for _ in range(3):
        assert compare(exact, shared) <= 1e-6
    assert followed(shared) == [["_log_softmax"]]
    with torch.no_grad():
        shared.forward.model.scale.fill_(1.0)
    for _ in range(3):
        assert compare(exact, shared) <= 1e-6
    assert followed(shared) == [["mul", "tanh"], ["_log_softmax"]]


@pytest.mark.parametrize(
    "look",
    [
        lambda product: product.std(),
        lambda product: kept.append(product),
        lambda product: product.detach().numpy().std(),
        lambda product: product.mul_(1.0),
    ],
    ids=["read", "kept", "detached", "changed"],
)
def test_what_somebody_else_wants_is_no_chain(look: Callable[[Tensor], Any]) -> None:
    exact, shared = both(Block)
    shared.forward.model.look = look
    assert all(compare(exact, shared) <= 1e-6 for _ in range(5))
    assert followed(shared) == ALL[1:]
    kept.clear()


@pytest.mark.parametrize(
    "look",
    [
        lambda product: product.std(),
        lambda product: kept.append(product),
        lambda product: kept.append(product.detach()),
    ],
    ids=["read", "kept", "detached"],
)
def test_wanted_from_some_step_on_it_is_there_and_the_gradient_exact(look: Callable[[Tensor], Any]) -> None:
    exact, shared = both(Block)
    for _ in range(3):
        compare(exact, shared)
    assert followed(shared) == ALL
    shared.forward.model.look = look
    assert all(compare(exact, shared) <= 1e-6 for _ in range(4))  # which NaN is not
    assert ALL[0] not in followed(shared)
    kept.clear()


def test_a_weight_set_free_needs_the_product_it_is_multiplied_with() -> None:
    exact, shared = both(Block)
    for _ in range(3):
        compare(exact, shared)
    assert followed(shared) == ALL
    shared.forward.model.scale.requires_grad_(True)
    assert all(compare(exact, shared) <= 1e-6 for _ in range(4))
    assert followed(shared) == ALL[1:]


def test_a_wrong_layout_of_a_chain_is_caught() -> None:
    class TimeMajor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            times = torch.stack([x, x.roll(1, 1), x.roll(2, 1)]).flatten(0, 1)
            return self.head(torch.tanh(self.a(times)).unflatten(0, (3, -1)).mean(0))

    exact, shared = both(TimeMajor)
    for _ in range(3):
        assert compare(exact, shared) <= 1e-6
    plan = plan_of(shared)
    first = plan.steps[0]
    assert followed(shared) == [["tanh"], ["_log_softmax"]]
    assert first.layouts == (Layout(0, 3, 1),)
    plan.steps[0] = replace(first, layouts=(Layout(0, 1, 3),))
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    loss = prove_all(shared, x, y)
    assert shared.engine._failures, "a wrong layout went unnoticed"
    torch.testing.assert_close(loss, exact(x, y), rtol=0, atol=0)


def test_what_changes_again_and_again_is_no_longer_tried() -> None:
    exact, shared = both(Block)
    for number in range(9):
        shared.forward.model.look = (lambda product: product.std()) if number % 3 == 2 else (lambda product: None)
        found = compare(exact, shared)
        assert found <= 1e-6
        assert (found == 0.0) == (number in (2, 5)), "done again exactly, the first two times"
    assert followed(shared) == []
    assert not shared.engine._failures


def test_noise_takes_only_the_form_of_what_it_is_put_on() -> None:
    class Noisy(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + nn.functional.dropout(self.a(x), 0.3)
            return self.head(torch.tanh(x))

    exact, shared = both(Noisy)
    assert all(compare(exact, shared) <= 1e-6 for _ in range(6))
    assert followed(shared) == [["mul", "add", "tanh"], ["_log_softmax"]]


def test_what_stands_for_a_tensor_within_a_chain_lies_as_it_would() -> None:
    class Turned(Block):
        def forward(self, x: Tensor) -> Tensor:
            turned = self.a(x).unflatten(1, (2, 4)).transpose(0, 2)  # (4, 2, B), the batch within
            turned = turned + turned.new_ones(4, 2, 1)
            return self.head(torch.tanh(turned.contiguous() + 1).transpose(0, 2).flatten(1))

    exact, shared = both(Turned)
    assert all(compare(exact, shared) <= 1e-6 for _ in range(9))
    assert followed(shared)[0][:1] == ["add"]
    assert not shared.engine._failures
    assert not shared.engine._unchained


def test_awaited_says_what_went_wrong() -> None:
    awaited = Awaited()
    product = awaited.add(SimpleNamespace(links=(torch.ops.aten.add.Tensor,)), torch.ones(3))
    with pytest.raises(Diverged, match="nobody reads what was read"):
        awaited.check_over()
    with pytest.raises(Diverged, match="did not read at calibration"):
        awaited.next(torch.ops.aten.mul.Tensor, (product, 2.0), {})
    awaited = Awaited()
    held = awaited.add_void(SimpleNamespace(links=(torch.ops.aten.neg.default,)), torch.ones(3))
    assert held[0].isnan()
    assert awaited.next(torch.ops.aten.view.default, (held,), {}) is None
    assert awaited.next(torch.ops.aten.neg.default, (held,), {}) is not None
    with pytest.raises(Diverged, match="did not read at calibration"):
        awaited.next(torch.ops.aten.exp.default, (held,), {})
    with pytest.raises(Diverged, match="somebody keeps"):
        awaited.check_over()
