"""The choice a trimmer made from a batch, and the losses it chose from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from batchtrim.selection import Selection

__all__ = ["Choice"]


@dataclass(frozen=True)
class Choice:
    """One batch after the choice: :attr:`batchtrim.Trimmer.last`, and what :meth:`batchtrim.KeepLog.record` reads.

    Attributes:
        losses: (B,), detached. Under ``unit="element"`` one entry per token or pixel. Shares memory with those that
            were given, unless they had to be averaged per sample.
        selection: the kept rows of ``losses``.
        mask: bool (B,), False where an entry does not count; None if all do.

    Example:
        >>> import torch, batchtrim
        >>> losses = torch.tensor([0.1, 3.0, 2.0, 0.5])
        >>> Choice(losses, batchtrim.hardest()(losses, 0.5)).selection.k
        2
    """

    losses: Tensor
    selection: Selection
    mask: Tensor | None = None

    def __init__(self, losses: Tensor, selection: Selection, mask: Tensor | None = None) -> None:
        vars(self).update(losses=losses, selection=selection, mask=mask)  # set all at once, for speed, as in Selection
