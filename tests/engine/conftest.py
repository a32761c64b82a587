"""Shared by the tests of engines."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(params=["graphs", pytest.param("inductor", marks=pytest.mark.slow)])
def compiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Every compile of the engine's graphs in a test: True for a backward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, once a process
        from torch._inductor import compile_fx
    from uncompiled import Uncompiled

    from batchtrim.engine.inductor import Inductor

    torch._dynamo.reset()
    found: list[bool] = []
    if request.param == "graphs":
        monkeypatch.setattr(compile_fx, "compile_fx_inner", Uncompiled)
    compile_ = Inductor.compile

    def counted(self: Any, *args: Any, backward: bool, **options: Any) -> Any:
        found.append(backward)
        return compile_(self, *args, backward=backward, **options)

    monkeypatch.setattr(Inductor, "compile", counted)
    yield found
    torch._dynamo.reset()
