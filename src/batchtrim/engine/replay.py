"""Two passes over one model: the first remembers what costly operators gave, the second hands out the kept rows of it.

Both are dispatch modes, below autograd: in the second pass every node of the graph is built for k rows, while a
convolution or a matrix product is not computed but taken from memory. Cheap operators run again on k rows, but for
those that are taken in place of the product they read: see :mod:`batchtrim.engine.chains`.

Which rows of a remembered tensor belong to which sample is never guessed. The first time (and now and then after) the
second pass is a *calibration*: every operator is computed for the kept rows too, and a :class:`Layout` is accepted only
if it is the one layout that gives just these values. An operator with none, or with more than one, is computed again
from then on.

Legend: B batch, k kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from batchtrim.engine.chains import Awaited, Uses
from batchtrim.engine.guard import Guard, storage_of
from batchtrim.engine.layouts import WHOLE, Layout, candidates, close, take
from batchtrim.engine.operators import LIKE, Facts, Kind, argument, dropout_inside, facts, written_tensors
from batchtrim.engine.plan import Chain, Diverged, Plan, Refused, Step

# torch before 2.7 does not tell which hooks are in force; there, the frames are searched for torch's own checkpointing.
_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
_top_hooks = getattr(_autograd, "_top_saved_tensors_default_hooks", None)

__all__ = ["Recorder", "Replayer", "no_graph"]


@dataclass(slots=True)
class _Memory:
    func: Any
    outs: list[Any] | None
    where: str = ""
    witness: Tensor | None = None
    place: int = 0
    chain: Chain | None = None
    links: tuple[Any, ...] = ()  # of the chain, those yet to come


def no_graph() -> saved_tensors_hooks:
    """Run with gradients on but save nothing for backward.

    Operators decompose differently where gradients are off; so they stay on in the first pass, whose graph nobody uses.
    """
    return saved_tensors_hooks(_drop, _never)


def _drop(tensor: Tensor) -> None:
    return None


def _never(packed: None) -> Tensor:
    raise RuntimeError("the first pass of the shared engine has no graph to go backward through")


def _inside_checkpoint() -> bool:
    """Whether the code running now will be run again in backward, outside our sight (activation checkpointing)."""
    if not torch.is_grad_enabled():
        return True
    if _top_hooks is None:
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_filename != checkpoint.__file__:
            frame = frame.f_back
        return frame is not None
    top = _top_hooks(True)
    return top is not None and top[0] is not _drop


class _Pass(TorchDispatchMode):
    """What both passes share: the memory, and where random tensors come from."""

    def __init__(self, guard: Guard, memory: list[_Memory], calibrating: bool) -> None:
        super().__init__()
        self.guard = guard
        self.memory = memory
        self.calibrating = calibrating
        self._sources: dict[int, tuple[Tensor, int]] = {}
        self._awaited = Awaited()

    def _note_source(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """``empty_like(x).bernoulli_()``: the noise lies as x does. Noise itself cannot show how it lies."""
        if func._schema.name in LIKE:
            self._sources[storage_of(out)] = (args[0], args[0]._version)

    def _witness(self, args: tuple[Any, ...], shape: torch.Size) -> Tensor | None:
        """A tensor that lies as a random operator's output does and whose values tell samples apart."""
        for value in args:
            if isinstance(value, Tensor) and value.shape == shape:
                source = self._sources.get(storage_of(value))
                if source is None:
                    return value
                return source[0] if source[0]._version == source[1] else None
        return None


class Recorder(_Pass):
    """The first pass, on B rows."""

    def __init__(self, guard: Guard, plan: Plan | None, where: Callable[[], str], chains: dict[int, Chain]) -> None:
        super().__init__(guard, [], calibrating=plan is None)
        self.plan = plan
        self.chains = chains  # to be tried by a calibration
        self.where = where
        self.operators = 0
        self.flops = 0
        self.remembered = 0
        self._owners: dict[int, list[_Memory]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = facts(func)
        self.operators += 1
        if known.writes:
            for tensor in written_tensors(known, args, kwargs):
                self.guard.before_write(tensor)
                self._copy_before_write(tensor)
        if known.kind is Kind.PLAIN:
            chained = self._awaited.next(func, args, kwargs) if self._awaited else None
            out = func(*args, **kwargs)
            if chained is not None:
                entry = chained[0]
                self._awaited.add(entry, out) if entry.links else self._fill(entry, [out])
            if self.calibrating and isinstance(out, Tensor):
                self._note_source(func, args, out)
            return out
        if known.kind is Kind.BATCH_NORM:
            return self._batch_norm(func, args, kwargs)
        self._check(func, known, args, kwargs)
        witness = None
        if self.calibrating and known.kind is Kind.RANDOM:
            like = args[0].shape if args and isinstance(args[0], Tensor) else None
            witness = None if like is None else self._witness(args, like)
            witness = witness.clone() if witness is not None else None
        out = func(*args, **kwargs)
        if self.calibrating and func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        if known.kind is not Kind.RECURRENT:
            kept = _copy_of_draw(func, out) if known.writes else out
            self._remember(func, list(kept) if isinstance(kept, (tuple, list)) else [kept], witness)
        return out

    def _batch_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not argument(func, args, kwargs, "training"):
            return func(*args, **kwargs)
        if _inside_checkpoint():
            raise Refused("BatchNorm inside activation checkpointing, or inside no_grad, runs again out of sight")
        for name in ("running_mean", "running_var"):
            statistic = argument(func, args, kwargs, name)
            if statistic is not None:
                self.guard.before_write(statistic, read_again=False)
        out = func(*args, **kwargs)
        self._remember(func, [out[1], out[2]])
        return out

    def _check(self, func: Any, known: Facts, args: Any, kwargs: Any) -> None:
        name = func._schema.name
        if known.kind is Kind.COLLECTIVE:
            raise Refused(f"{name} talks to other processes inside the forward (SyncBatchNorm, sharded parameters)")
        if known.kind in (Kind.ATTENTION, Kind.RECURRENT) and dropout_inside(func, args, kwargs):
            raise Refused(
                f"{name} draws its dropout inside a fused kernel, where it cannot be drawn again for some rows"
            )
        if known.kind is Kind.RANDOM and _inside_checkpoint():
            raise Refused(
                f"{name} draws inside activation checkpointing, or inside no_grad, and is drawn again out of sight"
            )

    def _remember(self, func: Any, outs: list[Any], witness: Tensor | None = None) -> None:
        place = len(self.memory)
        entry = _Memory(func, None, self.where(), witness, place)
        self.memory.append(entry)
        if self.plan is not None and (place >= len(self.plan.steps) or self.plan.steps[place].func is not func):
            raise Diverged(f"operator {place} is {func}, unlike at calibration")
        chain = self.chains.get(place) if self.plan is None else self.plan.steps[place].chain
        if chain is None or chain.func is not func or (chain.shape,) != _shapes(outs):
            self._fill(entry, outs)
        else:
            entry.chain, entry.links = chain, chain.links
            self._awaited.add(entry, outs[0])

    def _fill(self, entry: _Memory, outs: list[Any]) -> None:
        if self.calibrating:
            self.remembered += sum(out.nbytes for out in outs if isinstance(out, Tensor))
        if self.plan is not None:
            step = self.plan.steps[entry.place]
            if step.shapes != _shapes(outs):
                raise Diverged(f"operator {entry.place}, {entry.func}, gives {_shapes(outs)}, unlike at calibration")
            if step.layouts is None:
                return
        entry.outs = outs
        for out in outs:
            if isinstance(out, Tensor):
                self._owners.setdefault(storage_of(out), []).append(entry)

    def _copy_before_write(self, tensor: Tensor) -> None:
        key = storage_of(tensor)
        for entry in self._owners.pop(key, ()):
            if entry.outs is not None:
                entry.outs = [
                    out.clone() if isinstance(out, Tensor) and storage_of(out) == key else out for out in entry.outs
                ]

    def finish(self) -> list[_Memory]:
        """The memory, once the pass is over."""
        if self.plan is not None and len(self.memory) != len(self.plan.steps):
            raise Diverged(f"{len(self.memory)} operators ran, {len(self.plan.steps)} at calibration")
        self._awaited.check_over()
        self._owners.clear()
        self._sources.clear()
        return self.memory


class Replayer(_Pass):
    """The second pass, on the given rows. Without a plan it calibrates, and :attr:`plan` is what it found."""

    def __init__(
        self, guard: Guard, memory: list[_Memory], plan: Plan | None, rows: Tensor, batch: int, prove: int = -1
    ) -> None:
        super().__init__(guard, memory, calibrating=plan is None)
        self.plan = Plan() if plan is None else plan
        self.prove = prove  # the operator to compute for real in passing and compare
        self.rows = rows
        self.batch = batch
        self.k = rows.shape[0]
        self._next = 0
        self._uses = Uses()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.calibrating:
            return self._run(func, args, kwargs)
        out = self._run(func, args, kwargs)
        known = facts(func)
        self._uses.operator(func, args, kwargs, out, known.kind is Kind.PLAIN and not known.writes)
        if known.kind is Kind.COSTLY and isinstance(out, Tensor):
            entry = self.memory[self._next - 1]
            step, chain = self._step(entry), entry.chain
            if chain is None and step.layouts is not None:
                chain = Chain(func, step.shapes[0], out.dtype, step.layouts[0], ())
            if chain is not None:
                self._uses.product(entry.place, chain, out)
        if not self._awaited.holds(out):
            self.plan.written += _written(func, out) / self.k
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        known = facts(func)
        kind = known.kind
        self._awaited.forget_the_gone()
        chained = self._awaited.next(func, args, kwargs) if self._awaited else None
        if chained is not None:
            return self._link(*chained, func, args, kwargs)
        if kind is Kind.PLAIN:
            out = func(*args, **kwargs)
            if self.calibrating and isinstance(out, Tensor):
                self._note_source(func, args, out)
            return out
        if kind is Kind.BATCH_NORM:
            if not argument(func, args, kwargs, "training"):
                return func(*args, **kwargs)
            return self._batch_norm(func, args, kwargs)
        if kind is Kind.RECURRENT:
            return func(*args, **kwargs)
        entry = self._recall(func)
        if kind is Kind.NUMBER:
            self._decide(entry, (WHOLE,))
            return entry.outs[0] if entry.outs else func(*args, **kwargs)
        if kind is Kind.RANDOM:
            return self._random(entry, func, known, args, kwargs)
        return self._calibrate(entry, func, args, kwargs) if self.calibrating else self._take(entry, func, args, kwargs)

    def _recall(self, func: Any) -> _Memory:
        if self._next >= len(self.memory):
            raise Diverged(f"the second pass runs {func}, which the first did not")
        entry = self.memory[self._next]
        same = entry.func is func or (facts(entry.func).kind is Kind.BATCH_NORM is facts(func).kind)
        if not same:
            raise Diverged(f"the second pass runs {func} where the first ran {entry.func}")
        self._next += 1
        return entry

    def _step(self, entry: _Memory) -> Step:
        return self.plan.steps[entry.place]

    def _decide(self, entry: _Memory, layouts: tuple[Layout, ...] | None) -> None:
        if self.calibrating:
            self.plan.steps.append(Step(entry.func, layouts, _shapes(entry.outs or []), entry.where))

    def _link(self, entry: _Memory, value: Tensor, func: Any, args: Any, kwargs: Any) -> Tensor:
        """A cheap operator of a chain: made up, or, at its end, taken from memory."""
        real: Any = func(*args, **kwargs) if self.calibrating or entry.place == self.prove else None
        if entry.links and real is None:
            return self._awaited.add_void(entry, torch.empty_like(value))
        if entry.links:
            return self._awaited.add(entry, real)
        if self.calibrating:
            layouts = self._fitting(entry, [real])
            chain = None if layouts is None else entry.chain
            self.plan.steps[entry.place] = Step(entry.func, layouts, _shapes(entry.outs or []), entry.where, chain)
            entry.outs = None
            return real
        layouts = self._step(entry).layouts
        assert layouts is not None
        assert entry.outs is not None
        taken = take(entry.outs[0], layouts[0], self.rows)
        entry.outs = None
        if real is not None:
            self._prove(func, real, [taken])
        return taken

    def _take(self, entry: _Memory, func: Any, args: Any, kwargs: Any) -> Any:
        layouts, chain = self._step(entry).layouts, self._step(entry).chain
        if layouts is None or entry.outs is None:
            return func(*args, **kwargs)
        if chain is not None:
            entry.links = chain.links
            if entry.place == self.prove:
                return self._awaited.add(entry, func(*args, **kwargs))
            return self._awaited.add_void(entry, chain.room(self.k, self.rows.device))
        taken = [
            take(out, layout, self.rows) if isinstance(out, Tensor) else out
            for out, layout in zip(entry.outs, layouts, strict=True)
        ]
        entry.outs = None  # free it: the graph for k rows grows as the memory of B rows shrinks
        if entry.place == self.prove:
            self._prove(func, func(*args, **kwargs), taken)
        return tuple(taken) if len(func._schema.returns) > 1 else taken[0]

    def _prove(self, func: Any, real: Any, taken: list[Any]) -> None:
        parts = list(real) if isinstance(real, (tuple, list)) else [real]
        for part, rows in zip(parts, taken, strict=True):
            floating = isinstance(part, Tensor) and part.dtype.is_floating_point
            if floating and not close(part, rows) and bool(part.isfinite().all()):  # NaN is close to nothing
                raise Diverged(f"the rows taken from {func} are not those of the kept samples")

    def _calibrate(self, entry: _Memory, func: Any, args: Any, kwargs: Any) -> Any:
        real = func(*args, **kwargs)
        if entry.chain is not None:
            self._decide(entry, None)  # until the chain's end
            entry.links = entry.chain.links
            return self._awaited.add(entry, real)
        self._decide(entry, self._fitting(entry, list(real) if isinstance(real, (tuple, list)) else [real]))
        entry.outs = entry.witness = None
        return real

    def _fitting(self, entry: _Memory, parts: list[Any]) -> tuple[Layout, ...] | None:
        """For each of an operator's outputs the one layout that gives these rows of it; None where one has not one."""
        found: list[Layout] = []
        for full, part in zip(entry.outs or [], parts, strict=True):
            if not isinstance(full, Tensor) or (
                found and not part.dtype.is_floating_point and full.shape == part.shape
            ):
                found.append(WHOLE)  # seeds and sizes that travel beside an attention's output
                continue
            fitting = [
                layout
                for layout in candidates(full.shape, part.shape, self.batch, self.k)
                if close(part, take(full, layout, self.rows))
            ]
            if len(fitting) != 1:
                self.plan.undecided += len(fitting) > 1
                self.plan.unmatched += [] if fitting else [f"{entry.func._schema.name} in {entry.where or 'the model'}"]
                return None
            found.append(fitting[0])
        return tuple(found)

    def _random(self, entry: _Memory, func: Any, known: Facts, args: Any, kwargs: Any) -> Any:
        if self.calibrating:
            with _restored_generators(self.guard.device, kwargs.get("generator")):
                # only its shape is wanted: the draw itself is the first pass's
                real = func(*args, **kwargs)
            parts = list(real) if isinstance(real, (tuple, list)) else [real]
            self._decide(entry, self._random_layouts(entry, func, args, parts))
        layouts = self._step(entry).layouts
        if layouts is None or entry.outs is None:
            raise Diverged(f"{func} was not remembered")
        drawn = [take(out, layout, self.rows) for out, layout in zip(entry.outs, layouts, strict=True)]
        entry.outs = entry.witness = None
        if known.writes:
            return args[0].copy_(drawn[0])
        return tuple(drawn) if len(func._schema.returns) > 1 else drawn[0]

    def _random_layouts(self, entry: _Memory, func: Any, args: Any, parts: list[Any]) -> tuple[Layout, ...]:
        name = f"{func._schema.name} in {entry.where or 'the model'}"
        layouts: list[Layout] = []
        for full, part in zip(entry.outs or [], parts, strict=True):
            fitting = candidates(full.shape, part.shape, self.batch, self.k)
            if fitting and fitting != [WHOLE] and not full.dtype.is_floating_point and full.dtype is not torch.bool:
                raise Refused(f"{name} draws one number for each sample, which may be an index into the batch")
            if len(fitting) > 1:
                mine, whole = self._witness(args, part.shape), entry.witness
                if mine is None or whole is None or whole.shape != full.shape:
                    raise Refused(f"{name} draws for batch and another dimension merged into one")
                fitting = [layout for layout in fitting if close(mine, take(whole, layout, self.rows))]
                if len(fitting) > 1:
                    raise Diverged(f"{name}: more than one layout fits the values it is applied to")
            if not fitting:
                raise Refused(f"{name} draws for pairs of samples, or in an order that changes with the batch")
            layouts.append(fitting[0])
        return tuple(layouts)

    def _batch_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Normalise k rows by the whole batch's statistics. Running statistics were moved by the first pass.

        Gives (output, mean, 1/deviation) of the whole batch, which is what backward works from: see
        :mod:`batchtrim.engine.batch_norm`.
        """
        entry = self._recall(func)
        if not self.calibrating and self._step(entry).layouts is None:
            return self._own_statistics(func, args, kwargs)
        mean, inverse = entry.outs or (None, None)
        x = args[0]
        if mean is None or inverse is None or x.shape[1] != mean.shape[0]:
            # statistics of each sample (InstanceNorm runs this operator with samples as channels)
            self._decide(entry, None)
            return self._own_statistics(func, args, kwargs)
        self._decide(entry, (WHOLE, WHOLE))
        weight, bias = args[1], args[2]
        eps = argument(func, args, kwargs, "eps", 1e-5)
        variance = inverse.double().pow(-2).sub(eps).clamp(min=0).to(inverse.dtype)
        out = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
        return out, mean, inverse

    def _own_statistics(self, func: Any, args: Any, kwargs: Any) -> Any:
        args = list(args)
        for place in (3, 4):
            if place < len(args) and isinstance(args[place], Tensor):
                args[place] = args[place].clone()
        return func(*args, **kwargs)

    def finish(self) -> Plan:
        """The plan, once the pass is over."""
        if self._next != len(self.memory):
            raise Diverged(f"the second pass ran {self._next} of {len(self.memory)} operators")
        self._awaited.check_over()
        self._sources.clear()
        if self.calibrating:
            self.plan.chains = self._uses.chains()
        return self.plan


@contextmanager
def _restored_generators(device: torch.device, generator: torch.Generator | None) -> Iterator[None]:
    own = None if generator is None else generator.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
    if generator is not None and own is not None:
        generator.set_state(own)


def _written(func: Any, out: Any) -> int:
    """Bytes of an operator's results, but for those that are views."""
    parts = out if isinstance(out, (tuple, list)) else [out]
    if func.is_view:
        return 0
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def _copy_of_draw(func: Any, out: Tensor) -> Tensor:
    """What was drawn in place, before the code that asked for it goes on to change it; coin tosses in a byte each."""
    return out.to(torch.bool) if func._schema.name == "aten::bernoulli_" else out.clone()


def _shapes(outs: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(out.shape) if isinstance(out, Tensor) else None for out in outs)
