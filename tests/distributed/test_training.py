"""DDP, FSDP2 and Accelerate in two real processes. The cases are in train_worker.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import run_ranks

pytest.importorskip("accelerate")


@pytest.mark.slow
def test_gradients_are_those_of_the_joined_batch(tmp_path: Path) -> None:
    run_ranks(Path(__file__).parent / "train_worker.py", 2, tmp_path)
