"""State outside of modules: what a second forward would move again is put back, or the model is refused."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import numpy as np
import other_file
import pytest
import sympy
import torch
from harness import agree, train
from torch import Tensor, nn

import batchtrim
from batchtrim.engine.reachable import Reachable
from batchtrim.errors import EngineFallback, EngineRefused
from tiers import few

COUNT = 0
SEEN: list[int] = []
STATE = SimpleNamespace(count=0)
TABLE = torch.zeros(2)
BOX = [torch.zeros(2)]
LOCAL = threading.local()
VARIABLE: ContextVar[int] = ContextVar("VARIABLE", default=0)
NUMBERS = itertools.count()
COUNTS = dict.fromkeys(range(20_000), 0)


class Space:
    """A class that nobody makes an object of: a place for numbers."""

    count = 0


class Counting(nn.Module):
    """Scales its output by how often ``tick`` was called."""

    CALLS = 0
    log: list[int] = []  # noqa: RUF012

    def __init__(self, tick: Callable[[Any], float]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.tick = tick

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (1 + 0.1 * self.tick(self))


def _bump() -> None:
    global COUNT
    COUNT += 1


def of_a_global(_: Any) -> float:
    _bump()
    return COUNT


def of_a_global_list(_: Any) -> float:
    SEEN.append(1)
    return len(SEEN)


def of_a_global_object(_: Any) -> float:
    STATE.count += 1
    return STATE.count


def of_a_class(model: Any) -> float:
    type(model).CALLS += 1
    return type(model).CALLS


def of_a_list_of_the_class(model: Any) -> float:
    model.log.append(1)
    return len(model.log)


def of_a_default(_: Any, seen: list[int] = []) -> float:  # noqa: B006
    seen.append(1)
    return len(seen)


def of_a_function(_: Any) -> float:
    of_a_function.calls = getattr(of_a_function, "calls", 0) + 1  # type: ignore[attr-defined]
    return of_a_function.calls  # type: ignore[attr-defined]


def of_a_closure() -> Callable[[Any], float]:
    count = 0

    def tick(_: Any) -> float:
        nonlocal count
        count += 1
        return count

    return tick


def of_a_list_in_a_closure() -> Callable[[Any], float]:
    seen: list[int] = []

    def tick(_: Any) -> float:
        seen.append(1)
        return len(seen)

    return tick


def of_a_class_as_a_place(_: Any) -> float:
    Space.count += 1
    return Space.count


def of_another_file(_: Any) -> float:
    other_file.COUNT += 1
    return other_file.COUNT


def of_a_list_of_another_file(_: Any) -> float:
    other_file.LOG.append(1)
    return len(other_file.LOG)


def of_a_function_of_another_file(_: Any) -> float:
    return other_file.tick()


def of_a_thread(_: Any) -> float:
    LOCAL.count += 1
    return LOCAL.count


def of_a_context(_: Any) -> float:
    VARIABLE.set(VARIABLE.get() + 1)
    return VARIABLE.get()


class Level:
    def __init__(self, below: int) -> None:
        self.count = 0
        self.below = Level(below - 1) if below else None


DEEP = Level(5)


def of_an_object_six_levels_deep(_: Any) -> float:
    level = DEEP
    while level.below is not None:
        level = level.below
    level.count += 1
    return level.count


def of_a_large_dictionary(_: Any) -> float:
    COUNTS[3] += 1
    return COUNTS[3]


def of_a_first_use(model: Any) -> float:
    if not hasattr(model, "ready"):
        model.ready, model.calls = True, 0
    model.calls += 1
    return model.calls


def of_an_object_made_at_first(model: Any) -> float:
    if not hasattr(model, "level"):
        model.level = Level(0)
    model.level.count += 1
    return model.level.count


def of_a_hook_made_at_first(model: Any) -> float:
    """Without the second hook: its handle tells that it is there."""
    if not hasattr(model, "handle"):
        model.handle = model.layer.register_forward_hook(lambda _, __, out: out * 2)
    return len(model.layer._forward_hooks)


def of_a_tensor_in_a_list(model: Any) -> float:
    if not hasattr(model, "box"):
        model.box = BOX
    BOX[0].count = getattr(BOX[0], "count", 0) + 1  # type: ignore[attr-defined]
    return BOX[0].count  # type: ignore[attr-defined]


def of_a_learning_rate() -> Callable[[Any], float]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)

    def tick(_: Any) -> float:
        optimizer.param_groups[0]["lr"] += 1
        return optimizer.param_groups[0]["lr"]

    return tick


def of_numpys_older_generator() -> Callable[[Any], float]:
    draws = np.random.RandomState(0)
    return lambda _: draws.normal()


def of_quasirandom_numbers() -> Callable[[Any], float]:
    draws = torch.quasirandom.SobolEngine(1, scramble=True, seed=0)
    return lambda _: float(draws.draw(1))


def of_an_array_of_its_own_class() -> Callable[[Any], float]:
    counts = np.ma.zeros(2)

    def tick(_: Any) -> float:
        counts[0] += 1
        return float(counts[0])

    return tick


PLACES = {
    "global": lambda: of_a_global, "global list": lambda: of_a_global_list, "global object": lambda: of_a_global_object,
    "class": lambda: of_a_class, "list of the class": lambda: of_a_list_of_the_class,
    "default": lambda: of_a_default, "function": lambda: of_a_function, "closure": of_a_closure,
    "list in a closure": of_a_list_in_a_closure, "class as a place": lambda: of_a_class_as_a_place,
    "another file": lambda: of_another_file, "list of another file": lambda: of_a_list_of_another_file,
    "function of another file": lambda: of_a_function_of_another_file, "thread": lambda: of_a_thread,
    "context": lambda: of_a_context, "deep": lambda: of_an_object_six_levels_deep,
    "large dictionary": lambda: of_a_large_dictionary, "first use": lambda: of_a_first_use,
    "object made at first": lambda: of_an_object_made_at_first, "hook made at first": lambda: of_a_hook_made_at_first,
    "older generator": of_numpys_older_generator, "quasirandom": of_quasirandom_numbers,
    "tensor in a list": lambda: of_a_tensor_in_a_list, "learning rate": of_a_learning_rate,
    "array of its own class": of_an_array_of_its_own_class,
}  # fmt: skip


def _reset() -> None:
    global COUNT
    COUNT, STATE.count, Counting.CALLS, of_a_function.calls = 0, 0, 0, 0  # type: ignore[attr-defined]
    for each in (SEEN, Counting.log, of_a_default.__defaults__[0]):  # type: ignore[index]
        each.clear()
    TABLE.zero_()
    COUNTS[3] = 0
    vars(BOX[0]).clear()
    DEEP.__init__(5)  # type: ignore[misc]
    Space.count = other_file.COUNT = LOCAL.count = 0
    other_file.LOG.clear()
    VARIABLE.set(0)


@pytest.mark.parametrize(
    ("place", "engine"),
    [
        pytest.param(place, engine, marks=() if engine == "two_pass" else pytest.mark.slow)
        for place in PLACES
        for engine in ("two_pass", "auto")
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_counter_anywhere_counts_each_step_once(place: str, engine: str) -> None:
    torch._dynamo.reset()
    runs = []
    for name in ("exact", engine):
        _reset()
        runs.append(train(lambda: Counting(PLACES[place]()), lambda b: torch.randn(b, 6), name, steps=5))
    agree(*runs)


def into_a_global_tensor(_: Any) -> float:
    with torch.no_grad():
        TABLE.add_(1)
    return TABLE.sum()  # type: ignore[return-value]


def into_a_global_tensor_and_a_class(model: Any) -> float:
    return into_a_global_tensor(model) + of_a_class(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "tick",
    few([into_a_global_tensor, into_a_global_tensor_and_a_class], [into_a_global_tensor_and_a_class]),
)
def test_auto_counts_each_step_once_in_a_global_tensor(tick: Callable[[Any], float]) -> None:
    torch._dynamo.reset()
    runs = []
    for engine in ("exact", "auto"):
        _reset()
        runs.append(train(lambda: Counting(tick), lambda b: torch.randn(b, 6), engine, steps=5))
    agree(*runs)


def test_the_loss_and_what_it_holds_count_too() -> None:
    def make_loss() -> Callable[[Tensor, Tensor], Tensor]:
        calls: list[int] = []

        def loss(out: Tensor, y: Tensor) -> Tensor:
            calls.append(1)
            return nn.functional.cross_entropy(out, y, reduction="none") * len(calls)

        return loss

    runs = [
        train(lambda: nn.Linear(6, 5), lambda b: torch.randn(b, 6), engine, steps=4, loss=make_loss())
        for engine in ("exact", "two_pass")
    ]
    agree(*runs)


def test_a_hook_collects_what_one_forward_gives() -> None:
    seen: list[int] = []
    model = nn.Linear(6, 5)
    model.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    train(lambda: model, lambda b: torch.randn(b, 6), "two_pass", steps=3)
    assert seen == [12, 12, 12]


@pytest.mark.slow
def test_an_iterator_is_refused_for_it_cannot_be_put_back() -> None:
    model = Counting(lambda model: next(model.count))
    model.count = iter(range(100))  # type: ignore[assignment]
    assert Reachable(model).iterators == ["Counting.count"]
    with pytest.warns(EngineFallback, match=r"it holds an iterator \(Counting\.count\)"):
        train(lambda: model, lambda b: torch.randn(b, 6), "auto", steps=2)
    with pytest.raises(Exception, match=r"it holds an iterator \(Counting\.count\)"):
        train(lambda: model, lambda b: torch.randn(b, 6), "two_pass", steps=2)


def test_a_global_iterator_is_refused_and_no_name_of_an_attribute_is_taken_for_one() -> None:
    assert Reachable(Counting(lambda _: next(NUMBERS))).iterators == ["the global variable NUMBERS"]
    assert not Reachable(Counting(lambda model: model.NUMBERS)).iterators


def test_a_window_of_a_model_with_an_iterator_is_refused() -> None:
    model = Counting(lambda model: next(model.count))
    model.count = iter(range(100))  # type: ignore[assignment]
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "exact")
    batches = [(torch.randn(6, 6), torch.randint(0, 5, (6,))) for _ in range(2)]
    with pytest.raises(EngineRefused, match=r"it holds an iterator \(Counting\.count\).*over='micro'"):
        list(batchtrim.accumulate(step, batches))
    assert len(list(batchtrim.accumulate(step, batches, over="micro"))) == 2


@pytest.mark.parametrize("engine", ["exact", "two_pass"])
def test_a_window_counts_each_micro_batch_once(engine: str) -> None:
    _reset()
    model = Counting(of_a_global)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine)
    list(batchtrim.accumulate(step, [(torch.randn(6, 6), torch.randint(0, 5, (6,))) for _ in range(3)]))
    assert COUNT == 3


def test_libraries_and_tools_are_not_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "_handlerList", [])
    model = nn.Linear(2, 2)
    model.tool = torch.optim.SGD(model.parameters(), 0.1)  # type: ignore[assignment]
    # a size, as exported models hold; it notes what it is asked
    model.size = sympy.Symbol("s", integer=True)  # type: ignore[assignment]
    held = Reachable(model, nn.functional.cross_entropy)
    assert [names.owner for names in held.names] == [model]
    assert held.modules == [model]
    assert not held.watched
