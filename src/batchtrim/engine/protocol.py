"""The interface of every engine."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from batchtrim.engine.batch import StepResult
from batchtrim.selection import Selection

__all__ = ["Engine"]


class Engine(Protocol):
    """One way to compute a trimmed step.

    Attributes:
        name: as given to :class:`batchtrim.TrimmedForward`.
        repeats_forward: True if a step with a given selection runs the forward of the whole batch; False if it runs
            only the kept rows and leaves buffers and generators as an earlier pass left them.
        traces: True if it traces the model, which takes about a second.
        pays_below: the keep fraction up to which the engine may pay.
    """

    name: str

    @property
    def traces(self) -> bool: ...

    @property
    def pays_below(self) -> float: ...

    @property
    def repeats_forward(self) -> bool: ...

    def __call__(self, x: Any, y: Any, selection: Selection | None = None) -> StepResult:
        """Run one step; ``selection`` is given if the choice is already made.

        Raises:
            EngineRefused: the engine cannot run the model. Everything is as before the call.
        """
        ...

    def train_on_kept(self, x: Any, y: Any, selection: Selection, first: Any = None) -> Tensor:
        """Return the loss, with a graph, of rows chosen earlier.

        Args:
            first: if the forward is not repeated, the state before the scoring pass, and its losses.
        """
        ...

    def pays(self, x: Any, y: Any) -> bool:
        """True if a step on a batch like this is expected to cost less than a plain one."""
        ...
