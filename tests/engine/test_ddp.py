"""The engines under DistributedDataParallel: two real processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import error

from launch import run_ranks


@pytest.mark.slow
def test_engines_agree_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(Path(__file__).parent / "ddp_worker.py", 2, tmp_path, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    runs = [(engine, scope, 1e-5) for engine in ("shared", "two_pass") for scope in ("local", "global")]
    for engine, scope, near in (*runs, ("shared", "fabric", 1e-2)):  # Fabric's run rounds to bfloat16
        own, other = first[f"{engine} {scope}"], second[f"{engine} {scope}"]
        assert torch.equal(own[: len(other)], other), "gradients are averaged over the ranks"
        assert error(first[f"exact {scope}"], own) <= near
    for engine in ("shared", "two_pass"):
        own, other = first[f"apart {engine}"], second[f"apart {engine}"]
        assert torch.equal(own[:-64], other[:-64])
        assert error(first["apart exact"], own) <= 1e-5
