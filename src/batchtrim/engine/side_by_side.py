"""Run an engine and a plain step side by side on two copies of a model, for `check_engine`."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim.engine.batch_norm import has_batch_norm
from batchtrim.engine.compilation import uncompiled_calls
from batchtrim.engine.contents import in_double, relative_difference
from batchtrim.engine.copies import fresh, held_by_both, not_copied
from batchtrim.engine.generators import GeneratorStates
from batchtrim.engine.gradients import cosine_between
from batchtrim.engine.left import differences, overlaps
from batchtrim.engine.model_facts import device_of
from batchtrim.engine.rows import copied, entries, tensors_of
from batchtrim.engine.side import Side
from batchtrim.errors import EngineFallback, EngineRefused
from batchtrim.reduction import reduce_rows
from batchtrim.selection import Selection

__all__ = ["TOLERANCE", "SideBySide", "draws_of_torch", "generators_kept", "max_or_nan"]

# How far a gradient may be off, relative to its norm: float32 sums in another order differ by this much.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# A parameter's gradient below this share of the whole is judged against the share: the key bias of an attention has a
# gradient of zero, up to rounding.
_SMALL = 1e-2
_ACCUMULATED = 3  # the gradient of every third step is added to that of the step before


@contextmanager
def generators_kept(model: nn.Module) -> Iterator[None]:
    """Restore the generators of random numbers, as they were before the block."""
    before = GeneratorStates(device_of(model))
    try:
        yield
    finally:
        before.restore()


@contextmanager
def draws_of_torch() -> Iterator[None]:
    """Have what Inductor compiles draw from torch's generators, operator by operator, as other code does.

    Its own generator gives the same dropout masks to the same graph only.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    from torch._inductor import config

    with config.patch(fallback_random=True):
        yield


def _seed(number: int) -> None:
    torch.manual_seed(1000 + number)
    random.seed(1000 + number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(1000 + number)


class SideBySide:
    """An engine and a plain step, side by side. A context: at its end, what both hold has the gradients it had before.

    Raises:
        ValueError: a function holds something that gets a gradient, such as the model itself, and so both sides do.
    """

    def __init__(self, model: nn.Module, loss: Any, engine: str, batch_dim: int, tolerance: float | None) -> None:
        self.given, self.given_tolerance = (model, loss), tolerance
        self.names: list[str] = []
        self.found: dict[str, Any] = {"batch_norm": has_batch_norm(list(model.modules()))}
        self.plain = Side.copied(model, loss, "exact", batch_dim)
        self.own = Side.copied(model, loss, engine, batch_dim)
        self.plain.passed, self.own.passed = list(self.own.model.modules()), list(self.plain.model.modules())
        self.name = engine
        sides = [(side.step.forward.inner, side.step.forward.per_sample_loss) for side in (self.own, self.plain)]
        self.shared = [(name, tensor, tensor.grad) for name, tensor in held_by_both(*sides)]

    def __enter__(self) -> SideBySide:
        for _, tensor, _ in self.shared:
            tensor.grad = None
        return self

    def __exit__(self, *_: object) -> None:
        for _name, tensor, gradient in self.shared:
            tensor.grad = gradient

    def made_of(self, batch: tuple[Any, Any]) -> list[tuple[Any, Any]]:
        """Return further batches made from one: its rows in another order, and three quarters of them."""
        forward = Side.copied(*self.given, "exact", self.own.step.forward.batch_dim).step.forward
        try:
            with torch.no_grad(), generators_kept(forward.inner), uncompiled_calls(forward):
                size = len(forward(*copied(batch))[0].values)
            orders = [torch.arange(size).flip(0), torch.arange(size)[: max(2, (3 * size) // 4)]]
            return [forward.rows(*batch, rows, size) for rows in orders]
        except Exception:  # a fault shows in the first step
            return []

    def step(self, number: int, batch: tuple[Any, Any], keep: float, lr: float) -> bool:
        """Run one step on both sides and compare. Return False if the engine refuses to continue."""
        if self.own.refused is not None:
            self.found["refused"] = str(self.own.refused)
            return False
        ours, theirs = fresh(batch), fresh(batch)
        before = self.own.state(), fresh(batch), self.own.parameters()
        if number % _ACCUMULATED != _ACCUMULATED - 1:  # in the others, gradients add up
            self.own.zero_grad()
            self.plain.zero_grad()
        value, error = self._run_engine(number, ours, keep)
        for description, tensor, _ in self.shared:
            if tensor.grad is not None:
                raise not_copied(description)
        after = GeneratorStates(device_of(self.own.model))
        selection = None if error is not None else self.own.step.last.selection  # type: ignore[union-attr]
        started = self._run_plain(number, theirs, keep, selection)
        same = self._compare_state(after, ours, theirs)
        if isinstance(error, EngineRefused):
            self.found["refused"] = str(error)
            self._judge_refusal(before, started, after, ours, same)
            return False
        if error is not None:
            self.found["failed"] = f"{type(error).__name__}: {error}"
            return False
        self._note(**same)
        self._compare(value, ours, theirs)  # type: ignore[arg-type]
        self.found["steps"] = number + 1
        self._update(lr)
        return True

    def _run_engine(self, number: int, batch: Any, keep: float) -> tuple[Tensor | None, Exception | None]:
        side = self.own
        side.keep(keep)
        _seed(number)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EngineFallback)
                value = side.step(*batch)
                value.backward()
        except Exception as error:
            return None, error
        finally:
            side.named = None
        last: Any = side.step.last
        self.names += [] if last.engine in self.names else [last.engine]
        self.found["approximate"] = self.found.get("approximate") or last.approximate
        return value.detach(), None

    def _run_plain(self, number: int, batch: Any, keep: float, selection: Selection | None) -> GeneratorStates:
        """Run one forward with a graph and reduce the kept losses: of the engine's rows, if their losses are as large.

        Returns:
            The generators as they were before.
        """
        side = self.plain
        side.keep(keep)
        _seed(number)
        started = GeneratorStates(device_of(side.model))
        losses, outputs = side.step.forward(*batch)
        side.named = None
        scores = side.step.forward.scores(losses.detach(), outputs, batch[1])
        right = side.step.trim.select(losses.detach(), rank_by=scores).rising()
        if selection is not None and not torch.equal(selection.indices, right.indices):
            values = losses.values.detach()
            kept, expected = (values[each.indices].sort().values for each in (selection, right))
            near = kept.shape == expected.shape and torch.allclose(kept, expected, rtol=1e-6, atol=1e-7)
            self._note(same_samples=near)
            right = selection if near else right
        self.loss = reduce_rows(losses, right.indices, right, side.step.trim.scale)
        self.loss.backward()
        return started

    def _compare_state(self, after: GeneratorStates, ours: Any, theirs: Any) -> dict[str, Any]:
        own, plain = self.own.state(), self.plain.state()
        moved = _difference(self.plain.parameters(), self.own.parameters())
        return {
            "buffer_error": max_or_nan(plain.difference(own), moved),
            "attributes": tuple(sorted(plain.other_attributes(own))),
            "same_generators": after.same(GeneratorStates(after.device)),
            "same_batch": _same_batch(ours, theirs),
        }

    def _judge_refusal(
        self, before: Any, started: GeneratorStates, after: GeneratorStates, ours: Any, same: Any
    ) -> None:
        """Accept the state after a plain step or the state before it."""
        state, batch, parameters = before
        own = self.own.state()
        moved = max_or_nan(state.difference(own), _difference(parameters, self.own.parameters()))
        self._note(
            buffer_error=min(same["buffer_error"], moved),
            attributes=() if not state.other_attributes(own) else same["attributes"],
            same_generators=same["same_generators"] or started.same(after),
            same_batch=same["same_batch"] or _same_batch(ours, batch),
        )

    def _compare(self, value: Tensor, ours: Any, theirs: Any) -> None:
        plain = self.plain.gradients() | _input_gradients(theirs)
        own = self.own.gradients() | _input_gradients(ours)
        whole = [torch.cat([each.flatten() for each in side.values()] or [torch.zeros(0)]) for side in (plain, own)]
        total = float(whole[0].norm())
        worst, name = 0.0, ""
        for each, exact in plain.items():
            off, size = float((exact - own[each]).norm()), max(float(exact.norm()), _SMALL * total)
            error = off / size if size else off
            if not error <= worst and not torch.equal(exact.isnan(), torch.ones_like(exact, dtype=torch.bool)):
                worst, name = error, each
        if not worst <= self.found.get("parameter_error", 0.0):
            self.found["parameter"] = name
        self._note(
            loss_error=relative_difference(self.loss.detach(), value),
            gradient_error=relative_difference(*whole),
            parameter_error=worst,
            attributes=self._unlike_gradients(ours, theirs),
        )
        cosine = cosine_between(*whole) if total or float(whole[1].norm()) else 1.0
        lowest = self.found.get("gradient_cosine", 1.0)
        self.found["gradient_cosine"] = cosine if not cosine >= lowest else lowest

    def _unlike_gradients(self, ours: Any, theirs: Any) -> tuple[str, ...]:
        """Return how gradients differ as objects from those of a plain step: what follows the step changes them.

        Weight decay moves a parameter with a gradient of zeros and none without a gradient; clipping changes two
        gradients in one memory twice.
        """
        found = []
        sides = [_given(self.own, ours), _given(self.plain, theirs)]
        (own, own_others), (plain, plain_others) = sides
        found += sorted(own.keys() - plain.keys())
        if self.own.step.last.engine != "two_pass":  # type: ignore[union-attr]  # it never sees what dropped samples use
            found += [f"{name} (missing)" for name in sorted(plain.keys() - own.keys())]
        found += sorted(differences(own, plain))
        shared = overlaps(own, own_others) - overlaps(plain, plain_others)
        return (*found, *(f"{one} in the memory of {other}" for one, other in sorted(shared)))

    def _note(self, **errors: Any) -> None:
        """Keep the worst value over the steps; NaN is the worst."""
        for name, value in errors.items():
            if isinstance(value, bool):
                self.found[name] = self.found.get(name, True) and value
            elif isinstance(value, tuple):
                self.found[name] = tuple(dict.fromkeys((*self.found.get(name, ()), *value)))
            else:
                self.found[name] = max_or_nan(self.found.get(name, 0.0), value)

    def _update(self, lr: float) -> None:
        """Update both copies along the plain gradient, with norm at most 1."""
        gradients = self.plain.gradients()
        norm = sum(float(g.norm()) ** 2 for g in gradients.values()) ** 0.5
        with torch.no_grad():
            for side in (self.plain, self.own):
                for name, parameter in side.named_parameters().items():
                    if parameter.requires_grad and norm == norm and name in gradients:
                        parameter.sub_(gradients[name].to(parameter.dtype), alpha=lr / max(1.0, norm))

    def results(self) -> dict[str, Any]:
        """Return the fields of an :class:`batchtrim.testing.EngineReport`."""
        tolerance = self.given_tolerance or self._tolerance()
        return {"engine": ", ".join(sorted(self.names)) or self.name, "tolerance": tolerance, **self.found}

    def _tolerance(self) -> float:
        parameters = list(self.plain.model.parameters())
        seen = [p.dtype for p in parameters if p.dtype in TOLERANCE] or [torch.float32]
        device = device_of(self.plain.model).type
        if torch.is_autocast_enabled(device):
            seen.append(torch.get_autocast_dtype(device))
        return max(TOLERANCE[dtype] for dtype in seen)


def _given(side: Side, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients that a side has, by name, and what they must not share memory with."""
    held = {f"{name}.grad": p.grad for name, p in side.named_parameters().items() if p.grad is not None}
    given = tensors_of(batch)
    held |= {f"input {n}.grad": each.grad for n, each in enumerate(given) if each.is_leaf and each.grad is not None}
    others = {name: p for name, p in side.named_parameters().items() if not nn.parameter.is_lazy(p)}
    others |= dict(side.model.named_buffers()) | {f"input {n}": each for n, each in enumerate(given)}
    if side.step.last is not None:
        others["the losses"] = side.step.last.losses
    return held, others


def _input_gradients(batch: Any) -> dict[str, Tensor]:
    """Return the gradient of each tensor of a batch that requires one."""
    asking = [tensor for tensor in tensors_of(batch) if tensor.requires_grad]
    return {
        f"input {number}": in_double(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
        for number, tensor in enumerate(asking)
    }


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max_or_nan(0.0, *(relative_difference(ours[name], theirs[name]) for name in ours if name in theirs))


def _same_batch(ours: Any, theirs: Any) -> bool:
    """Return True if two batches hold the same, in the same places; what is no tensor, number or text is left out."""
    own, plain = entries(ours), entries(theirs)
    return own.keys() == plain.keys() and all(_same_entry(own[place], plain[place]) for place in own)


def _same_entry(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        strided = a.layout == b.layout == torch.strided
        return a.shape == b.shape and (not strided or torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True))
    return type(a) is type(b) and (not isinstance(a, (bool, int, float, str)) or a == b or a != a)


def max_or_nan(*values: float) -> float:
    """Return the largest value, NaN if one is NaN: Python's ``max`` skips a NaN that is not the first."""
    return float(torch.tensor(values, dtype=torch.float64).amax())
