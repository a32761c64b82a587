"""Measure the peak memory of a step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


def peak_memory(step: Callable[[], Any]) -> float:
    """Return by how many MiB memory rises at the peak of a step: resident memory, or the allocator's on a GPU."""
    step()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return max(_allocated_peak(step) for _ in range(2))


def _allocated_peak(step: Callable[[], Any]) -> float:
    """Return the peak of bytes allocated by tensors, from the profiler: resident memory lags behind."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20
