"""Trace the speech models of transformers, which set ``requires_grad`` of their input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

__all__ = ["speech_encoders", "without_input_gradient"]


def speech_encoders(model: nn.Module) -> list[nn.Module]:
    """Return the feature encoders of transformers' speech models, as wav2vec2 has one."""
    return [
        each
        for each in model.modules()
        if type(each).__module__.startswith("transformers.") and "_requires_grad" in vars(each)
    ]


@contextlib.contextmanager
def without_input_gradient(encoders: Sequence[Any]) -> Iterator[None]:
    """Have speech encoders leave ``requires_grad`` of their input alone, which no trace can follow.

    They set it for reentrant checkpoints. Nothing reads the gradient.
    """
    setting = [each for each in encoders if each._requires_grad]
    for each in setting:
        each._requires_grad = False
    try:
        yield
    finally:
        for each in setting:
            each._requires_grad = True
