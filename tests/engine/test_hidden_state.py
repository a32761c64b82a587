"""State in objects that are no plain containers is put back, so that it changes once a step.

Each forward changes something that its loss does not show, so that no comparison of losses can find it.
"""

from __future__ import annotations

import array
import collections
import csv
import ctypes
import dataclasses
import decimal
import enum
import io
import logging
import logging.handlers
import mmap
import multiprocessing
import operator
import os
import queue
import sys
import threading
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import other_file
import pytest
import torch
from doing import Doing
from torch import nn

import batchtrim

Case = tuple[Callable[[], Any], Callable[[], Any]]  # what a forward does, and what is then read


class Object:
    def __init__(self) -> None:
        self.n = 0


class Slots:
    __slots__ = ("__hidden", "late")

    def __init__(self) -> None:
        self.__hidden = 0

    def move(self) -> None:
        self.__hidden += 1
        self.late = getattr(self, "late", 0) + 1

    def held(self) -> Any:
        return self.__hidden, self.late


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    n: int = 0


class Colour(enum.Enum):
    RED = 1


class Meta(type):
    n = 0


class WithMeta(metaclass=Meta):
    pass


class Attributed(dict):  # type: ignore[type-arg]
    n = 0


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _of_an_object(held: Any, get: Callable[[], Any]) -> Case:
    """Add one to ``n`` of an object, reached by ``get`` alone; ``held`` keeps it alive."""

    def do() -> None:
        each = get()
        if isinstance(each, Frozen):
            object.__setattr__(each, "n", each.n + 1)
        else:
            each.n += 1

    return do, lambda: get().n if held is not None else None


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _first_of(values: Any) -> Callable[[], Any]:
    return lambda: next(iter(values))


def by_item(held: Any) -> Case:
    def do() -> None:
        held[0] = held[0] + 1 if isinstance(held[0], int) else held[0][0] + 1

    return do, lambda: bytes(held)[:1]


def of_a_structure() -> Case:
    value = ctypes.c_int(0)

    def do() -> None:
        value.value += 1

    return do, lambda: value.value


def of_a_pointer() -> Case:
    pointer = ctypes.pointer(ctypes.c_int(0))

    def do() -> None:
        pointer.contents.value += 1

    return do, lambda: pointer.contents.value


def of_a_writer() -> Case:
    text = io.StringIO()
    writer = csv.writer(text)
    return lambda: writer.writerow([1]), text.getvalue


def of_a_bound_method() -> Case:
    seen: list[int] = []
    append = seen.append
    return lambda: append(1), lambda: len(seen)


def of_a_handler(handler: logging.Handler, read: Callable[[], Any]) -> Case:
    logger = logging.getLogger("a logger of the tests")
    logger.handlers, logger.propagate = [handler], False
    return lambda: logger.warning("x"), read


def of_a_recorder() -> Case:
    return of_a_handler(handler := Recorder(), lambda: list(handler.texts))


def of_a_memory_handler() -> Case:
    handler = logging.handlers.MemoryHandler(100, 60)
    return of_a_handler(handler, lambda: len(handler.buffer))


def of_a_queue_handler() -> Case:
    records: queue.Queue[Any] = queue.Queue()
    return of_a_handler(logging.handlers.QueueHandler(records), records.qsize)


def of_text_for_a_handler() -> Case:
    text = io.StringIO()
    return of_a_handler(logging.StreamHandler(text), text.getvalue)


def of_slots() -> Case:
    held = Slots()
    return held.move, held.held


def of_a_queue() -> Case:
    held: queue.Queue[int] = queue.Queue()
    return lambda: held.put(1), held.qsize


def of_a_semaphore() -> Case:
    held = threading.Semaphore(900)
    return lambda: held.acquire(), lambda: held._value


def of_a_deque() -> Case:
    held = collections.deque([1, 2, 3, 4, 5], maxlen=5)
    return lambda: held.rotate(1), lambda: list(held)


def of_a_mapping_proxy() -> Case:
    held = types.MappingProxyType({"seen": []})  # type: ignore[var-annotated]
    return lambda: held["seen"].append(1), lambda: len(held["seen"])


def of_an_array_of_objects() -> Case:
    held = np.empty(1, dtype=object)
    held[0] = []
    return lambda: held[0].append(1), lambda: len(held[0])


def of_a_base_of_an_array() -> Case:
    held = np.zeros(2).view()
    held.flags.writeable = False

    def do() -> None:
        held.base[0] += 1  # type: ignore[index]

    return do, held.tolist


def of_a_class_made_later() -> Case:
    class Space:
        pass

    def do() -> None:
        Space.n = getattr(Space, "n", 0) + 1  # type: ignore[attr-defined]

    return do, lambda: Space.n  # type: ignore[attr-defined]


def of_a_function_made_later() -> Case:
    def do() -> None:
        do.n = getattr(do, "n", 0) + 1  # type: ignore[attr-defined]

    return do, lambda: do.n  # type: ignore[attr-defined]


def of_a_global_made_later() -> Case:
    globals().pop("LATER", None)

    def do() -> None:
        global LATER
        LATER = globals().get("LATER", 0) + 1  # type: ignore[name-defined]

    return do, lambda: globals()["LATER"]


def of_a_module_of_python() -> Case:
    file, other_file.COUNT = other_file, 0

    def do() -> None:
        setattr(file, "COUNT", getattr(file, "COUNT") + 1)  # noqa: B009, B010

    return do, lambda: file.COUNT


def of_a_module_by_its_name() -> Case:
    other_file.COUNT = 0

    def do() -> None:
        import other_file as file

        file.COUNT += 1

    return do, lambda: other_file.COUNT


def of_the_environment() -> Case:
    os.environ["OF_A_TEST"] = "0"

    def do() -> None:
        os.environ["OF_A_TEST"] = str(int(os.environ["OF_A_TEST"]) + 1)

    return do, lambda: os.environ["OF_A_TEST"]


def of_an_attribute_of_a_library() -> Case:
    torch.of_a_test = 0  # type: ignore[attr-defined]

    def do() -> None:
        torch.of_a_test += 1  # type: ignore[attr-defined]

    return do, lambda: torch.of_a_test  # type: ignore[attr-defined]


def of_the_paths() -> Case:
    before = list(sys.path)

    def do() -> None:
        sys.path.append("nowhere")

    def read() -> int:
        added = len(sys.path) - len(before)
        sys.path[:] = before
        return added

    return do, read


def of_decimals() -> Case:
    decimal.getcontext().prec = 20

    def do() -> None:
        decimal.getcontext().prec += 1

    return do, lambda: decimal.getcontext().prec


def of_a_number_for_processes() -> Case:
    held = multiprocessing.Value("i", 0)

    def do() -> None:
        with held.get_lock():
            held.value += 1

    return do, lambda: held.value


def of_an_array_that_grows() -> Case:
    held = np.zeros(1)
    return lambda: held.resize(len(held) + 1, refcheck=False), lambda: len(held)


def of_a_distribution() -> Case:
    held = torch.distributions.Normal(torch.zeros(1), torch.ones(1))

    def do() -> None:
        held.loc = held.loc + 1

    return do, lambda: float(held.loc)


def of_a_distribution_that_draws() -> Case:
    held = pytest.importorskip("scipy.stats").norm()
    held.random_state = np.random.default_rng(0)
    return held.rvs, lambda: held.random_state.bit_generator.state["state"]["state"]


RESTORED: dict[str, Callable[[], Case]] = {
    "memoryview": lambda: by_item(memoryview(bytearray(3))),
    "mmap": lambda: by_item(mmap.mmap(-1, 8)),
    "ctypes array": lambda: by_item((ctypes.c_byte * 3)()),
    "array": lambda: by_item(array.array("b", [0, 0])),
    "bytearray": lambda: by_item(bytearray(3)),
    "structure": of_a_structure, "pointer": of_a_pointer, "csv writer": of_a_writer, "bound": of_a_bound_method,
    "log handler": of_a_recorder, "log memory": of_a_memory_handler, "log queue": of_a_queue_handler,
    "log text": of_text_for_a_handler, "slots": of_slots, "queue": of_a_queue, "semaphore": of_a_semaphore,
    "deque": of_a_deque, "mapping proxy": of_a_mapping_proxy, "array of objects": of_an_array_of_objects,
    "base of an array": of_a_base_of_an_array, "new in a class": of_a_class_made_later,
    "new in a function": of_a_function_made_later, "new global": of_a_global_made_later,
    "module": of_a_module_of_python, "imported inside": of_a_module_by_its_name, "environment": of_the_environment,
    "attribute of a library": of_an_attribute_of_a_library, "paths": of_the_paths, "decimals": of_decimals,
    "distribution": of_a_distribution, "distribution that draws": of_a_distribution_that_draws,
    "number for processes": of_a_number_for_processes,
    "array that grows": of_an_array_that_grows,
    "weak reference": lambda: _of_an_object(held := Object(), weakref.ref(held)),
    "weak proxy": lambda: _of_an_object(held := Object(), _constant(weakref.proxy(held))),
    "weak values": lambda: _of_an_object(
        held := Object(), partial(operator.getitem, weakref.WeakValueDictionary({0: held}), 0)
    ),
    "frozen slots": lambda: _of_an_object(1, _constant(Frozen())),
    "key of a dictionary": lambda: _of_an_object(1, _first_of({Object(): 1})),
    "attribute of a dictionary": lambda: _of_an_object(1, _constant(Attributed())),
}  # fmt: skip


def _run(case: Case, engine: str) -> Any:
    torch.manual_seed(0)
    do, read = case
    step = batchtrim.TrimmedForward(Doing(do), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine)
    for _ in range(3):
        step(torch.randn(12, 6), torch.arange(12) % 5).backward()
        assert step.last is not None
        assert step.last.engine == engine
    return read()


@pytest.mark.parametrize("name", RESTORED)
def test_it_changes_once_a_step(name: str) -> None:
    expected, found = (_run(RESTORED[name](), engine) for engine in ("exact", "two_pass"))
    assert found == expected


@pytest.mark.parametrize(("member", "place"), [(Colour.RED, Colour.RED), (WithMeta, Meta)])
def test_members_of_enums_and_metaclasses_are_places_too(member: Any, place: Any) -> None:
    def do() -> None:
        place.n = member.n + 1

    for engine in ("exact", "two_pass"):
        place.n = 0
        assert _run((do, lambda: place.n), engine) == 3
