"""The value that a criterion itself gives for a batch, to compare the mean of its un-reduced losses with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim._generators import TorchGenerators

__all__ = ["OwnValue"]


class OwnValue:
    """A further call of a criterion. Make it before the un-reduced call: it draws the same random numbers.

    Args:
        criterion: as it was given. A module's state stays as it is: a copy is called.
        inputs: of the batch.
    """

    def __init__(self, criterion: Callable[..., Any], inputs: Sequence[Any]) -> None:
        self._inputs = inputs
        self._generators = TorchGenerators(each.device for each in inputs if isinstance(each, Tensor))
        self._copied = isinstance(criterion, nn.Module)
        self._criterion: Callable[..., Any] | None = criterion
        if self._copied:
            try:
                self._criterion = copy.deepcopy(criterion)
            except (RuntimeError, TypeError):  # it holds something that cannot be copied, such as a loss with its graph
                self._criterion = None

    def __call__(self) -> Tensor | None:
        """Return the criterion's own value, or None if that is not one number."""
        if self._criterion is None:
            return None
        value = self._again(self._criterion)
        return value if isinstance(value, Tensor) and value.ndim == 0 else None

    def repeats(self, unreduced: Callable[..., Any], values: Tensor) -> bool:
        """True if another un-reduced call gives the same values. A function may have a state, which is not copied."""
        if self._copied:
            return True
        found = self._again(unreduced)
        return found.shape == values.shape and torch.allclose(found, values, rtol=1e-6, atol=0.0, equal_nan=True)

    def of_fewer(self, unreduced: Callable[[Any], Callable[..., Tensor]], batch: int) -> Tensor | None:
        """Return the un-reduced losses of all samples but the last, or None if the inputs cannot be cut to those.

        Call it after the own value. Only tensors whose first dimension is the batch are cut, no containers of them.

        Args:
            unreduced: makes a criterion un-reduced.
            batch: how many samples there are.
        """
        if not self._copied or self._criterion is None:
            return None
        if not all(isinstance(each, Tensor) and each.ndim > 0 and len(each) == batch for each in self._inputs):
            return None
        try:
            return self._again(unreduced(self._criterion), [each[:-1] for each in self._inputs])
        except Exception:  # it may need them all
            return None

    def _again(self, call: Callable[..., Any], inputs: Sequence[Any] | None = None) -> Any:
        with torch.no_grad(), torch.random.fork_rng(list(self._generators.cuda)):
            self._generators.restore()
            return call(*(self._inputs if inputs is None else inputs))
