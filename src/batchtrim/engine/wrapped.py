"""Run another function than the model inside the wrapper that DistributedDataParallel is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["with_call"]


class _StandIn(nn.Module):
    """Take the module's place in a wrapper: the same parts, another call."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call
        self.named_modules = inner.named_modules  # parameters and buffers are listed by it
        self.modules = inner.modules

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


@contextmanager
def with_call(model: nn.Module, call: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Return ``call`` in place of the model inside its wrapper, whose own work is not part of the model."""
    if not isinstance(model, DistributedDataParallel):
        yield call
        return
    inner: Any = model._modules["module"]

    def called(*args: Any) -> Any:
        model._modules["module"] = inner
        return call(*args)

    model._modules["module"] = _StandIn(inner, called)
    try:
        yield model
    finally:
        model._modules["module"] = inner
