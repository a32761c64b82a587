"""Products that nobody needs for themselves.

A transformer adds most of its products to something, or copies them into another order, and autograd keeps the sum or
the copy, never the product. There, the rows to hand out in the second pass are those of the sum: the product need be
neither remembered nor taken, and the sum not computed. A :class:`~batchtrim.engine.plan.Chain` is a remembered operator
and the cheap ones behind it, each the only reader of the one before; what its last one gives is what to remember.

:class:`Uses` finds chains in the second pass of a calibration, which computes everything: a tensor whose memory is free
again once the pass is over was kept by nobody, autograd included. The calibration after that tries them, and from then
on :class:`Awaited` sees to it that they are followed: what stands in the product's place is read by nobody else, and
kept by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from batchtrim.engine.guard import storage_of
from batchtrim.engine.operators import facts, tensors_in
from batchtrim.engine.plan import Chain, Unchained

__all__ = ["Awaited", "Uses"]

_LEAST = 2**18  # bytes of rows that are worth it


@dataclass
class _Track:
    memory: StorageWeakRef  # while it lives, nothing else gets the same key
    form: tuple[Any, ...]  # sizes and strides
    readers: list[_Reader] = field(default_factory=list)


@dataclass
class _Reader:
    func: Any
    form: tuple[Any, ...]  # of a tensor like the one it read
    made: _Track | None  # None: something that cannot be a link of a chain


class Uses:
    """Who reads what in a pass."""

    def __init__(self) -> None:
        self._tracks: dict[int, _Track] = {}
        self._products: dict[int, tuple[_Track, Chain]] = {}

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, cheap: bool) -> None:
        """An operator ran; ``cheap``: one that is computed in both passes and changes nothing in place."""
        if not facts(func).reads:
            return
        inputs = [value for value in _dense(args, kwargs) if storage_of(value) in self._tracks]
        made = None
        if _is_dense(out) and all(storage_of(out) != storage_of(value) for value in inputs):
            made = self._tracks[storage_of(out)] = _Track(StorageWeakRef(out.untyped_storage()), _form(out))
        link = made if cheap and made is not None and out.dtype.is_floating_point else None
        for value in inputs:
            like = torch.empty_like(value, device="meta")
            self._tracks[storage_of(value)].readers.append(_Reader(func, _form(like), link))

    def product(self, place: int, chain: Chain, out: Tensor) -> None:
        """What ran last was the remembered operator of ``chain``, whose links are yet to be found; it gave ``out``."""
        if out.nbytes >= _LEAST and out.is_contiguous() and out.dtype.is_floating_point and chain.layout.dim >= 0:
            self._products[place] = self._tracks[storage_of(out)], chain

    def chains(self) -> dict[int, Chain]:
        """Once the pass is over and its graph is all that is left of it: the chains, by the place of their product."""
        found: dict[int, Chain] = {}
        links_of_others: set[int] = set()
        for place, (track, chain) in self._products.items():
            links: list[Any] = []
            while track.memory.expired() and len(track.readers) == 1:
                reader = track.readers[0]
                if reader.made is None or id(reader.made) in links_of_others:
                    break
                links_of_others.add(id(reader.made))
                links.append(reader.func)
                if reader.made.form != reader.form:  # within a chain, what stands for a tensor is like its input
                    break
                track = reader.made
            if links:
                found[place] = replace(chain, links=tuple(links))
        return found


class Awaited:
    """What the next link of every chain is to read, in one pass.

    An entry is whatever stands for a chain that is being followed; of it, ``links`` are those yet to come.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Any, Tensor]] = {}  # with the tensor: nothing else is to come to lie there
        self._voids: dict[int, StorageWeakRef] = {}

    def __bool__(self) -> bool:
        return bool(self._entries or self._voids)

    def forget_the_gone(self) -> None:
        """Look no more for readers of what no longer exists."""
        while self._voids and self._voids[last := next(reversed(self._voids))].expired():
            del self._voids[last]

    def add(self, entry: Any, out: Tensor) -> Tensor:
        """``out``, which the entry's next link is to read."""
        self._entries[storage_of(out)] = entry, out
        return out

    def add_void(self, entry: Any, room: Tensor) -> Tensor:
        """Likewise, for a tensor with nothing in it: it stands in place of what nobody else reads."""
        room.as_strided((1,), (1,)).fill_(float("nan"))  # for the case that somebody does, past torch
        self._voids[storage_of(room)] = StorageWeakRef(room.untyped_storage())
        return self.add(entry, room)

    def holds(self, out: Any) -> bool:
        """Whether a link is to read this."""
        return isinstance(out, Tensor) and storage_of(out) in self._entries

    def next(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor] | None:
        """The entry whose next link an operator is, if it is one, and what it reads of it.

        Raises:
            Unchained: it reads what at calibration another operator read, or nobody.
        """
        if not facts(func).reads:
            return None
        for value in _dense(args, kwargs):
            key = storage_of(value)
            entry, _ = self._entries.pop(key, (None, None))
            unlike = key in self._voids if entry is None else entry.links[0] is not func
            if unlike:
                raise Unchained(f"{func} reads what it did not read at calibration")
            if entry is not None:
                entry.links = entry.links[1:]
                return entry, value
        return None

    def check_over(self) -> None:
        """Once the pass is over.

        Raises:
            Unchained: a link never came, or somebody keeps what nobody kept at calibration.
        """
        if self._entries:
            raise Unchained("nobody reads what was read at calibration")
        if not all(memory.expired() for memory in self._voids.values()):
            raise Unchained("somebody keeps what nobody kept at calibration")


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride()


def _dense(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in tensors_in((*args, *kwargs.values())) if _is_dense(value)]


def _is_dense(value: Any) -> bool:
    """Whether it is a tensor with memory of its own to speak of; a sparse one has none."""
    return isinstance(value, Tensor) and value.layout is torch.strided
