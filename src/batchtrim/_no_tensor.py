"""What tensors can do and `Losses` cannot: each error says where the tensor is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

__all__ = ["NoTensor"]

_OPERATORS = {
    "__getitem__": "[...]", "__pow__": "**", "__rpow__": "**", "__rtruediv__": "/ by them", "__matmul__": "@",
    "__lt__": "<", "__le__": "<=", "__gt__": ">", "__ge__": ">=", "__abs__": "abs()", "__float__": "float()",
    "__int__": "int()", "__array__": "a conversion to NumPy",
}  # fmt: skip


class NoTensor:
    """A base of ``Losses``, whose losses are in ``values``."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            from torch import Tensor

            if not hasattr(Tensor, name):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise AttributeError(
                f"expected an attribute of `Losses`, got .{name}, which tensors have. The trimmed loss is a tensor, "
                f"trim(losses).{name}; so are the losses of the samples, losses.values.{name}."
            )


def _refused(operator: str) -> Callable[..., Any]:
    def refuse(self: object, *_: object, **__: object) -> Any:
        raise TypeError(
            f"expected +, -, * or / of `Losses`, got {operator}. Use a tensor: those of the samples, losses.values, "
            "with losses.mask; or the trimmed loss, trim(losses)."
        )

    return refuse


for name, operator in _OPERATORS.items():
    setattr(NoTensor, name, _refused(operator))
