"""Run one attack of ``tests/engine/attacks`` with every engine on a device, in a process of its own.

An index that is out of range leaves a process without a GPU for good.
"""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import torch
from attacks import ATTACKS

from batchtrim.engine.auto import AutoEngine
from batchtrim.engine.cost import Forecast
from batchtrim.testing import check_engine

ENGINES = ("two_pass", "shared", "auto")


def verdicts(name: str, device: str) -> list[tuple[str, str, str, str]]:
    """Return attack, engine, verdict and reason for each engine; "not run" where no plain step trains there."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    AutoEngine.forecast = Forecast(math.inf, 0.0)  # traces even what is too small for that to pay
    attack, found = ATTACKS[name], []
    start = time.monotonic()
    try:
        torch.set_default_device(device)  # what an attack makes itself lies there too
        model, loss = attack.make(), attack.loss()
        model = model.to(device)
        first, *more = attack.batches()
        options: dict[str, Any] = {"more": more, "verbose": False, **attack.options}
        exact = check_engine(model, first, loss, engine="exact", steps=3, **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return [(name, engine, "not run", reason) for engine in ENGINES]
    if exact.verdict != "right":
        return [(name, engine, "not run", f"two plain steps differ: {exact}") for engine in ENGINES]
    for engine in ENGINES:
        torch._dynamo.reset()
        try:
            report = check_engine(model, first, loss, engine=engine, steps=9, **options)
            found.append((name, engine, report.verdict, str(report)))
        except Exception as error:
            found.append((name, engine, "wrong", f"{type(error).__name__}: {error}"))
        if time.monotonic() - start > 60:
            break
    return found
