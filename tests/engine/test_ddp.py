"""The engines under DistributedDataParallel: two real processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import error


@pytest.mark.slow
def test_engines_agree_on_two_ranks(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, str(here / "ddp_worker.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])}
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for engine in ("shared", "two_pass"):
        for scope in ("local", "global"):
            own, other = first[f"{engine} {scope}"], second[f"{engine} {scope}"]
            assert torch.equal(own[: len(other)], other), "gradients are averaged over the ranks"
            assert error(first[f"exact {scope}"], own) <= 1e-5
