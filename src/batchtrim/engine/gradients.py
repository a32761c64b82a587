"""Ask for a gradient that is not part of the training, and leave no trace of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["gradients_without_hooks"]


def gradients_without_hooks(
    losses: Tensor, tensors: Sequence[Tensor], weights: Tensor, *, keep: bool
) -> list[Tensor | None]:
    """Return the gradient of ``sum(weights * losses)`` for each tensor; hooks of these do not see it.

    Args:
        keep: keep the graph for another backward.
    """
    with _without_hooks(tensors):
        found = torch.autograd.grad(losses, tensors, weights, retain_graph=keep, allow_unused=True)
    return [each.to_dense() if each is not None and each.is_sparse else each for each in found]


@contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    held = [(each._backward_hooks, dict(each._backward_hooks)) for each in tensors if each._backward_hooks]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)
