"""TF32 is seen, and switched off, through torch's older and newer switches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from batchtrim.engine.precision import full_float32, uses_tf32

GPU = torch.device("cuda")


@pytest.fixture
def switches() -> Iterator[None]:
    with full_float32():  # and puts back what a test changes
        yield


@pytest.mark.usefixtures("switches")
@pytest.mark.filterwarnings("ignore:Please use the new API")  # torch 2.9's own
def test_tf32_is_seen_through_torchs_older_and_newer_switches() -> None:
    assert not uses_tf32(GPU)
    torch.backends.cudnn.allow_tf32 = True
    assert uses_tf32(GPU)
    assert not uses_tf32(torch.device("cpu"))
    with full_float32():
        assert not uses_tf32(GPU)
    assert uses_tf32(GPU)


@pytest.mark.usefixtures("switches")
@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch 2.9 has the newer switches")
def test_mixed_switches_raise_nothing() -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        _ = torch.backends.cudnn.allow_tf32  # what the older switch does then
    assert uses_tf32(GPU)
    with full_float32():
        assert not uses_tf32(GPU)
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
