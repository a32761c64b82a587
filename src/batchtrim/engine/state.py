"""Record and restore what a forward changes besides its result: generators, buffers, plain attributes, the batch.

An engine that runs the model's Python twice starts the second run from the state before the first, and leaves
everything as the first one left it: as one plain step would have.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchtrim.engine.rows import copied, restore_values

if TYPE_CHECKING:
    from batchtrim.engine.batch import Forward

__all__ = [
    "GeneratorStates",
    "ModelState",
    "Moment",
    "compiled_part",
    "device_of",
    "full_float32",
    "is_lazy",
    "is_sharded",
    "modules_of",
    "uncompiled_calls",
    "uses_tf32",
    "without_graph",
]

# Values that a plain attribute may hold and that are noted as they are; containers are noted by a shallow copy.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), tuple)
_CONTAINERS = (list, dict, set, deque)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def without_graph() -> Iterator[None]:
    """Run without a graph, and leave no weights that autocast has cast.

    A later pass with a graph would find them, and on torch 2.4 no gradient would reach the weights behind them.
    """
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(caching)


@contextmanager
def uncompiled_calls() -> Iterator[None]:
    """Run what is compiled as plain Python meanwhile, where the torch release can."""
    if not hasattr(torch.compiler, "set_stance"):  # before torch 2.6
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters, or of its buffers if it has none."""
    held = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if held is None else held.device


def is_sharded(module: nn.Module) -> bool:
    """Return True if a module gathers its parameters in every forward (FSDP), which gives them other memory."""
    return any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__)


def uses_tf32(device: torch.device) -> bool:
    """Return True if products of float32 may be computed with TF32's ten bits, which is cuDNN's default."""
    return device.type == "cuda" and any(getattr(place, name) in (True, "tf32") for place, name in _tf32_switches())


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products of float32 in float32 meanwhile, on a GPU too."""
    before = [(place, name, getattr(place, name)) for place, name in _tf32_switches()]
    try:
        for place, name, value in before:
            setattr(place, name, "ieee" if isinstance(value, str) else False)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _tf32_switches() -> list[tuple[Any, str]]:
    """Return where torch keeps whether TF32 is allowed. From 2.9 on each operator has a word of its own.

    The older switches raise there once a user has set one of the new ones.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        return [(place, "fp32_precision") for place in (matmul, cudnn.conv, cudnn.rnn)]
    return [(matmul, "allow_tf32"), (cudnn, "allow_tf32")]


def is_lazy(model: nn.Module) -> bool:
    """Return True if a parameter or buffer gets its shape in the first forward (``nn.LazyLinear``)."""
    return any(map(nn.parameter.is_lazy, itertools.chain(model.parameters(), model.buffers())))


def compiled_part(model: nn.Module) -> Any:
    """Return what torch.compile made of the model or of a part of it, the first there is; None where nothing is."""
    for module in model.modules():
        if hasattr(module, "_orig_mod"):
            return module
        if getattr(module, "_compiled_call_impl", None) is not None:
            return module._compiled_call_impl
    return None


def modules_of(*roots: Any) -> list[nn.Module]:
    """Return the modules of a model and of what computes its loss, each once.

    A loss may be a module, hold one as an attribute (``per_sample`` does, in a criterion of its own) or in its closure,
    or be a bound method of one.
    """
    found: dict[int, nn.Module] = {}
    for root in roots:
        for each in _held(root):
            found.update((id(module), module) for module in each.modules())
    return list(found.values())


def _held(value: Any, depth: int = 2) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth >= 0 and not isinstance(value, (type, ModuleType)):
        cells = getattr(value, "__closure__", None) or ()
        attributes = getattr(value, "__dict__", {})
        for each in (getattr(value, "__self__", None), *attributes.values(), *map(_content, cells)):
            yield from _held(each, depth - 1)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


class GeneratorStates:
    """The state of every generator a forward may draw from: torch's, Python's, and NumPy's if it is loaded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy: Any = None if numpy is None else numpy.random.get_state(legacy=False)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)
        self.restore_outside_torch()

    def restore_outside_torch(self) -> None:
        """Put back Python's and NumPy's generators alone."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def same(self, other: GeneratorStates) -> bool:
        """Return True if nothing was drawn between the two."""
        return self.same_torch_state(other) and self.python == other.python and _same_numpy(self.numpy, other.numpy)

    def same_torch_state(self, other: GeneratorStates) -> bool:
        if self.accelerator is not None and other.accelerator is not None:
            return torch.equal(self.cpu, other.cpu) and torch.equal(self.accelerator, other.accelerator)
        return torch.equal(self.cpu, other.cpu)


def _same_numpy(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return True  # NumPy was imported in between: nothing of it was there to compare with
    same = a["state"]["pos"] == b["state"]["pos"] and (a["state"]["key"] == b["state"]["key"]).all()
    return bool(same) and a["has_gauss"] == b["has_gauss"]


class ModelState:
    """Buffers and plain attributes of modules, as they are now.

    Buffers registered as None are among them, and so are generators and tensors that a module holds as attributes, and
    the attributes of plain objects that it holds (a schedule that counts how often it is asked).
    Modules of ``torch.distributed`` keep their own attributes: they set themselves up in their first forward.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.buffers = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
        ]
        self.attributes = [
            (holder, {name: _noted(value) for name, value in vars(holder).items() if _is_state(name, value)})
            for holder in _holders([m for m in modules if not type(m).__module__.startswith("torch.distributed")])
        ]

    def restore(self) -> None:
        """Restore everything, in place if it is still the same tensor."""
        for module, name, buffer, value in self.buffers:
            if name in module._buffers:
                module._buffers[name] = buffer
            if buffer is not None and value is not None:
                buffer.data.copy_(value)  # past autograd, which may have saved the buffer but not for its value
        for module, noted in self.attributes:
            held = vars(module)
            for name in [name for name, value in held.items() if name not in noted and _is_state(name, value)]:
                # a mark that something was set up once (hooks, tables): taken away, it would be set up twice
                if not isinstance(held[name], bool):
                    del held[name]
            for name, (value, copy) in noted.items():
                held[name] = _put_back(value, copy)

    def difference(self, other: ModelState) -> float:
        """Return the largest difference of a buffer, relative to its norm; inf where attributes differ."""
        largest = 0.0
        for (_, name, _, ours), (_, theirs_name, _, theirs) in zip(self.buffers, other.buffers, strict=True):
            if name != theirs_name or (ours is None) != (theirs is None):
                return float("inf")
            if ours is not None and theirs is not None:
                far = relative_difference(ours, theirs)
                largest = far if not far <= largest else largest
        return largest

    def other_attributes(self, other: ModelState) -> list[str]:
        """Return the names of plain numbers and strings that differ; containers and tensors are not compared."""
        names = []
        for (module, ours), (_, theirs) in zip(self.attributes, other.attributes, strict=False):
            for name in ours.keys() | theirs.keys():
                a, b = ours.get(name, (None, None))[0], theirs.get(name, (None, None))[0]
                simple = isinstance(a, (bool, int, float, str)) or isinstance(b, (bool, int, float, str))
                if simple and a != b and not (a != a and b != b):
                    names.append(f"{type(module).__name__}.{name}")
        return names


class Moment:
    """A copy of what a step may change: buffers, plain attributes, generators, and the batch if one is given."""

    def __init__(self, forward: Forward, x: Any = None, y: Any = None) -> None:
        self.x, self.y = copied((x, y))
        self.model = ModelState(modules_of(forward.inner, forward.per_sample_loss, forward.rank_by))
        self.generators = GeneratorStates(device_of(forward.inner))

    def restore(self, x: Any = None, y: Any = None) -> None:
        """Put the model and the generators back, and the batch where it is given."""
        self.model.restore()
        self.generators.restore()
        if x is not None or y is not None:
            restore_values((x, y), (self.x, self.y))


def relative_difference(exact: Tensor, other: Tensor) -> float:
    """Return ``||exact - other|| / ||exact||``; inf where shapes differ, 0 where both are not finite alike."""
    if exact.shape != other.shape:
        return float("inf")
    if torch.equal(exact, other):
        return 0.0
    exact, other = exact.double(), other.double()
    scale = float(exact.norm())
    difference = float((exact - other).norm())
    return difference / scale if scale else difference


def _holders(modules: list[nn.Module]) -> list[Any]:
    """Return the modules, and behind them the plain objects that they hold, each once."""
    found: dict[int, Any] = {id(module): module for module in modules}
    for module in modules:
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE and _is_plain_object(value):
                found.setdefault(id(value), value)
    return list(found.values())


def _is_plain_object(value: Any) -> bool:
    if isinstance(value, (nn.Module, Tensor, type)) or callable(getattr(value, "__get__", None)):
        return False  # functions and methods have a __get__
    outside = type(value).__module__.partition(".")[0] in ("builtins", "functools", "numpy", "torch", "random")
    return not outside and isinstance(getattr(value, "__dict__", None), dict)


def _is_state(name: str, value: Any) -> bool:
    if name in _OF_EVERY_MODULE:
        return False
    if isinstance(value, nn.Parameter):
        return False
    return isinstance(value, (*_PLAIN, *_CONTAINERS, Tensor, torch.Generator, random.Random)) or _is_numpy(value)


def _is_numpy(value: Any) -> bool:
    """Return True for a ``numpy.random.Generator``, without importing NumPy."""
    return type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator")


def _noted(value: Any) -> tuple[Any, Any]:
    """Return an attribute's value, and a copy of its content if that may change in place."""
    if isinstance(value, Tensor):
        return value, value.detach().clone()
    if isinstance(value, torch.Generator):
        return value, value.get_state()
    if isinstance(value, random.Random):
        return value, value.getstate()
    if _is_numpy(value):
        return value, value.bit_generator.state
    return value, value.copy() if isinstance(value, _CONTAINERS) else None


def _put_back(value: Any, copy: Any) -> Any:
    if isinstance(value, Tensor):
        value.data.copy_(copy)
    elif isinstance(value, torch.Generator):
        value.set_state(copy)
    elif isinstance(value, random.Random):
        value.setstate(copy)
    elif _is_numpy(value):
        value.bit_generator.state = copy
    elif isinstance(value, _CONTAINERS):
        value.clear()
        value.extend(copy) if isinstance(value, (list, deque)) else value.update(copy)
    return value
