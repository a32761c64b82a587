"""Pick the cheapest engine that is right for the model, and say so where that is not the shared one."""

from __future__ import annotations

import warnings
from typing import Any

from batchtrim.engine.batch import Forward, Step
from batchtrim.engine.exact import ExactEngine
from batchtrim.engine.shared import SharedEngine, is_compiled
from batchtrim.engine.two_pass import TwoPassEngine, redrawn
from batchtrim.errors import EngineFallback, EngineRefused
from batchtrim.selection import Selection
from batchtrim.trimmer import Trimmer

__all__ = ["AutoEngine"]

# Above these keep fractions the plain graph is as fast, or too little slower to leave it: (1 + 2q) / 3 and (1 + 3q) / 3
# plus what the engine itself costs. Measured by `make bench`.
_SHARED_BELOW = 0.78
_TWO_PASS_BELOW = 0.6


class AutoEngine:
    """Shared where it pays and is right, two-pass for compiled models where it pays, exact otherwise.

    What pays is decided by the keep fraction and a count of operations and bytes, not by a clock, so that runs repeat.

    A model whose samples interact (a contrastive loss, attention over the batch) goes to exact: dropping rows before
    the forward, as two-pass does, would change what it computes.
    """

    name = "auto"

    def __init__(self, forward: Forward, trim: Trimmer) -> None:
        self.trim = trim
        self.exact = ExactEngine(forward, trim)
        self.saving: SharedEngine | TwoPassEngine | None = None
        try:
            self.saving = SharedEngine(forward, trim)
        except EngineRefused as refused:
            self._hand_on(forward, refused)

    def __call__(self, x: Any, y: Any, selection: Selection | None = None) -> Step:
        """One step; ``selection`` is given where the choice was made already."""
        if self.saving is None or not self._pays(self.saving, x, y):
            return self.exact(x, y, selection)
        try:
            return self.saving(x, y, selection)
        except EngineRefused as refused:
            self._hand_on(self.exact.forward, refused)
            selection = refused.selection
        # Not while the error lives: it holds the model's frames, and older checkpointing undoes its hooks with them.
        return self.exact(x, y, selection)

    def _pays(self, saving: SharedEngine | TwoPassEngine, x: Any, y: Any) -> bool:
        if isinstance(saving, TwoPassEngine):
            return self.trim.expected_keep <= _TWO_PASS_BELOW
        return self.trim.expected_keep <= _SHARED_BELOW and saving.pays(x, y)

    def _hand_on(self, forward: Forward, refused: EngineRefused) -> None:
        """The next engine, for good; one warning."""
        compiled = self.trim.unit == "sample" and any(is_compiled(module) for module in forward.model.modules())
        reason = redrawn(forward) if compiled else None
        two_pass = compiled and reason is None and not isinstance(self.saving, TwoPassEngine)
        self.saving = TwoPassEngine(forward, self.trim, approximate=False) if two_pass else None
        also = f", and {reason}" if reason else ""
        going_on = "two_pass" if two_pass else "exact"
        warnings.warn(f"{refused}{also}. Going on with engine={going_on!r}.", EngineFallback, stacklevel=4)
