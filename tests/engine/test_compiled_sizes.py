"""What Inductor assumes of sizes is checked in each step, also for graphs from its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from harness import BATCH, compiled, near, stepper, whole_and_kept


@pytest.mark.slow
def test_assumptions_on_a_size_are_checked(compiles: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    inner = torch._inductor.compile_fx.compile_fx_inner

    def assuming(graph: Any, inputs: list[Any], **options: Any) -> Any:
        rows = inputs[1]
        if options["is_backward"]:
            assert bool(rows.shape[0] <= 6) in (True, False)  # a guard on k, as Inductor's own
        return inner(graph, inputs, **options)

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx_inner", assuming)
    step = stepper(compiled(lambda: zoo.Mlp(8)))
    for keep in (0.4, 0.4, 0.3, 0.8, 0.9, 0.4):
        near(*whole_and_kept(step, zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)), keep))
    assert compiles == [False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("compiles", ["inductor"], indirect=True)
def test_a_second_run_takes_compiled_graphs_and_their_assumptions_from_the_cache(
    compiles: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inner = torch._inductor.compile_fx.compile_fx_inner

    def assuming(graph: Any, inputs: list[Any], **options: Any) -> Any:
        if options["is_backward"]:
            assert bool(inputs[1].shape[0] <= 6) in (True, False)  # a guard on k, as Inductor's own
        return inner(graph, inputs, **options)

    def run() -> dict[str, int]:
        compiles.clear()
        counters.clear()
        step = stepper(compiled(lambda: zoo.Mlp(8)))
        for keep in (0.4, 0.4, 0.9):
            near(*whole_and_kept(step, zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)), keep))
        assert compiles == [False, True, True]
        return {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}

    with monkeypatch.context() as patch:
        patch.setattr(torch._inductor.compile_fx, "compile_fx_inner", assuming)
        assert run() == {"hit": 0, "miss": 3, "bypass": 0}
    torch._dynamo.reset()
    assert run() == {"hit": 3, "miss": 0, "bypass": 0}
