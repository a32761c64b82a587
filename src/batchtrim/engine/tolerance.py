"""Compare losses and gradients of two runs of a model, within its precision."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim.engine.compilation import uncompiled_calls
from batchtrim.engine.contents import in_double
from batchtrim.engine.forward import Forward
from batchtrim.engine.precision import coarsest_dtype
from batchtrim.engine.rows import tensors_of
from batchtrim.engine.state import Snapshot, restored, without_graph
from batchtrim.errors import EngineRefused

__all__ = ["Tolerance"]

_ROWS = 8  # that show every dtype inside the model
# How far the same loss may differ between two batch sizes, relative to itself or to the batch's mean loss. Kernels
# sum in another order for another batch size: 1e-7 to 3e-6 over 150 architectures in float32, about eps in the others.
# A wrong loss is off by 1e-3 or more, or not at all (a gate that is zero); the gradient and NaN show the latter.
_APART = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Redrawn dropout in front of a head with small weights moves a loss by only 1e-5. So if random numbers were drawn, the
# samples' losses have to be the same up to rounding.
_DRAWN_APART = 0.03
# The same for two batches of one size, for which kernels sum in the same order. Other rows may then only change the
# results of operators that run on a selection of rows.
_ALIKE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_GRADIENT_ALIKE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_GRADIENT_APART = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}


class Tolerance:
    """Compare losses and gradients within the model's precision."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.coarsest: torch.dtype | None = None  # the least precise dtype seen inside the model

    def compare(
        self,
        losses: Tensor,
        scored: Tensor,
        rows: Tensor,
        snapshot: Snapshot,
        where: str = "kept",
        drawn: bool = False,
        expected_apart: bool = False,
    ) -> None:
        """Refuse unless ``losses`` (k,) equal ``scored[rows]``; to a closer tolerance if random numbers were ``drawn``.

        Args:
            expected_apart: True if they differ in most steps: the model's precision is then found out only once.

        Raises:
            EngineRefused: names the sample that is furthest off.
        """
        expected = scored.index_select(0, rows)
        scale = scored.nan_to_num(posinf=0.0, neginf=0.0).abs().mean()
        for dtype in (self._dtype(losses), None):
            if dtype is None:  # does the model compute in a less precise dtype than is visible from outside?
                if expected_apart and self.coarsest is not None:
                    break
                dtype = self._look_inside(snapshot, len(scored))
            apart = _APART[dtype] * (_DRAWN_APART if drawn else 1.0)
            near = (losses - expected).abs() <= apart * (expected.abs() + scale)
            if (near | (losses == expected) | (losses.isnan() & expected.isnan())).all():
                return
        worst = int((losses - expected).abs().nan_to_num(nan=float("inf")).argmax())
        raise EngineRefused(
            f"its samples depend on one another, or on how many there are (sample {int(rows[worst])} has a loss of "
            f"{float(expected[worst]):.6g} in the batch, and {float(losses[worst]):.6g} among the {where} ones)"
        )

    def compare_beside_others(self, ours: Tensor, theirs: Tensor, rows: Tensor) -> None:
        """Refuse unless rows have the same losses in two batches of one size that differ in the other rows.

        Raises:
            EngineRefused: names the sample that is furthest off.
        """
        finite = ours.nan_to_num(posinf=0.0, neginf=0.0).abs()
        apart = _ALIKE[self._dtype(ours)] * (finite + finite.mean())
        off = torch.where((ours == theirs) | (ours.isnan() & theirs.isnan()), 0.0, (ours - theirs).abs())
        if not (off <= apart).all():
            worst = int(off.nan_to_num(nan=float("inf")).argmax())
            raise EngineRefused(
                f"its samples depend on one another (the loss of sample {int(rows[worst])} changes by "
                f"{float(off[worst]):.2g}, from {float(ours[worst]):.6g}, beside other samples)"
            )

    def compare_gradients(
        self, ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None], *, same_size: bool = False
    ) -> None:
        """Refuse unless each tensor named in both runs has the same gradient; a missing one is zero.

        Args:
            same_size: True if both batches have as many rows, so that kernels sum in the same order.

        Raises:
            EngineRefused: names the tensor.
        """
        tolerance = _GRADIENT_ALIKE if same_size else _GRADIENT_APART
        pairs = list(_pairs(ours, theirs))
        total = sum(float(in_double(a).norm()) ** 2 for _, a, _ in pairs) ** 0.5
        kinds = {(a.dtype, a.device): a for _, a, _ in pairs}
        dtypes = {kind: self.coarsest or self._dtype(a) for kind, a in kinds.items()}  # each looks at all parameters
        for name, a, b in pairs:
            apart = tolerance[dtypes[a.dtype, a.device]]
            off, size = float(in_double(a - b).norm()), float(in_double(a).norm())
            if off > apart * max(size, 0.01 * total):
                raise EngineRefused(
                    f"the gradient of a sample depends on the other samples ({name}: {off:.2g} apart, of {size:.2g})"
                )

    def _dtype(self, losses: Tensor) -> torch.dtype:
        seen = [coarsest_dtype(self.forward.inner, losses), self.coarsest or torch.float64]
        return max(seen, key=_APART.__getitem__)

    def _look_inside(self, snapshot: Snapshot, batch: int) -> torch.dtype:
        """Return the least precise dtype that a module of the model returns: autocast may be on in its forward."""
        seen = {torch.float32}

        def note(_: nn.Module, __: Any, outputs: Any) -> None:
            seen.update(each.dtype for each in tensors_of(outputs) if each.dtype in _APART)

        rows = torch.arange(min(batch, _ROWS))
        hook = nn.modules.module.register_module_forward_hook(note)
        try:
            # compiled, each module would be a graph
            with restored(snapshot), without_graph(), uncompiled_calls(self.forward), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
                self.forward(*self.forward.rows(snapshot.x, snapshot.y, rows, batch), model=self.forward.inner)
        except Exception:  # the next run of the model reports this error
            return torch.float32
        finally:
            hook.remove()
        self.coarsest = max(seen, key=_APART.__getitem__)
        return self.coarsest


def _pairs(
    ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each tensor's name and both gradients, zeros for one that is missing."""
    for name in [name for name in ours if name in theirs]:
        a, b = ours[name], theirs[name]
        known = b if a is None else a
        if known is not None:
            zeros = torch.zeros_like(known)
            yield name, zeros if a is None else a, zeros if b is None else b
