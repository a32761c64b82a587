"""Facts about a model: its device, modules and parameters, and whether these are sharded, lazy or without values."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from batchtrim._checks import without_values
from batchtrim.engine.reachable import Reachable

__all__ = ["device_of", "is_lazy", "is_sharded", "modules_of", "no_values", "parameters_of"]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters, or of its buffers if it has none."""
    held = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if held is None else held.device


def is_sharded(module: nn.Module) -> bool:
    """Return True if a module gathers its parameters in every forward (FSDP), which gives them other memory."""
    return _is_sharded(type(module))


@functools.lru_cache(4096)
def _is_sharded(cls: type) -> bool:
    return any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in cls.__mro__)


def is_lazy(model: nn.Module) -> bool:
    """Return True if a parameter or buffer gets its shape in the first forward (``nn.LazyLinear``)."""
    return any(map(nn.parameter.is_lazy, itertools.chain(model.parameters(), model.buffers())))


def no_values(model: nn.Module) -> str | None:
    """Return the reason why nothing can be checked by values, for a model on the meta device or in FakeTensorMode."""
    first = next(model.parameters(), None)
    if first is None or not without_values(first):
        return None
    return "its parameters have a shape only (meta device, FakeTensorMode). Use engine='exact', which reads no values"


def modules_of(*roots: Any, passed: Iterable[Any] = ()) -> list[nn.Module]:
    """Return the modules of a model and of what computes its loss, each once; see :class:`Reachable`."""
    return Reachable(*roots, passed=passed).modules


def parameters_of(model: nn.Module, beside: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of a model, and of modules beside it under the given prefixes, each once, with its name."""
    found = {id(each): (name, each) for name, each in model.named_parameters()}
    for prefix, module in beside:  # two of them may share their parameters, as per_sample's do
        for name, each in module.named_parameters(prefix, recurse=False):
            found.setdefault(id(each), (name, each))
    return list(found.values())
