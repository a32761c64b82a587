"""Checks to run on your own model: does an engine compute what the exact one does?"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim._checks import check_count, describe
from batchtrim.engine import TrimmedForward
from batchtrim.engine.batch import map_tensors
from batchtrim.engine.batch_norm import has_batch_norm
from batchtrim.errors import EngineFallback, EngineRefused
from batchtrim.losses import Losses
from batchtrim.trimmer import Trimmer

__all__ = ["EngineReport", "check_engine"]


@dataclass(frozen=True)
class EngineReport:
    """What :func:`check_engine` found, engine against exact, worst over the steps.

    Attributes:
        engine: the engine that ran; where "auto" chose, the one it chose.
        refused: why the engine would not run the model, or None.
        same_samples: whether the same samples were chosen in every step.
        loss_error: ``|L - L_exact| / |L_exact|``.
        gradient_error: ``||g - g_exact|| / ||g_exact||`` over all parameters together.
        gradient_cosine: cosine between the two.
        buffer_error: largest difference of a buffer, relative to the buffer's largest value.
        same_generators: whether torch's generators ended in the same state.
        steps: how many steps were compared; the first calibrates, for some models the second too.
        batch_norm: whether the model has a BatchNorm in training mode, for which no cheap gradient is exact.
    """

    engine: str
    refused: str | None
    same_samples: bool
    loss_error: float
    gradient_error: float
    gradient_cosine: float
    buffer_error: float
    same_generators: bool
    steps: int
    batch_norm: bool

    @property
    def ok(self) -> bool:
        """Whether the engine can be trusted with this model: exact, or, with BatchNorm, a cosine of at least 0.9."""
        if self.refused is not None:
            return False
        near = self.gradient_cosine >= 0.9 if self.batch_norm else self.gradient_error <= 1e-4
        return near and self.same_samples and self.buffer_error <= 1e-4 and self.same_generators

    def __str__(self) -> str:
        if self.refused is not None:
            return f"engine {self.engine!r} refuses this model: {self.refused}"
        note = " (BatchNorm couples samples: no cheap gradient is exact)" if self.batch_norm else ""
        gradient = f"relative error {self.gradient_error:.1e}, cosine {self.gradient_cosine:.4f}"
        return "\n".join(
            [
                f"engine {self.engine!r} against 'exact', {self.steps} steps: {'ok' if self.ok else 'NOT THE SAME'}",
                f"  samples chosen     {'the same' if self.same_samples else 'different'}",
                f"  loss               relative error {self.loss_error:.1e}",
                f"  gradient           {gradient}{note}",
                f"  buffers            relative error {self.buffer_error:.1e}",
                f"  random generators  {'the same' if self.same_generators else 'different'}",
            ]
        )


def check_engine(
    model: nn.Module,
    batch: tuple[Any, Any],
    per_sample_loss: Callable[[Any, Any], Tensor | Losses],
    *,
    engine: str = "shared",
    keep: float = 0.5,
    steps: int = 6,
    batch_dim: int = 0,
    verbose: bool = True,
) -> EngineReport:
    """Run an engine and the exact one on copies of a model, from the same state, and compare.

    Args:
        model: left as it is; two copies are made.
        batch: ``(x, y)`` as they would be given to :class:`batchtrim.TrimmedForward`.
        per_sample_loss: as there.
        engine: which one to check. keep: fraction kept.
        steps: how many; the first calibrates, for some models the second too, the others slice.
        verbose: print the report too.

    Returns:
        An :class:`EngineReport`; ``assert report.ok`` in a test of your own.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        >>> batch = torch.randn(16, 4), torch.randint(0, 3, (16,))
        >>> check_engine(model, batch, nn.CrossEntropyLoss(), verbose=False).ok
        True
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"expected `batch` to be (x, y), got {describe(batch)}. The order is check_engine(model, batch, loss)."
        )
    check_count("steps", steps)
    runs = {}
    report = None
    for name in ("exact", engine):
        try:
            runs[name] = _run(model, batch, per_sample_loss, name, keep, steps, batch_dim)
        except EngineRefused as refused:
            nan = float("nan")
            report = EngineReport(
                engine, str(refused), False, nan, nan, nan, nan, False, 0, has_batch_norm(list(model.modules()))
            )
    if report is None:
        report = _compare(model, runs["exact"], runs[engine], steps)
    if verbose:
        print(report)
    return report


@dataclass
class _Run:
    engine: str
    losses: list[Tensor]
    chosen: list[list[int]]
    gradients: list[Tensor]
    buffers: list[Tensor]
    generators: list[Tensor]


def _run(model: nn.Module, batch: Any, loss: Any, engine: str, keep: float, steps: int, batch_dim: int) -> _Run:
    own = copy.deepcopy(model)
    before = torch.get_rng_state(), random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineFallback)
        step = TrimmedForward(own, loss, Trimmer(keep), engine, batch_dim=batch_dim)
        run = _Run(engine, [], [], [], [], [])
        torch.manual_seed(0)
        random.seed(0)
        try:
            for _ in range(steps):
                own.zero_grad(set_to_none=True)
                value = step(*(map_tensors(Tensor.clone, part) for part in batch))
                value.backward()
                run.losses.append(value.detach())
                run.chosen.append(step.trim.last_selection.rising().indices.tolist())  # type: ignore[union-attr]
                run.gradients.append(_flat(p.grad for p in own.parameters() if p.grad is not None))
                run.generators.append(torch.get_rng_state())
        finally:
            torch.set_rng_state(before[0])
            random.setstate(before[1])
    if engine == "auto":
        run.engine = getattr(step.engine.saving, "name", "exact")
    run.buffers = [buffer.clone() for buffer in own.buffers()]
    return run


def _compare(model: nn.Module, exact: _Run, other: _Run, steps: int) -> EngineReport:
    pairs = list(zip(exact.gradients, other.gradients, strict=True))
    return EngineReport(
        engine=other.engine,
        refused=None,
        same_samples=exact.chosen == other.chosen,
        loss_error=_largest(_relative(a, b) for a, b in zip(exact.losses, other.losses, strict=True)),
        gradient_error=_largest(_relative(a, b) for a, b in pairs),
        gradient_cosine=-_largest(-_cosine(a, b) for a, b in pairs),
        buffer_error=_largest([0.0, *(_relative(a, b) for a, b in zip(exact.buffers, other.buffers, strict=True))]),
        same_generators=all(torch.equal(a, b) for a, b in zip(exact.generators, other.generators, strict=True)),
        steps=steps,
        batch_norm=has_batch_norm(list(model.modules())),
    )


def _largest(values: Iterable[float]) -> float:
    """The largest value, NaN where one is NaN: Python's ``max`` passes over a NaN that is not the first."""
    return float(torch.tensor(list(values), dtype=torch.float64).amax())


def _flat(tensors: Any) -> Tensor:
    parts = [tensor.flatten().double() for tensor in tensors]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _relative(exact: Tensor, other: Tensor) -> float:
    if exact.shape != other.shape:
        return float("inf")
    exact, other = exact.double(), other.double()
    scale = float(exact.norm())
    difference = float((exact - other).norm())
    return difference / scale if scale else difference


def _cosine(exact: Tensor, other: Tensor) -> float:
    if exact.shape != other.shape:
        return float("nan")
    if not float(exact.norm()) and not float(other.norm()):
        return 1.0
    return float(torch.nn.functional.cosine_similarity(exact, other, dim=0))
