"""What one forward of a traced step saved for its backward."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor

from batchtrim.engine.cutting import KeptRows, cut

if TYPE_CHECKING:
    from batchtrim.engine.compiled import CompiledStep
    from batchtrim.engine.rerun import Inputs, OwnPython
    from batchtrim.engine.sliced import SlicedStep
    from batchtrim.engine.unasked import Arrivals

__all__ = ["Tape"]


class Tape:
    """The tensors with rows that one forward saved for its backward.

    Attributes:
        chosen: the kept rows; None if backward runs on all rows.
        approximate: True if BatchNorm's means are taken over the kept rows.
        compiled: what ran the forward; None if it ran operator by operator.
        late: True if backward is compiled too and cuts what it reads itself.
        outputs: those of the forward that still exist, such as tensors that the model keeps.
        arrivals: which gradients arrive in backward; None where that makes no difference, or is not known.
        compares: True if the run is compared with the model.
        python: the model's own Python, to run again.
        inputs: what it ran on; None if its gradient cannot be differentiated.
    """

    def __init__(self, compares: bool = False, python: OwnPython | None = None) -> None:
        self.compares = compares
        self.python = python
        self.inputs: Inputs | None = None
        self.step: SlicedStep | None = None
        self.saved: dict[int, Tensor] = {}
        self.versions: dict[int, int] = {}
        self.size = 0  # the number of losses
        self.batch = 0  # and of samples
        self.kept: dict[int, Tensor] = {}
        self.chosen: KeptRows | None = None
        self.approximate = False
        self.compiled: CompiledStep | None = None
        self.late = False
        self.outputs: list[weakref.ref[Tensor]] = []
        self.arrivals: Arrivals | None = None

    def cut(self, rows: Tensor, approximate: bool, again: bool = False) -> None:
        """Keep the given rows of the saved tensors, and all rows of those that the lower part reads.

        Args:
            rows: int64 (k,), positions in the losses.
            again: keep everything else too, so that it can be cut again.

        A compiled backward itself cuts the tensors it reads; only the batch, which may change before that, is cut here.
        """
        assert self.step is not None
        self.chosen, self.approximate = self.step.kept(rows, self.batch, self.size), approximate
        self.late = self.compiled is not None and not again
        slices = self.step.slices(approximate)
        self.kept = {}
        for place in sorted(self.saved, key=lambda place: self.saved[place].nbytes):  # small ones first, to free memory
            layout = slices.cuts.get(place)
            later = self.late and place not in self.step.given
            if layout is not None and not later:
                self.kept[place] = cut(self.saved[place], layout, self.chosen)
            if place not in slices.whole and not again and (layout is None or not later):
                del self.saved[place]
