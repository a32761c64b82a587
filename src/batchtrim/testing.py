"""Checks to run on your own model: does an engine compute what a plain step does?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim._checks import check_count, check_keep, check_positive, describe
from batchtrim.engine import TrimmedForward
from batchtrim.engine.batch_norm import has_batch_norm
from batchtrim.engine.rows import copied, tensors_of
from batchtrim.engine.state import GeneratorStates, ModelState, device_of, modules_of, relative_difference
from batchtrim.errors import EngineFallback, EngineRefused
from batchtrim.reduction import reduce_kept
from batchtrim.selection import Selection
from batchtrim.trimmer import Trimmer

__all__ = ["EngineReport", "check_engine"]

KEEP = (0.5, 0.2, 0.75)
STEPS = 6
# How far a gradient may be off, relative to its norm: in float32 sums come in another order, and no more.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# A parameter's gradient below this share of the whole is judged against the share: the key bias of an attention has a
# gradient of zero, up to rounding.
_SMALL = 1e-2
_COSINE = 0.9


@dataclass(frozen=True)
class EngineReport:
    """What :func:`check_engine` found, engine against a plain step, worst over the steps.

    Attributes:
        engine: the engine that ran, or the engines, where they changed: ``"exact, shared"``.
        refused: why the engine would not run the model, or None.
        approximate: why the gradient is not exact, where the engine itself says so, or None.
        failed: what an engine raised where a plain step trains, or None.
        same_samples: True if the right samples were kept in every step; of equal losses either one is right.
        loss_error: ``|L - L_plain| / |L_plain|``.
        gradient_error: ``||g - g_plain|| / ||g_plain||`` over all parameters together.
        parameter_error: the same of the parameter that is worst; one with a gradient below a hundredth of the whole is
            judged against that hundredth.
        parameter: the name of that parameter.
        gradient_cosine: cosine between the two gradients.
        buffer_error: largest difference of a buffer, relative to its norm.
        attributes: plain attributes of modules (counters, flags) that ended otherwise than after a plain step.
        same_generators: True if the generators of torch, Python and NumPy ended in the same state.
        same_batch: True if the batch was left as a plain step leaves it.
        steps: how many steps were compared.
        batch_norm: True if the model has a BatchNorm in training mode, for which no cheap gradient is exact.
        tolerance: what an error may be; see :func:`check_engine`.
    """

    engine: str
    refused: str | None = None
    approximate: str | None = None
    failed: str | None = None
    same_samples: bool = True
    loss_error: float = 0.0
    gradient_error: float = 0.0
    parameter_error: float = 0.0
    parameter: str = ""
    gradient_cosine: float = 1.0
    buffer_error: float = 0.0
    attributes: tuple[str, ...] = ()
    same_generators: bool = True
    same_batch: bool = True
    steps: int = 0
    batch_norm: bool = False
    tolerance: float = _TOLERANCE[torch.float32]

    @property
    def exact(self) -> bool:
        """True if losses and gradients are those of a plain step, up to :attr:`tolerance`."""
        return max_or_nan(self.gradient_error, self.parameter_error, self.loss_error) <= self.tolerance

    @property
    def same_state(self) -> bool:
        """True if samples, buffers, attributes, generators and the batch are those of a plain step."""
        others = self.same_samples and self.same_generators and self.same_batch and not self.attributes
        return others and self.buffer_error <= max(self.tolerance, 1e-4 if self.batch_norm else 0.0)

    @property
    def ok(self) -> bool:
        """True if the engine can be trusted with this model: exact, or, with BatchNorm, a cosine of at least 0.9."""
        near = self.exact or (self.batch_norm and self.gradient_cosine >= _COSINE)
        return near and self.same_state and self.refused is None and self.failed is None

    @property
    def verdict(self) -> str:
        """Return "right", "approximate" (and said so), "refused" or "wrong".

        Refused is an engine only where every step before was right and nothing was left changed; else it was wrong.
        """
        said = self.approximate is not None or (self.batch_norm and self.gradient_cosine >= _COSINE)
        if self.failed is not None or not self.same_state or not (self.exact or said):
            return "wrong"
        if self.refused is not None:
            return "refused"
        return "right" if self.exact else "approximate"

    def __str__(self) -> str:
        if self.verdict == "refused":
            after = f", after {self.steps} right steps" if self.steps else ""
            return f"engine {self.engine!r} refuses this model{after}: {self.refused}"
        if self.failed is not None:
            return f"engine {self.engine!r} fails where a plain step trains: {self.failed}"
        note = " (BatchNorm couples samples: no cheap gradient is exact)" if self.batch_norm else ""
        gradient = f"relative error {self.gradient_error:.1e}, cosine {self.gradient_cosine:.4f}"
        worst = f"{self.parameter}, relative error {self.parameter_error:.1e}"
        same = {True: "the same", False: "different"}
        lines = [
            f"engine {self.engine!r} against 'exact', {self.steps} steps: {'ok' if self.ok else 'NOT THE SAME'}",
            f"  samples chosen     {same[self.same_samples]}",
            f"  loss               relative error {self.loss_error:.1e}",
            f"  gradient           {gradient}{note}",
            f"  worst parameter    {worst}" if self.parameter else "",
            f"  approximate        {self.approximate}" if self.approximate is not None else "",
            f"  buffers            relative error {self.buffer_error:.1e}",
            f"  attributes         different: {', '.join(self.attributes)}" if self.attributes else "",
            f"  random generators  {same[self.same_generators]}",
            f"  batch left         {same[self.same_batch]}",
            f"  then refused       {self.refused}" if self.refused is not None else "",
        ]
        return "\n".join(line for line in lines if line)


def check_engine(
    model: nn.Module,
    batch: tuple[Any, Any],
    per_sample_loss: Any,
    *,
    engine: str = "shared",
    keep: float | Sequence[float] = KEEP,
    steps: int = STEPS,
    batch_dim: int = 0,
    more: Iterable[tuple[Any, Any]] = (),
    tolerance: float | None = None,
    lr: float = 0.05,
    verbose: bool = True,
) -> EngineReport:
    """Run an engine and a plain step on copies of a model, side by side, and compare.

    A plain step is one forward with a graph and the mean of the kept losses. Both copies start from the same state and
    the same random numbers in every step, and both are updated by the plain gradient, so that errors do not add up.
    The batches, their sizes and the fractions kept change from step to step.

    Args:
        model: left as it is; two copies are made.
        batch: ``(x, y)`` as they would be given to :class:`batchtrim.TrimmedForward`.
        per_sample_loss: as there.
        engine: which one to check.
        keep: the fraction kept, or several, taken in turn.
        steps: how many; an engine may prepare in the first ones.
        batch_dim: as in :class:`batchtrim.TrimmedForward`.
        more: further batches, taken in turn. By default two are made of the given one where it can be cut to rows:
            its rows in another order, and three quarters of them.
        tolerance: what a relative error may be. By default 1e-5 in float32, and what the least precise dtype of the
            parameters or of autocast allows; give 0.1 for a model that casts to bfloat16 inside.
        lr: step size of the update between steps, along a gradient of norm 1 at most.
        verbose: print the report too.

    Returns:
        An :class:`EngineReport`; ``assert report.ok`` in a test of your own.

    Raises:
        TypeError, ValueError: an argument is none of the above. Whatever the model raises in a plain step.

    Notes:
        Generators of torch, Python and NumPy are left as they were found. Cost: about two plain steps a step.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        >>> batch = torch.randn(16, 4), torch.randint(0, 3, (16,))
        >>> check_engine(model, batch, nn.CrossEntropyLoss(), verbose=False).ok
        True
    """
    batches = [_checked("batch", batch), *(_checked("more", each) for each in more)]
    keeps = [check_keep("keep", each) for each in (keep if isinstance(keep, (tuple, list)) else [keep])]
    check_count("steps", steps)
    check_positive("lr", lr)
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    trial = _Trial(model, per_sample_loss, engine, batch_dim, tolerance)
    if len(batches) == 1:
        batches += trial.made_of(batches[0])
    with _generators_kept(model):
        for number in range(steps):
            turn = number + number // len(batches)  # so that each batch meets each fraction
            if not trial.step(number, batches[number % len(batches)], keeps[turn % len(keeps)], lr):
                break
    report = trial.report()
    if verbose:
        print(report)
    return report


def _checked(name: str, batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"expected `{name}` to be (x, y), got {describe(batch)}. The order is check_engine(model, batch, loss)."
        )
    return batch[0], batch[1]


@contextmanager
def _generators_kept(model: nn.Module) -> Iterator[None]:
    before = GeneratorStates(device_of(model))
    try:
        yield
    finally:
        before.restore()


def _seed(number: int) -> None:
    torch.manual_seed(1000 + number)
    GeneratorStates.seed_outside_torch(1000 + number)


class _Keep:
    """A schedule that is told from outside what to keep."""

    needs_total = False

    def __init__(self) -> None:
        self.now = 1.0

    def __call__(self, progress: float) -> float:
        return self.now


@dataclass
class _Side:
    """One of the two copies, with a loss and a trimmer of its own."""

    step: TrimmedForward
    schedule: _Keep
    refused: EngineRefused | None = None
    modules: list[nn.Module] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        return self.step.forward.inner

    def keep(self, fraction: float) -> None:
        self.schedule.now = fraction
        self.step.trim.step()

    def state(self) -> ModelState:
        return ModelState(self.modules)

    def gradients(self) -> dict[str, Tensor]:
        """Return each parameter's gradient, zeros where it has none."""
        return {
            name: (torch.zeros_like(p) if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad)
            .detach()
            .double()
            for name, p in self.model.named_parameters()
        }


class _Trial:
    """An engine and a plain step, side by side."""

    def __init__(self, model: nn.Module, loss: Any, engine: str, batch_dim: int, tolerance: float | None) -> None:
        self.given_tolerance = tolerance
        self.names: list[str] = []
        self.found: dict[str, Any] = {"batch_norm": has_batch_norm(list(model.modules()))}
        self.plain = self._side(model, loss, "exact", batch_dim)
        self.own = self._side(model, loss, engine, batch_dim)
        self.name = engine

    def _side(self, model: nn.Module, loss: Any, engine: str, batch_dim: int) -> _Side:
        own, own_loss = copy.deepcopy((model, loss))  # together: a loss may hold a part of the model
        schedule = _Keep()
        refused = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EngineFallback)
            try:
                step = TrimmedForward(own, own_loss, Trimmer(schedule), engine, batch_dim=batch_dim)
            except EngineRefused as error:
                refused, step = error, TrimmedForward(own, own_loss, Trimmer(schedule), "exact", batch_dim=batch_dim)
        return _Side(step, schedule, refused, modules_of(step.forward.inner, step.forward.per_sample_loss))

    def made_of(self, batch: tuple[Any, Any]) -> list[tuple[Any, Any]]:
        """Return further batches made of one: its rows in another order, and three quarters of them."""
        forward = self.plain.step.forward
        copies = copied(batch)
        state, generators = self.plain.state(), GeneratorStates(device_of(self.plain.model))
        try:
            with torch.no_grad():
                size = len(forward(*copies)[0].values)
            orders = [torch.arange(size).flip(0), torch.arange(size)[: max(2, (3 * size) // 4)]]
            return [forward.rows(*batch, rows, size) for rows in orders]
        except Exception:  # what is at fault shows in the first step
            return []
        finally:
            state.restore()
            generators.restore()

    def step(self, number: int, batch: tuple[Any, Any], keep: float, lr: float) -> bool:
        """Run one step on both sides and compare. False where the engine will not go on."""
        if self.own.refused is not None:
            self.found["refused"] = str(self.own.refused)
            return False
        ours, theirs = copied(batch), copied(batch)
        before = self.own.state(), copied(batch)
        value, error = self._run_engine(number, ours, keep)
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
        self._compare(value)  # type: ignore[arg-type]
        self.found["steps"] = number + 1
        self._update(lr)
        return True

    def _run_engine(self, number: int, batch: Any, keep: float) -> tuple[Tensor | None, Exception | None]:
        side = self.own
        side.keep(keep)
        side.model.zero_grad(set_to_none=True)
        _seed(number)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EngineFallback)
                value = side.step(*batch)
                value.backward()
        except Exception as error:
            return None, error
        last: Any = side.step.last
        self.names += [] if last.engine in self.names else [last.engine]
        self.found["approximate"] = self.found.get("approximate") or last.approximate
        return value.detach(), None

    def _run_plain(self, number: int, batch: Any, keep: float, selection: Selection | None) -> GeneratorStates:
        """One forward with a graph and the kept losses; those the engine kept, where they are as large.

        Returns:
            The generators as they were before.
        """
        side = self.plain
        side.keep(keep)
        side.model.zero_grad(set_to_none=True)
        _seed(number)
        started = GeneratorStates(device_of(side.model))
        losses, outputs = side.step.forward(*batch)
        right = side.step.trim.select(losses.detach(), rank_by=side.step.forward.scores(outputs, batch[1])).rising()
        if selection is not None and not torch.equal(selection.indices, right.indices):
            values = losses.values.detach()
            kept, expected = (values[each.indices].sort().values for each in (selection, right))
            near = kept.shape == expected.shape and torch.allclose(kept, expected, rtol=1e-6, atol=1e-7)
            self._note(same_samples=near)
            right = selection if near else right
        weights = None if losses.weights is None else losses.weights[right.indices]
        self.loss = reduce_kept(losses.values[right.indices], right, side.step.trim.scale, weights)
        self.loss.backward()
        return started

    def _compare_state(self, after: GeneratorStates, ours: Any, theirs: Any) -> dict[str, Any]:
        own, plain = self.own.state(), self.plain.state()
        return {
            "buffer_error": plain.difference(own),
            "attributes": tuple(sorted(plain.other_attributes(own))),
            "same_generators": after.same(GeneratorStates(after.device)),
            "same_batch": _same_batch(ours, theirs),
        }

    def _judge_refusal(
        self, before: Any, started: GeneratorStates, after: GeneratorStates, ours: Any, same: Any
    ) -> None:
        """Accept what a plain step leaves, and what there was before it."""
        state, batch = before
        own = self.own.state()
        self._note(
            buffer_error=min(same["buffer_error"], state.difference(own)),
            attributes=() if not state.other_attributes(own) else same["attributes"],
            same_generators=same["same_generators"] or started.same(after),
            same_batch=same["same_batch"] or _same_batch(ours, batch),
        )

    def _compare(self, value: Tensor) -> None:
        plain, own = self.plain.gradients(), self.own.gradients()
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
        )
        cosine = float(torch.nn.functional.cosine_similarity(*whole, dim=0)) if total or float(whole[1].norm()) else 1.0
        lowest = self.found.get("gradient_cosine", 1.0)
        self.found["gradient_cosine"] = cosine if not cosine >= lowest else lowest

    def _note(self, **errors: Any) -> None:
        """Keep the worst over the steps; NaN is worse than any."""
        for name, value in errors.items():
            if isinstance(value, bool):
                self.found[name] = self.found.get(name, True) and value
            elif isinstance(value, tuple):
                self.found[name] = tuple(dict.fromkeys((*self.found.get(name, ()), *value)))
            else:
                self.found[name] = max_or_nan(self.found.get(name, 0.0), value)

    def _update(self, lr: float) -> None:
        """Move both copies along the plain gradient, of norm 1 at most."""
        gradients = self.plain.gradients()
        norm = sum(float(g.norm()) ** 2 for g in gradients.values()) ** 0.5
        with torch.no_grad():
            for side in (self.plain, self.own):
                for name, parameter in side.model.named_parameters():
                    if parameter.requires_grad and norm == norm:
                        parameter.sub_(gradients[name].to(parameter.dtype), alpha=lr / max(1.0, norm))

    def report(self) -> EngineReport:
        tolerance = self.given_tolerance or self._tolerance()
        return EngineReport(", ".join(sorted(self.names)) or self.name, tolerance=tolerance, **self.found)

    def _tolerance(self) -> float:
        parameters = list(self.plain.model.parameters())
        seen = [p.dtype for p in parameters if p.dtype in _TOLERANCE] or [torch.float32]
        device = device_of(self.plain.model).type
        if torch.is_autocast_enabled(device):
            seen.append(torch.get_autocast_dtype(device))
        return max(_TOLERANCE[dtype] for dtype in seen)


def _same_batch(ours: Any, theirs: Any) -> bool:
    pairs = zip(tensors_of(ours), tensors_of(theirs), strict=True)
    return all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in pairs if a.layout == torch.strided
    )


def max_or_nan(*values: float) -> float:
    """Return the largest value, NaN where one is NaN: Python's ``max`` passes over a NaN that is not the first."""
    return float(torch.tensor(values, dtype=torch.float64).amax())
