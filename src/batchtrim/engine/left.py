"""Compare what two sides leave in ``.grad`` besides its values: what lies where, and of which kind it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

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
    spans = sorted(
        (*span, name) for name, each in (*others.items(), *tensors.items()) if (span := _span(each)) is not None
    )
    found: set[tuple[str, str]] = set()
    reach, last = -1, ""  # the span so far that ends last
    for start, end, name in spans:
        if start < reach and not (name in others and last in others):
            found.add((last, name))
        if end > reach:
            reach, last = end, name
    return found


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """Return the addresses between which a tensor lies, if it has any."""
    if tensor.layout != torch.strided or not tensor.numel() or tensor.untyped_storage().nbytes() == 0:
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # without data
        return None
    if not start:  # made of other tensors
        return None
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return start, start + tensor.element_size() * (1 + sum((size - 1) * stride for size, stride in steps))
