"""Run a step by the model's own Python, to compare a new trace with it.

The proof is about the traced graph; that the graph is the model is the tracer's promise, which it does not always keep:
a model may ask whether it is compiled, and then do something else.
"""

from __future__ import annotations

import math
import random
from collections import deque
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim._checks import in_one_line
from batchtrim.engine.capture import CannotCapture
from batchtrim.engine.compilation import run_uncompiled, uncompiled_calls
from batchtrim.engine.contents import in_double, relative_difference, same_contents
from batchtrim.engine.forward import Forward
from batchtrim.engine.generators import GeneratorStates
from batchtrim.engine.gradients import distance, gradients_without_hooks
from batchtrim.engine.model_facts import parameters_of
from batchtrim.engine.precision import coarsest_dtype, uses_tf32
from batchtrim.engine.rows import copied, entries, map_tensors, tensors_of
from batchtrim.engine.state import ModelState, Snapshot, caches_left
from batchtrim.engine.writes import ParameterWrites
from batchtrim.losses import Losses

__all__ = ["EagerStep", "is_large"]

_GRADIENT_APART, _COARSE_APART = 1e-2, 0.2  # of a parameter's gradient, or of a hundredth of the whole
_MANY = 2000  # entries of a container: torch's tracer needs time with the square of them, and seconds in each step here
# Rounding elsewhere may move a gradient by this multiple of what rounding of the weights does, but not by as much as it
# would move if it were lost.
_ROUNDING, _LOST = 1.5, 0.95


class EagerStep:
    """A step as the model's own Python runs it. It leaves everything unchanged.

    Attributes:
        counts: True if the forward changes a Python value, such as a count of its calls. A trace may have taken the
            value of its first run for a constant: not all versions of torch watch every place that holds one.

    Args:
        gradients: compute the losses' gradient too.
    """

    def __init__(self, forward: Forward, x: Any, y: Any, *, gradients: bool = False) -> None:
        self.forward = forward
        self.before = Snapshot(forward, x, y)
        if self.before.lasting is not None:
            raise CannotCapture(self.before.lasting)
        self.writes = ParameterWrites(forward.inner, others=self.before.model.watched)
        self.gradients: list[Tensor | None] | None = None
        self._moved: list[float] | None = None
        with caches_left():
            losses, outputs = run_uncompiled(forward, lambda: self._run(x, y), self.restore)
            self.losses = losses.values.detach()
            self.generators = GeneratorStates(self.before.generators.device)
            self.outputs = _described(outputs)
            del outputs
            self.sets_up = self.before.model.set_up()
            draws = any(
                isinstance(value, random.Random) and value.getstate() != was
                for value, was in self.before.model.contents
            )
            self.state = ModelState(*self.before.model.roots)
            was, now = self.before.model, self.state
            self.counts = (was.unlike(now, math.inf) or now.unlike(was, math.inf)) is not None
            self.written = {name: self.writes.parameters[name][0].detach().clone() for name in self.writes.written()}
            if gradients:
                self.parameters = self._parameters()
                # its own gradient may not be asked for like this
                with suppress(Exception), uncompiled_calls(forward):
                    self.gradients = self._gradients_of(losses.values, keep=_has_histories((x, y)))
        self.restore()
        if draws:
            raise CannotCapture("it draws Python's random numbers, which a trace repeats")

    def _run(self, x: Any, y: Any) -> tuple[Losses, Any]:
        """Run the forward; an error leaves the state as in a plain step."""
        with self.writes:
            return self.forward(*_without_histories((x, y)), model=self.forward.inner)

    def restore(self) -> None:
        """Put everything back that the model changes."""
        self.before.restore(batch=True)
        self.writes.restore()

    def large_change(self) -> str | None:
        """Return a container of many entries that the forward changed, or None."""
        now = {id(value): copy for value, copy in self.state.contents}
        for value, was in self.before.model.contents:
            if is_large(value) and not same_contents(was, now.get(id(value), was), math.inf):
                return f"{type(value).__name__} of {len(was)} entries"
        return None

    def difference(self, losses: Tensor, outputs: Any, coarse: bool) -> str | None:
        """Return how a trace differs from the model, or None. Call it right after the trace ran.

        Args:
            losses: with their graph, which is kept.
            coarse: a part of the model computes with fewer digits than float32 has: compiled, it rounds elsewhere.
        """
        generators = GeneratorStates(self.generators.device)
        if not self.generators.of_torch.same(generators.of_torch):
            return "it draws random numbers in another order"
        if not self.generators.same(generators):
            return "it draws other random numbers of Python or NumPy"
        coarse = coarse or losses.dtype in (torch.float16, torch.bfloat16) or uses_tf32(losses.device)
        apart = 1e-2 if coarse else 1e-4
        scale = self.losses.nan_to_num(posinf=0.0, neginf=0.0).abs().mean()
        found = losses.detach()
        near = (found - self.losses).abs() <= apart * (self.losses.abs() + scale)
        if not (near | (found == self.losses) | (found.isnan() & self.losses.isnan())).all():
            return f"losses differ by {float((found - self.losses).abs().max()):.2g}"
        if self.outputs != _described(outputs):
            return "it returns something else"
        state = ModelState(*self.before.model.roots)
        other = self._other_state(state, apart) or self._other_gradient(losses, coarse)
        generators.restore()  # a backward may draw, and an operator of the user's own in it may count
        state.restore()
        return other

    def _other_state(self, state: ModelState, apart: float) -> str | None:
        if (name := self.state.unlike(state, apart)) is not None:
            return f"it leaves another {name}"
        for name, value in self.written.items():
            if not relative_difference(value, self.writes.parameters[name][0].detach()) <= apart:
                return f"it writes something else into {name}"
        return None

    def _other_gradient(self, losses: Tensor, coarse: bool) -> str | None:
        if self.gradients is None:
            return None
        if self._parameters() != self.parameters:
            return "it has other parameters with a gradient"
        try:
            found = self._gradients_of(losses, keep=True)
        except torch.OutOfMemoryError:
            return None
        except Exception as error:
            return f"its backward fails ({in_one_line(error)})"
        pairs = list(zip(self.parameters.values(), self.gradients, found, strict=True))
        total = sum(float(in_double(own).norm()) ** 2 for _, own, _ in pairs if own is not None) ** 0.5
        apart = _COARSE_APART if coarse else _GRADIENT_APART
        for at, (name, own, theirs) in enumerate(pairs):
            if own is None or theirs is None:  # zero by way of a tensor that the model keeps
                if own is not theirs and (theirs is None or theirs.any()):
                    return f"{name} has {'a' if own is None else 'no'} gradient"
                continue
            off = distance(own, theirs, total)
            if off > apart and not (coarse and off <= self._rounding()[at]):  # not if one is NaN
                return f"the gradient of {name} differs by {off:.2g}"
        return None

    def _rounding(self) -> list[float]:
        """Return how far rounding may move each parameter's gradient, relative to its norm.

        It is measured by moving every weight by a quarter of the precision's epsilon, at random. In bfloat16, half of a
        ResNet-50's gradients move by 0.5 or more before it is trained.
        """
        if self._moved is None:
            self._moved = [0.0] * len(self.parameters)
            if not self.written:
                with suppress(Exception):
                    self._moved = self._gradients_moved()
        return self._moved

    def _gradients_moved(self) -> list[float]:
        assert self.gradients is not None
        after, tensors = Snapshot(self.forward), [each for _, each in self._named()]
        values = [each.detach().clone() for each in tensors]
        generator = torch.Generator(self.generators.device).manual_seed(0)
        # float16 where nothing coarser is visible: a module may use it inside its forward
        dtypes = coarsest_dtype(self.forward.inner, self.losses), torch.float16
        quarter = max(torch.finfo(each).eps for each in dtypes) / 4
        try:
            self.before.restore()
            for each in tensors:  # .data: autograd, which may have saved a weight, gets its value back in the end
                noise = torch.empty_like(each, dtype=torch.float32).normal_(generator=generator)
                each.data.mul_(1 + quarter * noise)
            with uncompiled_calls(self.forward), caches_left():
                losses, _ = self.forward(*copied((self.before.x, self.before.y)), model=self.forward.inner)
                found = self._gradients_of(losses.values)
        finally:
            for each, value in zip(tensors, values, strict=True):
                each.data.copy_(value)
            after.restore()
        moved = []
        for own, theirs in zip(self.gradients, found, strict=True):
            far = 0.0 if own is None or theirs is None else relative_difference(own, theirs)
            moved.append(min(_ROUNDING * far, _LOST) if math.isfinite(far) else 0.0)
        return moved

    def _parameters(self) -> dict[int, str]:
        """Return the names of the parameters that need a gradient, the loss's too."""
        return {id(each): name for name, each in self._named()}

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        beside = ((type(module).__name__, module) for module in self.before.model.modules)
        named = parameters_of(self.forward.inner, beside)
        return [(name, each) for name, each in named if type(each) is nn.Parameter and each.requires_grad]

    def _gradients_of(self, losses: Tensor, keep: bool = False) -> list[Tensor | None]:
        """Return the gradient of each parameter."""
        parameters = [each for _, each in self._named()]
        if not parameters or not losses.requires_grad or losses.numel() == 0:
            return [None] * len(parameters)
        weights = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype, device=losses.device) / losses.numel()
        return gradients_without_hooks(losses, parameters, weights, keep=keep)


def is_large(value: Any) -> bool:
    """Return True for a container of so many entries that a trace would take long to rebuild it."""
    return isinstance(value, (dict, list, set, deque)) and len(value) > _MANY


def _has_histories(batch: Any) -> bool:
    """True if a batch has a graph of its own, which a backward to the parameters may pass through (MAML)."""
    return any(each.requires_grad and not each.is_leaf for each in tensors_of(batch))


def _without_histories(batch: Any) -> Any:
    """Return a batch in which tensors made by other networks are copies, since a write would change their graph."""
    if not _has_histories(batch):
        return batch
    return map_tensors(lambda each: each.clone() if each.requires_grad and not each.is_leaf else each, batch)


def _described(outputs: Any) -> dict[str, Any]:
    """Return the places of outputs, and of each tensor its type and shape."""
    return {
        place: (leaf.dtype, tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf)
        for place, leaf in entries(outputs).items()
    }
