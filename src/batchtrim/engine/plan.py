"""What a calibration of the shared engine found, and whether following it pays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from batchtrim.engine.layouts import Layout
from batchtrim.engine.operators import Kind, facts

__all__ = ["Chain", "Diverged", "Plan", "Refused", "Step", "Unchained"]

# For Plan.pays, of one core or one accelerator: arithmetic in a backward, bytes of results written (with what is read
# for them, and memory taken afresh); and what our Python costs an operator in both passes together. The core's are
# fitted to bench_engine, the accelerator's are a guess.
_FLOPS_PER_SECOND = {"cpu": 7.5e10, "cuda": 2e13}
_BYTES_PER_SECOND = {"cpu": 5e9, "cuda": 1e12}
_SECONDS_PER_OPERATOR = 2e-5


class Diverged(Exception):
    """The two passes did not run alike; the step has to be done again, another way."""


class Unchained(Diverged):
    """Somebody reads or keeps what at calibration nobody did: see :mod:`.chains`."""


class Refused(Exception):
    """The model does something of which no exact rows can be taken."""


@dataclass(frozen=True)
class Chain:
    """A remembered operator, what it gives for B rows, and the cheap operators behind it: see :mod:`.chains`."""

    func: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    links: tuple[Any, ...]

    def room(self, k: int, device: torch.device) -> Tensor:
        """For what the operator would give for k rows, unwritten."""
        shape = list(self.shape)
        shape[self.layout.dim] = self.layout.outer * k * self.layout.inner
        return torch.empty(shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Step:
    """What the second pass does at one remembered operator."""

    func: Any
    layouts: tuple[Layout, ...] | None  # one for each output; None: compute it again
    shapes: tuple[Any, ...]  # of the outputs for B rows
    where: str = ""
    chain: Chain | None = None  # the layouts and shapes are those of its last operator


@dataclass
class Plan:
    """What a calibration found, valid while the first pass gives the same operators and shapes."""

    steps: list[Step] = field(default_factory=list)
    undecided: int = 0  # operators more than one layout fitted
    unmatched: list[str] = field(default_factory=list)  # operators no layout fitted
    used: int = 0
    operators: int = 0  # run in the first pass
    flops: int = 0  # of these, for B rows
    remembered: int = 0  # bytes, for B rows
    written: float = 0.0  # bytes that the second pass writes for one kept row
    batch: int = 0
    chains: dict[int, Chain] = field(default_factory=dict)  # seen, by place; a step has its own once it was tried

    @property
    def unsettled(self) -> bool:
        """Whether another calibration may find more."""
        return bool(self.undecided) or any(self.steps[place].chain is None for place in self.chains)

    def pays(self, keep: float, device: str) -> bool:
        """Whether what a backward over the kept rows saves is more than what remembering and the second pass cost.

        A count, not a clock: the same model on the same kind of device, with as many threads, is always decided in the
        same way, so that a run repeats.
        """
        kind = device if device in _FLOPS_PER_SECOND else "cuda"
        width = torch.get_num_threads() if kind == "cpu" else 1
        saved = 2.0 * (1.0 - keep) * self.flops / (width * _FLOPS_PER_SECOND[kind])
        moved = self.remembered + keep * self.batch * self.written
        return saved > self.operators * _SECONDS_PER_OPERATOR + moved / (width * _BYTES_PER_SECOND[kind])

    def provable(self) -> list[int]:
        """Places of the operators whose rows are taken and could be computed instead."""
        kinds = (Kind.COSTLY, Kind.ATTENTION)
        return [i for i, step in enumerate(self.steps) if step.layouts and facts(step.func).kind in kinds]
