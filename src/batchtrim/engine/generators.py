"""Record and restore the random-number generators: torch's, Python's, and NumPy's."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from batchtrim._generators import TorchGenerators

__all__ = ["GeneratorStates"]


class GeneratorStates:
    """The state of every generator a forward may draw from: torch's, Python's, and NumPy's if it is loaded.

    NumPy's takes longer to read than all others: ``of_numpy=False`` leaves it out.
    """

    def __init__(self, device: torch.device, *, of_numpy: bool = True) -> None:
        self.device = device
        self.of_torch = TorchGenerators([device])
        self.python = random.getstate()
        numpy = sys.modules.get("numpy") if of_numpy else None
        self.numpy: Any = None if numpy is None else numpy.random.get_state(legacy=False)

    def restore(self) -> None:
        """Set the generators to the recorded state."""
        self.of_torch.restore()
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def same(self, other: GeneratorStates) -> bool:
        """Return True if nothing was drawn between the two."""
        python = self.python == other.python
        return python and self.of_torch.same(other.of_torch) and _same_numpy(self.numpy, other.numpy)


def _same_numpy(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return True  # NumPy was imported in between
    same = a["state"]["pos"] == b["state"]["pos"] and (a["state"]["key"] == b["state"]["key"]).all()
    return bool(same) and a["has_gauss"] == b["has_gauss"]
