"""What a step and a trace are estimated to cost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import attacks  # noqa: F401  registers operators
import pytest
import torch
import zoo
from benchmarks.estimate_gpu import estimated, recorded
from torch import nn

import batchtrim
from batchtrim.engine.cost import Cost, Forecast, Machine, OperatorCount, machine_of
from batchtrim.engine.shared import WORTH
from tiers import few


def test_cost_of_a_step() -> None:
    cost = Cost(forward=1.0, upper=2.0, lower=0.0)
    assert cost.ratio(0.4) == pytest.approx((1 + 2 * 0.4) / 3)
    assert cost.share == 1.0
    cost = Cost(forward=1.0, upper=1.0, lower=1.0, cutting=0.1, overhead=0.05)
    assert cost.ratio(0.5) == pytest.approx((1 + 0.5 + 1 + 1.5 * 0.1 + 0.05) / 3)


def test_cost_of_a_step_on_a_gpu() -> None:
    """Python starts operators while the GPU computes, so the longer of both counts."""
    busy = Cost(forward=10.0, upper=20.0, python=8.0, python_cut=10.0)
    assert busy.ratio(0.4) == pytest.approx((1 + 2 * 0.4) / 3)
    assert not busy.waits_for_python(0.4)
    assert busy.ratio(0.0) == pytest.approx(1 / 3)
    waiting = Cost(forward=1.0, upper=2.0, python=8.0, python_cut=10.0)
    assert waiting.ratio(0.4) == pytest.approx(10 / 8)
    assert waiting.waits_for_python(0.4)
    between = Cost(forward=3.0, upper=6.0, python=4.0, python_cut=5.0)
    assert between.ratio(0.1) == pytest.approx(5 / 9)
    replayed = Cost(forward=1.0, upper=2.0, python=0.0, python_cut=10.0)
    assert replayed.ratio(0.4) == pytest.approx(10 / 3), "a plain step is a CUDA graph"


@pytest.mark.parametrize(
    ("name", "processors", "major", "speed"),
    [
        ("H200", 132, 9, 1.0),
        ("A100", 108, 8, 0.41),
        ("T4", 40, 7, 0.08),
        ("V100", 80, 7, 0.15),
        ("B200", 148, 10, 2.24),
    ],
)
def test_figures_of_a_gpu(
    name: str, processors: int, major: int, speed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(name=name, multi_processor_count=processors, major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    machine = machine_of(torch.device("cuda"))
    assert machine.bytes / 4e12 == pytest.approx(speed, abs=0.03)
    assert machine.products("mm", torch.bfloat16) == pytest.approx(5e14 * speed, rel=0.1)
    assert machine.products("mm", torch.float64) == machine.products("mm", torch.float32) == machine.flops, "no TF32"
    assert machine.products("convolution_backward", torch.float32) == pytest.approx(2.5e14 * speed, rel=0.1), "TF32"


def test_figures_of_other_devices() -> None:
    assert machine_of(torch.device("cpu")).python == 0.0, "Python waits for a CPU"
    assert machine_of(torch.device("mps")).python > 0.0


@pytest.mark.filterwarnings("ignore")  # torch's own, when it compiles first
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_pythons_time_in_a_traced_step(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Machine(flops=1e30, bytes=1e30, start=0.0, python=1.0)
    monkeypatch.setattr("batchtrim.engine.sliced.machine_of", lambda device: gpu)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
    found = {}
    for compiled in (False, True):
        if compiled:
            model.compile(mode=mode)
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
        step(zoo.vectors(8), torch.randint(0, 5, (8,)))
        found[compiled] = step.engine.trace.cost(True)  # type: ignore[union-attr]
    assert found[False].python >= 10, "linear, tanh, linear, log_softmax, nll_loss, and backward"
    assert found[False].python_cut == 1.5 * found[False].python
    products, gradients = 5, 4
    assert found[True].python_cut == 1.2 * 1.25 * (products + gradients)
    assert found[True].python == (0.0 if mode else 1.25 * (products + gradients)), "a CUDA graph is replayed"


def test_what_a_forward_is_counted_to_cost() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Flatten(0), nn.ReLU()), torch.ones(4, 8)
    with OperatorCount(Machine(flops=1e9, bytes=1e30, start=1.0)) as count:
        out = model(x)
    assert out.requires_grad
    assert count.operators >= 4, "t, addmm, view, relu"
    assert count.seconds == pytest.approx(2 + 2 * 4 * 8 * 16 / 1e9), "views are free"


@pytest.mark.filterwarnings("ignore")  # torch's own, of nested tensors
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_can_be_counted(layout: torch.layout) -> None:
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    with OperatorCount(Machine(1e9, 1e6, 0.0)) as count:
        nested = torch.nested.nested_tensor(parts, layout=layout)
        nn.functional.linear(nested, torch.randn(5, 3)).tanh()
    assert count.seconds >= 6 * 5 * 4 / 1e6  # what tanh writes


def test_operators_of_other_libraries_can_be_counted() -> None:
    with OperatorCount(Machine(1e9, 1e6, 0.0)) as count:
        torch.ops.attacks.linear_attention(torch.ones(4))
        torch.ops.attacks.convolution(torch.ones(4))
    assert count.operators >= 2


def test_what_a_trace_is_worth() -> None:
    assert Forecast(step=1.0, trace=40.0).pays(0.4), "100 steps of 0.6 and the trace: 100"
    assert not Forecast(step=1.0, trace=45.0).pays(0.4)
    assert Forecast(step=1.0, trace=45.0).pays(0.2), "100 steps of 0.47 and the trace: 92"
    assert not Forecast(step=1.0, trace=45.0, cutting=0.1).pays(0.2), "100 steps of 0.59 and the trace: 104"
    assert not Forecast(step=1.0, trace=3.0).pays(1.0)


RECORD = Path(__file__).parents[2] / "records/2026-11-26-engine-gpu"
CASES = list(recorded(RECORD / f"{name}.json" for name in ("third", "compiled-bf16", "bert-256")))


@pytest.mark.filterwarnings("ignore")  # torch's own, when it compiles first
@pytest.mark.parametrize("case", few(range(len(CASES)), []))
def test_auto_would_have_chosen_well_on_a_gpu(case: int) -> None:
    """Where a step waited for Python, `shared` took 0.98 to 1.23 of a plain step, and `auto` ran it."""
    cost = estimated(CASES[case])
    for row in CASES[case]["rows"]:
        cuts, measured = cost.ratio(row["keep"]) < WORTH, row["ratios"]["shared"]
        assert measured <= 1.0 if cuts else measured >= 0.85
