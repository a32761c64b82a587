"""Tests of what only a GPU can show; skipped where there is none.

``BATCHTRIM_TEST_DEVICE=cpu`` runs them on the CPU, which tries the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from batchtrim.engine.precision import full_float32


@pytest.fixture
def device() -> torch.device:
    return torch.device(os.environ.get("BATCHTRIM_TEST_DEVICE", "cuda"))


@pytest.fixture(autouse=True)
def _on_a_gpu(device: torch.device) -> Iterator[None]:
    """Skip without a GPU; with one, compute in full float32 and by deterministic algorithms where there are any."""
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch._dynamo.reset()
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    with full_float32():
        yield
    torch.backends.cudnn.deterministic = deterministic
