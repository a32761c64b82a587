"""State that a forward changes is recorded and restored: buffers, plain attributes, generators of every library."""

from __future__ import annotations

import copy
import io
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from harness import BATCH
from torch import Tensor, nn

import batchtrim
from batchtrim import per_sample
from batchtrim.engine.contents import copy_of, put_back, same_contents
from batchtrim.engine.generators import GeneratorStates
from batchtrim.engine.model_facts import is_lazy, modules_of
from batchtrim.engine.state import ModelState
from batchtrim.engine.writes import ParameterWrites
from batchtrim.testing import check_engine


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("late", None)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("norm", torch.ones(1))
        self.count, self.flag, self.last = 0, None, torch.zeros(1)
        self.queue: deque[int] = deque([1], maxlen=2)
        self.notes = {"a": 1}
        self.dice, self.die, self.rng = torch.Generator(), random.Random(0), np.random.default_rng(0)

    def move(self) -> list[float]:
        self.late = torch.ones(1) if self.late is None else self.late + 1
        self.seen += 1
        self.norm = self.norm * 2
        self.count += 1
        self.flag = "moved"
        self.last += 1
        self.extra = 3
        self.queue.append(self.count)
        self.notes["b"] = self.count
        return [float(torch.rand(1, generator=self.dice)), self.die.random(), self.rng.random()]

    def held(self) -> list[object]:
        buffers = [None if each is None else each.tolist() for each in (self.late, self.seen, self.norm, self.last)]
        return [*buffers, self.count, self.flag, list(self.queue), dict(self.notes), hasattr(self, "extra")]


def test_everything_a_forward_moves_is_put_back() -> None:
    model = Stateful()
    start = model.held()
    before = ModelState(model)
    drawn = model.move()
    after, moved = ModelState(model), model.held()
    assert moved != start
    before.restore()
    assert model.held() == start
    assert model.move() == drawn, "a generator of the model's own was not put back"
    model.move()
    after.restore()
    assert model.held() == moved
    assert after.difference(ModelState(model)) == 0.0
    assert before.difference(after) == float("inf")  # a buffer that was None
    assert before.other_attributes(after) == ["Stateful.count"] or "Stateful.count" in before.other_attributes(after)


class NeverEqual(int):
    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (0.0, -0.0), (complex(1, 0.0), complex(1, -0.0)), (math.nan, 1.0), (1.0, math.nan), (True, 1), (1, 1.0),
        ((0, 1), (0, 2)), ((0.0,), (-0.0,)), (Fraction(1, 2), Fraction(1, 3)), (NeverEqual(1), NeverEqual(2)),
        (np.int64(1), np.int64(2)), (np.float32(0), np.float32(-0.0)), (np.bool_(True), np.bool_(False)),
        (np.datetime64("2020"), np.datetime64("2021")), (frozenset("ab"), frozenset("ac")), (range(3), range(4)),
        ((frozenset((1,)),), (frozenset((True,)),)), (timedelta(1), timedelta(2)), (Path("a"), Path("b")),
        (slice(1), slice(2)), (1j, 2j), (b"a", b"b"),
    ],
)  # fmt: skip
def test_another_value_is_seen(was: Any, now: Any) -> None:
    model = nn.Linear(2, 2)
    model.value = was
    before = ModelState(model)
    model.value = now
    assert before.unlike(ModelState(model), math.inf) == "Linear.value"
    if isinstance(was, (int, float, complex, str)):
        assert before.other_attributes(ModelState(model)) == ["Linear.value"]


def test_a_function_that_one_model_holds_moves_no_attributes() -> None:
    """A compiled model holds functions with attributes; those of later modules were then compared with others'."""
    plain, wrapped = (nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)) for _ in range(2))

    def call() -> None: ...

    call.kind = "a"  # type: ignore[attr-defined]
    wrapped[0].call = call
    assert ModelState(plain).other_attributes(ModelState(wrapped)) == []


def test_attributes_of_a_tensor_are_compared_with_those_of_the_same_tensor() -> None:
    """A trace gives parameters attributes. Those of a buffer, as ``nn.Buffer`` has, were then compared with theirs."""
    plain, traced = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    for model in (plain, traced):
        model.running_mean.kind = "a"  # type: ignore[union-attr]
    for parameter in traced.parameters():
        parameter._dynamo_static_input_type = "b"  # type: ignore[attr-defined]
    assert ModelState(plain).other_attributes(ModelState(traced)) == []
    traced.running_mean.kind = "c"  # type: ignore[union-attr]
    assert ModelState(plain).other_attributes(ModelState(traced)) == ["Tensor.kind"]


def _array(values: Any, dtype: Any = None) -> Any:
    return np.array(values, dtype)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ({1, 2}, {1, 3}), ({1}, {True}), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({"a": 1}, {"b": 1}), ([1, 2], [2, 1]),
        ({1: 0}, {True: 0}), (deque([1, 2]), deque([2, 1])), ([[1]], [[2]]), ({"a": {"b": 1}}, {"a": {"b": 2}}),
        (_array([0.0]), _array([-0.0])), (_array([math.nan]), _array([1.0])), (_array(["a"]), _array(["b"])),
        (_array([(1, 2.0)], "i4,f8"), _array([(1, 3.0)], "i4,f8")),
        (_array([[1], 2], object), _array([[1], 3], object)),
        (_array([1], "i4"), _array([1], "i8")), (_array("2020", "M8[Y]"), _array("2021", "M8[Y]")),
    ],
)  # fmt: skip
def test_other_contents_are_seen_in_place_and_in_a_new_object(was: Any, now: Any) -> None:
    assert not same_contents(was, now, math.inf)
    assert same_contents(was, copy.copy(was), 0.0)
    model = nn.Linear(2, 2)
    model.value = copy.copy(was)
    before = ModelState(model)
    model.value = now
    assert before.unlike(ModelState(model), math.inf) == "Linear.value"


@pytest.mark.parametrize(
    "make", [lambda: {math.nan, "a"}, lambda: _array([float("nan"), 1]), lambda: {float("nan"): float("nan")}]
)
def test_the_same_contents_made_anew_are_no_change(make: Callable[[], Any]) -> None:
    assert same_contents(make(), make(), 0.0)


@pytest.mark.parametrize("make", [lambda: float("nan"), lambda: NeverEqual(1), lambda: (float("nan"), 1)])
def test_the_same_value_made_anew_is_no_change(make: Callable[[], Any]) -> None:
    model = nn.Linear(2, 2)
    model.value = make()
    before = ModelState(model)
    model.value = make()
    assert before.unlike(ModelState(model), math.inf) is None
    assert before.other_attributes(ModelState(model)) == []


@pytest.mark.parametrize("make", [lambda: io.StringIO("a"), lambda: io.BytesIO(b"a")])
def test_text_in_memory_is_put_back(make: Callable[[], Any]) -> None:
    model, log = nn.Linear(2, 2), make()
    model.log = log
    log.seek(1)
    before = ModelState(model)
    log.write(log.getvalue() * 2)
    after = ModelState(model)
    assert before.unlike(after, math.inf) is not None
    before.restore()
    assert (model.log is log, len(log.getvalue()), log.tell()) == (True, 1, 1)
    after.restore()
    assert (len(log.getvalue()), log.tell()) == (3, 3)


class Makes(OrderedDict[str, Any]):
    """transformers' ACT2FN: a name gives a new object of its class."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name)()

    def update(self, *_: Any) -> None:  # type: ignore[override]
        raise TypeError("A ModelOutput has no update")


class Doubled(list[int]):
    def __iter__(self) -> Any:
        return (2 * each for each in super().__iter__())


def test_containers_that_make_something_of_their_entries() -> None:
    """A dictionary of classes was emptied, for the whole program, and then filled with objects."""
    made, doubled = Makes(relu=nn.ReLU, gelu=nn.GELU), Doubled([1, 2])
    copies = copy_of(made), copy_of(doubled)
    made.move_to_end("relu")
    made["new"] = nn.Tanh
    doubled.append(3)
    put_back(made, copies[0])
    put_back(doubled, copies[1])
    assert list(made.items()) == [("relu", nn.ReLU), ("gelu", nn.GELU)]
    assert doubled == [1, 2]


def test_tensors_that_grow_get_their_size_back() -> None:
    model = Stateful()
    model.held = [torch.ones(2)]
    before, grown = ModelState(model), (model.seen, model.held[0])
    sizes = [each.shape for each in grown]
    for each in grown:
        each.resize_(5)
    before.restore()
    assert [each.shape for each in grown] == sizes
    assert model.held[0].tolist() == [1, 1]


def test_a_restored_buffer_is_the_same_tensor() -> None:
    model = Stateful()
    seen = model.seen
    before = ModelState(model)
    model.move()
    before.restore()
    assert model.seen is seen


def test_draws_of_every_library_are_seen() -> None:
    device = torch.device("cpu")
    for draw in (partial(torch.rand, 1), random.random, np.random.rand):
        before = GeneratorStates(device)
        first = draw()
        assert not before.same(GeneratorStates(device))
        before.restore()
        assert before.same(GeneratorStates(device))
        assert draw() == first


def test_modules_of_a_loss_are_found() -> None:
    model, loss = Stateful(), nn.CrossEntropyLoss()
    head = nn.Linear(2, 2)
    for computes in (loss, per_sample(head), head.forward, lambda out, y: head(out)):
        assert (loss if computes is loss else head) in modules_of(model, computes)
    assert model.layer in modules_of(model, None)


def test_a_model_is_lazy_until_its_first_forward() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    assert is_lazy(model)
    model(torch.ones(1, 3))
    assert not is_lazy(model)


def _whole(model: nn.Linear) -> None:
    with torch.no_grad():
        model.weight.lerp_(torch.ones(2, 2), 0.5)


def _in_part(model: nn.Linear) -> None:
    model.weight.data[0] = 3.0


def _in_a_list(model: nn.Linear) -> None:
    torch._foreach_add_([model.weight.data, torch.zeros(2)], 1.0)


def _as_output(model: nn.Linear) -> None:
    with torch.no_grad():
        torch.add(model.weight, 1.0, out=model.weight)


def _by_assignment(model: nn.Linear) -> None:
    model.weight.data = model.weight.data * 0.9 + 0.1  # as MoCo's own code moves its momentum encoder


def _by_assignment_and_in_place(model: nn.Linear) -> None:
    model.weight.data.add_(1.0)
    model.weight.data = model.weight.data.clone()


@pytest.mark.parametrize(
    "write", [_whole, _in_part, _in_a_list, _as_output, _by_assignment, _by_assignment_and_in_place]
)
def test_parameters_that_a_forward_writes_into_are_noted_and_put_back(write: Callable[[nn.Linear], None]) -> None:
    model = nn.Linear(2, 2)
    weight, held = model.weight, model.weight.detach().clone()
    with ParameterWrites(model) as writes:
        model(torch.ones(1, 2)).relu_()  # what is written into is no parameter
        assert not writes.written()
        write(model)
        write(model)
    assert writes.written() == {"weight"}
    assert not torch.equal(weight, held)
    writes.restore()
    assert model.weight is weight
    assert torch.equal(weight, held)


def test_parameters_that_share_their_memory_are_put_back_together() -> None:
    """An LSTM's weights lie in one block on a GPU."""
    model, block = nn.Linear(2, 2), torch.arange(6.0)
    model.weight.data, model.bias.data = block[:4].view(2, 2), block[4:]
    with ParameterWrites(model) as writes:
        block.zero_()
    assert writes.written() == {"weight", "bias"}
    writes.restore()
    assert torch.equal(block, torch.arange(6.0))


class WritesIntoATwin(nn.Module):
    """A twin that follows the layer, without a gradient, though it asks for one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.twin, self.head = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.twin.weight.lerp_(self.layer.weight, 0.1)
            target = self.twin(x)
        return self.head(self.layer(x) + target)


@pytest.mark.slow
def test_what_a_forward_writes_into_gets_no_gradient() -> None:
    """Zeros in place of none would let weight decay move it."""
    torch.manual_seed(0)
    model = WritesIntoATwin().train()
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "shared")
    for _ in range(2):
        step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
        assert step.last is not None
        assert step.last.engine == "shared"
    assert model.twin.weight.grad is None
    assert model.layer.weight.grad is not None
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    assert check_engine(model, (x, y), nn.CrossEntropyLoss(), verbose=False).verdict == "right"


class MovesItsBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1.0)
        return self.head(x.detach())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, while it traces
def test_a_batch_that_the_forward_moves_passes_the_later_gradient_on() -> None:
    gradients = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        front, model = nn.Linear(8, 8), MovesItsBatch().train()
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), engine)
        for _ in range(2):
            front.zero_grad()
            x = front(zoo.vectors(BATCH))
            (step(x, torch.arange(BATCH) % 5) + x.square().mean()).backward()
        gradients.append(front.weight.grad)
    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(*gradients)


def test_a_tensor_without_values_is_no_reason_to_fail() -> None:
    model = nn.Linear(8, 5)
    model.register_buffer("shape", torch.empty(3, device="meta"))
    before, after = ModelState(model, None), ModelState(model, None)
    assert before.difference(after) == 0
    model.shape = torch.zeros(3)
    assert before.difference(ModelState(model, None)) == float("inf")
