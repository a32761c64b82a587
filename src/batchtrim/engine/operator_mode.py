"""Watch every operator that runs, including those inside ``torch.cond``."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["OperatorMode"]


class OperatorMode(TorchDispatchMode):
    """A mode that watches a forward in which higher-order operators may run."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: what torch compiles by itself, as ``torch.cond`` does, cannot be compiled inside a mode."""
        return True
