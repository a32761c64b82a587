"""Check on your own model that an engine computes the same as a plain step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from batchtrim._by_name import by_name
from batchtrim._checks import check_count, check_keep, check_positive, describe
from batchtrim.engine.copies import in_float64
from batchtrim.engine.precision import full_float32
from batchtrim.engine.side_by_side import (
    TOLERANCE,
    SideBySide,
    draws_of_torch,
    generators_kept,
    max_or_nan,
)

__all__ = ["EngineReport", "check_engine"]

KEEP = (0.5, 0.2, 0.75)
STEPS = 6
_COSINE = 0.9
_ROUNDING = 0.1  # the largest error in float32 that may be rounding


@dataclass(frozen=True)
class EngineReport:
    """The findings of :func:`check_engine`: engine against plain step, the worst over all steps.

    Attributes:
        engine: the engine that ran; if it changed, all of them: ``"exact, shared"``.
        refused: why the engine would not run the model, or None.
        approximate: why the gradient is not exact, if the engine itself says so, or None.
        failed: what the engine raised although a plain step trains, or None.
        same_samples: True if the right samples were kept in every step; of equal losses either one is right.
        loss_error: ``|L - L_plain| / |L_plain|``.
        gradient_error: ``||g - g_plain|| / ||g_plain||`` over all parameters together.
        parameter_error: the same for the worst parameter; one with a gradient below a hundredth of the whole is
            judged against that hundredth.
        parameter: the name of that parameter.
        gradient_cosine: cosine between the two gradients.
        buffer_error: largest difference of a buffer, or of a parameter after the step, relative to its norm.
        attributes: plain attributes of modules (counters, flags) that differ from those after a plain step; and
            gradients that differ as objects: one that a plain step leaves at None, other strides, two in one memory.
        same_generators: True if the generators of torch, Python and NumPy ended in the same state.
        same_batch: True if the batch was left as a plain step leaves it.
        steps: how many steps were compared.
        batch_norm: True if the model has a BatchNorm in training mode, for which no cheap gradient is exact.
        float64_error: the largest of the errors above if the same steps run in float64. They do if an error exceeds the
            tolerance in float32: a compiled forward rounds differently from a plain one, and rounding that moves an
            activation across a ReLU's zero changes the gradient by much more. Infinite where the steps are not the
            same in float64, or cannot run; None if not measured.
        tolerance: the largest accepted error; see :func:`check_engine`.
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
    float64_error: float | None = None
    tolerance: float = TOLERANCE[torch.float32]

    @property
    def exact(self) -> bool:
        """True if losses and gradients are those of a plain step, up to :attr:`tolerance` or to rounding.

        Errors below 0.1 are rounding if the same steps agree up to the tolerance in float64.
        """
        return self.error <= self.tolerance or self._is_rounding

    @property
    def error(self) -> float:
        """The largest error of loss, gradient and parameters; NaN if one is."""
        return max_or_nan(self.gradient_error, self.parameter_error, self.loss_error)

    @property
    def _perhaps_rounding(self) -> bool:
        """True if nothing but an error between the tolerance and 0.1 is wrong, and all is in float32."""
        alone = self.same_state and self.refused is None and self.failed is None and self.approximate is None
        small = self.tolerance < self.error <= _ROUNDING and self.tolerance == TOLERANCE[torch.float32]
        return alone and small and not self.batch_norm

    @property
    def _is_rounding(self) -> bool:
        wide = self.float64_error
        return wide is not None and wide <= self.tolerance and self.error <= _ROUNDING

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
        """One of "right", "approximate" (as the engine itself says), "refused" and "wrong".

        It is "refused" only if all steps before were right and nothing was left changed; otherwise it is "wrong".
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
            return f"engine {self.engine!r} fails although a plain step trains: {self.failed}"
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
            f"  in float64         {self._in_float64}" if self.float64_error is not None else "",
            f"  approximate        {self.approximate}" if self.approximate is not None else "",
            f"  buffers            relative error {self.buffer_error:.1e}",
            f"  attributes         different: {', '.join(self.attributes)}" if self.attributes else "",
            f"  random generators  {same[self.same_generators]}",
            f"  batch left         {same[self.same_batch]}",
            f"  then refused       {self.refused}" if self.refused is not None else "",
        ]
        return "\n".join(line for line in lines if line)

    @property
    def _in_float64(self) -> str:
        if self.float64_error == math.inf:
            return "not the same, or it does not run"
        found = "; the errors above are rounding" if self._is_rounding else ""
        return f"relative error {self.float64_error:.1e}{found}"


@by_name
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
    """Run an engine and a plain step side by side on copies of a model, and compare them.

    A plain step is one forward with a graph and the mean of the kept losses. Both copies start from the same state and
    the same random numbers in every step, and both are updated by the plain gradient, so that errors do not accumulate.
    Batches, batch sizes and keep fractions change from step to step. Every third step adds its gradient to that of the
    step before.

    Args:
        model: not changed; two copies are made.
        batch: ``(x, y)`` as given to :class:`batchtrim.TrimmedForward`.
        per_sample_loss: as for TrimmedForward.
        engine: which one to check.
        keep: the keep fraction, or several, used in turn.
        steps: how many; an engine may prepare in the first ones.
        batch_dim: as in :class:`batchtrim.TrimmedForward`.
        more: further batches, used in turn. By default two are made from ``batch`` if it can be cut to rows:
            its rows in another order, and three quarters of them.
        tolerance: the largest relative error accepted. By default 1e-5 in float32, and what the least precise dtype of
            the parameters or of autocast allows; pass 0.1 for a model that casts to bfloat16 inside.
        lr: step size of the update between steps, along a gradient of norm 1 at most.
        verbose: print the report too.

    Returns:
        An :class:`EngineReport`. In a test of your own: ``assert report.ok``.

    Raises:
        TypeError, ValueError: an argument is not as above; or a function holds a part of the model, or something else
            that gets a gradient, which the copies would share. Errors of the model in a plain step are passed on.

    Notes:
        TF32 is switched off meanwhile: it rounds to ten bits, which cannot be compared to 1e-5. Compiled code draws
        (dropout) from torch's generators meanwhile: Inductor's own gives other masks to another graph.
        The generators of torch, Python and NumPy are restored. Cost: about two plain steps per step.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        >>> batch = torch.randn(16, 4), torch.randint(0, 3, (16,))
        >>> check_engine(model, batch, nn.CrossEntropyLoss(), verbose=False).ok
        True
    """
    batches = [_checked("batch", batch), *(_checked("more", each) for each in more)]
    keeps = [check_keep("keep", each) for each in (keep if isinstance(keep, (tuple, list)) else [keep])]
    if not keeps:
        raise ValueError("expected `keep` to hold at least one fraction, got none.")
    check_count("steps", steps)
    check_positive("lr", lr)
    if tolerance is not None:
        check_positive("tolerance", tolerance)

    def compared(model: nn.Module, loss: Any, batches: list[tuple[Any, Any]], tolerance: float | None) -> EngineReport:
        with SideBySide(model, loss, engine, batch_dim, tolerance) as pair:
            batches = [*batches, *(pair.made_of(batches[0]) if len(batches) == 1 else ())]
            for number in range(steps):
                turn = number + number // len(batches)  # so that each batch is combined with each fraction
                if not pair.step(number, batches[number % len(batches)], keeps[turn % len(keeps)], lr):
                    break
            return EngineReport(**pair.results())

    with generators_kept(model), full_float32(), draws_of_torch():
        report = compared(model, per_sample_loss, batches, tolerance)
        if tolerance is None and report._perhaps_rounding:
            error = math.inf
            with suppress(Exception):  # not every model runs in float64; then the error in float32 stands
                wide = compared(*in_float64(model, per_sample_loss, batches), report.tolerance)
                error = wide.error if wide.verdict == "right" and wide.steps == report.steps else math.inf
            report = replace(report, float64_error=error)
    if verbose:
        print(report)
    return report


def _checked(name: str, batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"expected `{name}` to be (x, y), got {describe(batch)}. The order is check_engine(model, batch, loss)."
        )
    return batch[0], batch[1]
