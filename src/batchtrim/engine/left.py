"""Compare what two sides leave in ``.grad`` besides its values: what lies where, and of which kind it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from batchtrim.engine.memory import touching

__all__ = ["differences", "overlaps"]


def differences(own: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield how tensors that both sides have differ as objects, whatever they hold."""
    for name in own.keys() & plain.keys():
        for fact, ours, theirs in zip(_FACTS, _facts(own[name]), _facts(plain[name]), strict=True):
            if ours != theirs:
                yield f"{name} ({fact} {ours} instead of {theirs})"


_FACTS = ("dtype", "layout", "type", "strides", "requires_grad")


def _facts(tensor: Tensor) -> tuple[object, ...]:
    strides = None
    if tensor.layout == torch.strided:
        strides = tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    return tensor.dtype, tensor.layout, type(tensor).__name__, strides, tensor.requires_grad


def overlaps(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> set[tuple[str, str]]:
    """Return the pairs that share memory: of tensors, and of a tensor and one of the others."""
    pairs = touching({**others, **tensors})
    return {pair for pair in pairs if not others.keys() >= set(pair)}
