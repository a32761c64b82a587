"""Record and restore what a forward changes besides its result: generators, the model's state, the batch.

An engine that runs the model's Python twice starts the second run from the state before the first, and leaves
everything as the first run left it, as one plain step would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_not
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import parametrize

from batchtrim.engine.contents import copy_of, put_back, relative_difference, same_contents, same_value
from batchtrim.engine.generators import GeneratorStates
from batchtrim.engine.memory import SharedMemory, write_values
from batchtrim.engine.model_facts import device_of, is_sharded
from batchtrim.engine.names import attributes_of
from batchtrim.engine.reachable import HOOKS, Reachable
from batchtrim.engine.rows import copied, entries, restore_values, tensors_of

if TYPE_CHECKING:
    from batchtrim.engine.forward import Forward

__all__ = ["ModelState", "Snapshot", "caches_left", "restored", "without_graph"]

_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@contextmanager
def caches_left() -> Iterator[None]:
    """Leave no weight in a cache of torch's: neither one cast by autocast, nor one made by a parametrization.

    A later pass would find it with the graph of this one, or without any.
    """
    caching, made = torch.is_autocast_cache_enabled(), parametrize._cache.copy()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caching)
        put_back(parametrize._cache, made)


@contextmanager
def without_graph() -> Iterator[None]:
    """Run without a graph, and leave no weight in a cache."""
    with caches_left(), torch.no_grad():
        yield


class ModelState:
    """A copy of what a forward may change, except its result and the generators; see :class:`Reachable`.

    Args:
        roots: the model, and what computes its loss; or a batch.
        passed: what is left out.
    """

    def __init__(self, *roots: Any, passed: Iterable[Any] = ()) -> None:
        self.roots = roots
        held = Reachable(*roots, passed=passed)
        self.modules, self.watched, self.lasting = held.modules, held.watched, held.lasting
        self.modes = [(module, module.training) for module in self.modules]
        swaps = any(is_sharded(module) for module in self.modules)  # FSDP exchanges parameters itself, for its backward
        kinds = ("_modules",) if swaps else ("_modules", "_parameters", *HOOKS)
        parts = [vars(module).get(kind) for module in self.modules for kind in kinds]
        own = [each for each in parts if isinstance(each, dict)]  # not of a script module
        self.parts = [(each, dict(each)) for each in own if each]
        self.empty_parts = [each for each in own if not each]  # as are the hooks of most modules
        self.buffers = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in self.modules
            for name, buffer in module._buffers.items()
        ]
        self.empty_caches = [each for each in held.caches if not each.cache_info().currsize]
        self.tensors = held.of_tensors
        given = [attributes_of(tensor) for tensor in self.tensors if vars(tensor)]
        self.names = [(names, names.state()) for names in (*held.names, *given)]
        self.hooks = {
            (id(tensor), kind): dict(hooks)
            for tensor in ([] if swaps else self.tensors)
            for kind in _TENSOR_HOOKS
            if (hooks := getattr(tensor, kind))
        }
        self.swaps = swaps
        self.contents = [(value, copy_of(value)) for value in held.contents]

    def restore(self, modes: bool = True) -> None:
        """Restore everything, in place if it is still the same object; ``modes``: training and evaluation too."""
        for parts, before in self.other_parts():
            parts.clear()
            parts.update(before)
        for cache in self.filled_caches():
            cache.cache_clear()
        for names, noted in self.names:
            names.put_back(noted)
        self._restore_tensors()
        known = {(id(module), name) for module, name, _, _ in self.buffers}
        for module in self.modules:
            for name in [name for name in module._buffers.keys() if (id(module), name) not in known]:  # noqa: SIM118
                del module._buffers[name]
        for module, name, buffer, value in self.buffers:
            if name in module._buffers:
                module._buffers[name] = buffer
            if buffer is not None and value is not None:
                write_values(buffer, value)  # bypass autograd, which may have saved the buffer, not for its value
        for value, copy in self.contents:
            put_back(value, copy)
        for module, training in self.modes if modes else ():
            if module.training is not training:
                module.training = training

    def _restore_tensors(self) -> None:
        """Restore hooks of tensors, and delete attributes of those that had none."""
        given = {id(names.owner) for names, _ in self.names}
        for tensor in self.tensors:
            if vars(tensor) and id(tensor) not in given:
                attributes_of(tensor).put_back({})
            for kind in () if self.swaps else _TENSOR_HOOKS:
                hooks, before = getattr(tensor, kind), self.hooks.get((id(tensor), kind), {})
                if hooks and hooks.keys() != before.keys():
                    hooks.clear()
                    hooks.update(before)

    def other_parts(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return the submodules, parameters and hooks that are others now, and what they were, each by name."""
        changed = [
            (parts, before)
            for parts, before in self.parts
            if list(parts) != list(before) or any(map(is_not, parts.values(), before.values()))
        ]
        return changed + [(parts, {}) for parts in self.empty_parts if parts]

    def filled_caches(self) -> list[Any]:
        """Return the functions with ``lru_cache`` that were not called before."""
        return [each for each in self.empty_caches if each.cache_info().currsize]

    def set_up(self) -> bool:
        """Return True if there are layers, hooks, flags, functions or caches that a first forward made."""
        made = any(names.set_up(noted) for names, noted in self.names)
        return bool(made or self.other_parts() or self.filled_caches())

    def difference(self, other: ModelState) -> float:
        """Return the largest difference of a buffer, relative to its norm; inf if attributes differ."""
        largest = 0.0
        if len(self.buffers) != len(other.buffers):
            return float("inf")
        for (_, name, _, ours), (_, theirs_name, _, theirs) in zip(self.buffers, other.buffers, strict=True):
            if name != theirs_name or (ours is None) != (theirs is None):
                return float("inf")
            if ours is not None and theirs is not None:
                far = relative_difference(ours, theirs)
                largest = far if not far <= largest else largest
        return largest

    def other_attributes(self, other: ModelState) -> list[str]:
        """Return the names of plain numbers and strings that differ; containers and tensors are not compared."""
        found, numbers = [], (bool, int, float, complex, str)
        for (owner, ours), (_, theirs) in zip(self._attributes(), other._attributes(), strict=False):
            for name in ours.keys() | theirs.keys():
                a, b = ours.get(name), theirs.get(name)
                simple = isinstance(a, numbers) or isinstance(b, numbers)
                if simple and not same_value(a, b, 0.0):
                    found.append(f"{type(owner).__name__}.{name}")
        return found

    def unlike(self, other: ModelState, apart: float) -> str | None:
        """Return the name of something that two runs of the same model left different, or None.

        Args:
            apart: how far tensors may differ, relative to their norm.
        """
        theirs = {(id(names.owner), name): value for names, noted in other.names for name, value in noted.items()}
        for names, noted in self.names:
            for name, value in noted.items():
                if not same_value(value, theirs.get((id(names.owner), name)), apart):
                    return f"{getattr(names.owner, '__name__', type(names.owner).__name__)}.{name}"
        contents = {id(value): copy for value, copy in other.contents}
        for value, copy in self.contents:
            if not same_contents(copy, found := contents.get(id(value), copy), apart):
                kind, same = type(value).__name__, isinstance(copy, dict) and copy.keys() == found.keys()
                if same and list(copy) != list(found):  # no trace moves entries of an OrderedDict to its end
                    return f"order of the {kind} that it holds {tuple(copy)[:8]}"
                return f"value in a {kind} that it holds"
        return None if self.difference(other) <= apart else "value of a buffer"

    def _attributes(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return the owners of attributes with these, without functions, of which a compiled model has more.

        Each tensor is one: a trace gives some of them attributes.
        """
        tensors = set(map(id, self.tensors))
        found = [
            (names.owner, noted)
            for names, noted in self.names
            if names.whole is not None and not isinstance(names.owner, FunctionType)
        ]
        noted = {id(owner): noted for owner, noted in found if id(owner) in tensors}
        return [
            *((owner, noted) for owner, noted in found if id(owner) not in tensors),
            *((tensor, noted.get(id(tensor), {})) for tensor in self.tensors),
        ]


class Snapshot:
    """A copy of what a step may change: the model's state, generators, and the batch if one is given.

    Attributes:
        x, y: copies of the batch.
        given: the batch itself, its lists, dictionaries and objects.
        shared: the parts of the batch that share memory.
    """

    def __init__(self, forward: Forward, x: Any = None, y: Any = None) -> None:
        self.x, self.y = copied((x, y))
        self._tensors = tensors_of((x, y)), tensors_of((self.x, self.y))
        self.given = ModelState([x, y], passed=self._tensors[0])
        self.model = ModelState(forward.inner, forward.per_sample_loss, forward.rank_by)
        self.shared = SharedMemory(entries(x), entries(y), forward.batch_dim, self.model.tensors)
        self.generators = GeneratorStates(device_of(forward.inner))
        self.made = parametrize._cache.copy()

    def restore(self, *, modes: bool = True, batch: bool = False) -> None:
        """Restore the model and the generators, and the batch if asked."""
        put_back(parametrize._cache, self.made)
        self.model.restore(modes)
        self.generators.restore()
        if batch:
            self.given.restore()
            restore_values(*self._tensors)

    @property
    def lasting(self) -> str | None:
        """The reason why a second forward cannot start where the first did, or None."""
        return self.model.lasting or (f"in the batch, {self.given.lasting}" if self.given.lasting else None)


@contextmanager
def restored(snapshot: Snapshot) -> Iterator[None]:
    """Start from a snapshot, and restore the model and the generators afterwards."""
    found = ModelState(*snapshot.model.roots), GeneratorStates(snapshot.generators.device)
    snapshot.restore()
    try:
        yield
    finally:
        for each in found:
            each.restore()
