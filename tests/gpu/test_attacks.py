"""No engine is silently wrong on a GPU either: the attacks of ``tests/engine``, each in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import attack_worker
import pytest
import torch
from attacks import ATTACKS

JOBS = int(os.environ.get("BATCHTRIM_TEST_JOBS", "4"))
# A file for every verdict and its reason; attacks that it already has are not run again.
OUT = os.environ.get("BATCHTRIM_TEST_OUT")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_attacks(device: torch.device, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "attack_worker", "batchtrim.engine.shared", "batchtrim.engine.cost"])
    with context.Pool(JOBS, maxtasksperchild=1) as pool:
        rows = json.loads(Path(OUT).read_text()) if OUT and Path(OUT).exists() else []
        left = ATTACKS.keys() - {row[0] for row in rows}
        calls = [(name, pool.apply_async(attack_worker.verdicts, (name, device.type))) for name in sorted(left)]
        for name, call in calls:
            try:
                rows += call.get(timeout=240)
            except multiprocessing.TimeoutError:
                rows.append((name, "", "not run", "its process ended, or takes too long"))
            if OUT:
                Path(OUT).write_text(json.dumps(rows))
    counts = Counter((engine, verdict) for _, engine, verdict, _ in rows)
    print(dict(counts))
    assert not [row for row in rows if row[2] == "wrong"]
    assert sum(row[2] == "right" for row in rows) > len(ATTACKS) // 2
