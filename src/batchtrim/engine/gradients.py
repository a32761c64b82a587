"""Ask for a gradient that is not part of the training, and leave no trace of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from batchtrim.engine.contents import in_double

__all__ = ["cosine_between", "dense", "distance", "gradients_without_hooks", "without_hooks"]

_SMALL = 1e-2  # a gradient below this share of the whole is judged against the share


def gradients_without_hooks(
    losses: Tensor, tensors: Sequence[Tensor], weights: Tensor, *, keep: bool
) -> list[Tensor | None]:
    """Return the gradient of ``sum(weights * losses)`` for each tensor; hooks of these do not see it.

    A backward inside of the backward (of a reversible block) adds to ``.grad``, which is part of what is returned.

    Args:
        keep: keep the graph for another backward.
    """
    leaves = [each for each in tensors if each.is_leaf]
    held = [each.grad for each in leaves]
    try:
        for each in leaves:
            each.grad = None
        with without_hooks(tensors):
            found = torch.autograd.grad(losses, tensors, weights, retain_graph=keep, allow_unused=True)
        added = [each.grad if each.is_leaf else None for each in tensors]
    finally:
        for each, was in zip(leaves, held, strict=True):
            each.grad = was
    return [_sum(*parts) for parts in zip(found, added, strict=True)]


def _sum(*gradients: Tensor | None) -> Tensor | None:
    parts = [dense(each) for each in gradients if each is not None]
    return sum(parts[1:], parts[0]) if parts else None


def dense(gradient: Tensor) -> Tensor:
    """Return a gradient as a dense tensor; an embedding may have a sparse one."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def distance(exact: Tensor, other: Tensor, whole: float) -> float:
    """Return how far a gradient is off, relative to its norm or to a hundredth of ``whole``, the norm of all."""
    off, size = in_double(exact - other.detach()).norm(), max(float(in_double(exact).norm()), _SMALL * whole)
    return float(off) / size if size else math.inf if off else 0.0


def cosine_between(one: Tensor, other: Tensor) -> float:
    """Return the cosine between two vectors; a complex number counts as two real ones."""
    one, other = (torch.view_as_real(each).flatten() if each.is_complex() else each for each in (one, other))
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Call no hook of these tensors inside the block."""
    all_hooks = (hooks for each in tensors for hooks in (each._backward_hooks, each._post_accumulate_grad_hooks))
    held = [(hooks, dict(hooks)) for hooks in all_hooks if hooks]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)
