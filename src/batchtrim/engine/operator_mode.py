"""Watch every operator that runs, including those inside ``torch.cond``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["OperatorMode"]

# An older release, such as 2.8, gives a mode only those higher-order operators that have a rule for the mode's class.
_GETS_HIGHER_ORDER = hasattr(TorchDispatchMode, "supports_higher_order_operators")
_ruled: set[tuple[type, Any]] = set()


class OperatorMode(TorchDispatchMode):
    """A mode that watches a forward in which higher-order operators may run.

    A compiled function may stop and run an operator by itself, and would then compile what the mode does. Torch 2.13
    prevents this for every mode, by an import of its compiler that takes one to two seconds. Here it is prevented if
    the program has imported the compiler.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: what torch compiles by itself, as ``torch.cond`` does, cannot be compiled inside a mode."""
        return True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True for a release that asks this instead of :meth:`ignore_compile_internals`."""
        return not _GETS_HIGHER_ORDER

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, so that torch does not import its compiler; see :meth:`__enter__`."""
        return False

    def __enter__(self) -> Self:
        kind: Any = type(self)
        if not _GETS_HIGHER_ORDER:
            for operator in torch._ops._higher_order_ops.values():
                if (kind, operator) not in _ruled:
                    operator.py_impl(kind)(_rule(operator))
                    _ruled.add((kind, operator))
        if "torch._dynamo" in sys.modules and not hasattr(kind.__torch_dispatch__, "_torchdynamo_disable"):
            kind.__torch_dispatch__ = torch.compiler.disable(kind.__torch_dispatch__)
        return super().__enter__()


def _rule(operator: Any) -> Callable[..., Any]:
    """Return the rule of a higher-order operator for a mode: call the mode, as a newer release does without a rule."""

    def run(mode: OperatorMode, *args: Any, **kwargs: Any) -> Any:
        return mode.__torch_dispatch__(operator, (), args, kwargs)

    return run
