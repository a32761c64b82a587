"""Changes between two steps, or around a step, not all of which the guards of a trace see."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import batchtrim
from batchtrim.engine.auto import AutoEngine
from batchtrim.engine.cost import Forecast
from batchtrim.errors import EngineFallback, EngineRefused
from tiers import few

MODULES = nn.modules.module
BATCH = 12


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), zoo.Part(), nn.Linear(8, 5))


def _cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out, y, reduction="none")


def _batch(number: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100 + number)
    return torch.randn(size, 6), torch.randint(0, 5, (size,))


@contextmanager
def _method_replaced() -> Iterator[None]:
    method, zoo.Part.forward = zoo.Part.forward, zoo.Part.squashed
    try:
        yield
    finally:
        zoo.Part.forward = method


@contextmanager
def _hooked(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def _doubled(module: nn.Module, given: Any, out: Any) -> Any:
    return out * 2 if isinstance(module, nn.Linear) else None


def _centred(module: nn.Module, given: Any) -> Any:
    return (given[0] - given[0].mean(0),) if isinstance(module, zoo.Part) else None


CHANGES: dict[str, Callable[[], Any]] = {
    "method": _method_replaced,
    "hook": lambda: _hooked(MODULES.register_module_forward_hook, _doubled),
    "hook in front": lambda: _hooked(MODULES.register_module_forward_pre_hook, _centred),
}


def _losses_and_gradients(engine: str, change: Callable[[], Any]) -> list[Tensor]:
    model = _model()
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine)
    found: list[Tensor] = []

    def run(number: int) -> None:
        model.zero_grad()
        step(*_batch(number)).backward()
        found.extend([step.last.losses, *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]

    run(0)
    with change():
        run(1)
    return found


@pytest.mark.parametrize("change", few(CHANGES, ["method"]))
def test_a_change_that_no_guard_sees_is_seen(change: str) -> None:
    torch.testing.assert_close(
        _losses_and_gradients("shared", CHANGES[change]), _losses_and_gradients("exact", CHANGES[change])
    )


@pytest.mark.slow
def test_a_backward_hook_on_all_modules_is_refused() -> None:
    step = batchtrim.TrimmedForward(_model(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    step(*_batch(0))
    with (
        _hooked(MODULES.register_module_full_backward_hook, lambda *_: None),
        pytest.raises(EngineRefused, match="backwards hooks"),
    ):
        step(*_batch(1))


@pytest.mark.slow
def test_classes_that_change_in_every_step_are_refused() -> None:
    step = batchtrim.TrimmedForward(_model(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    step.engine._reset = lambda: setattr(step.engine, "resets", step.engine.resets + 1)  # type: ignore[attr-defined, method-assign]
    step.engine.unguarded.changed = lambda: "its loss"  # type: ignore[attr-defined]
    for number in range(4):
        step(*_batch(number))
    with pytest.raises(EngineRefused, match="its loss changes from step to step"):
        step(*_batch(4))


@pytest.mark.slow
def test_another_loss_is_traced_too() -> None:
    step = batchtrim.TrimmedForward(_model(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    step(*_batch(0))
    before = step.last.losses  # type: ignore[union-attr]
    plain = step.forward.per_sample_loss
    step.forward.per_sample_loss = lambda out, y: 3 * plain(out, y).values
    step(*_batch(0))
    torch.testing.assert_close(step.last.losses, 3 * before)  # type: ignore[union-attr]


# --- around one step -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("around", "reason"),
    [
        (lambda: FlopCounterMode(display=False), "a mode that sees every operator is active"),
        pytest.param(torch.autograd.graph.save_on_cpu, "hooks on saved tensors are active", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_traced_in_one_step_is_not_given_up(around: Callable[[], Any], reason: str) -> None:
    model = _model()
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    auto = AutoEngine(step.forward, step.trim)
    auto.saving, auto._open, auto._explained = step.engine, False, True
    auto.pays = lambda x, y: True  # type: ignore[method-assign]
    auto.forecast = Forecast(1.0, 0.0)
    engines = [auto(*_batch(0)).engine]
    for _ in range(2):
        with around():
            with pytest.raises(EngineRefused, match=reason):
                step(*_batch(1))
            if len(engines) == 1:
                with pytest.warns(EngineFallback, match=f"{reason}.*This step runs with engine='exact'"):
                    engines.append(auto(*_batch(1)).engine)
            else:
                engines.append(auto(*_batch(1)).engine)
    engines.append(auto(*_batch(2)).engine)
    assert engines == ["shared", "exact", "exact", "shared"]


@pytest.mark.parametrize("engine", few(["two_pass", "shared"], ["two_pass"]))
def test_a_step_runs_while_another_thread_compiles(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compiler.is_compiling()`` is then True in all threads."""
    model = _model()
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    step(*_batch(0)).backward()
    assert step.forward.model is model
    assert step.last is not None
    assert step.last.engine == engine


@pytest.mark.slow
def test_a_batch_size_that_needs_its_own_trace_runs_exactly() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.t = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            return self.t(z + z.t() if z.shape[0] == 8 else z)

    step = batchtrim.TrimmedForward(Square(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    engines = []
    for number, size in enumerate((12, 8, 10, 8)):
        step(*_batch(number, size)).backward()
        engines.append(step.last.engine)  # type: ignore[union-attr]
    assert engines == ["shared", "exact", "shared", "exact"]


# --- errors of the model itself --------------------------------------------------------------------------------------


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.fails = 0, False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1 if self.fails else 0
        self.seen += 1
        if self.fails:
            raise ValueError("a bad day")
        return self.layer(nn.functional.dropout(x, 0.1, self.training))


@pytest.mark.parametrize("how", few(["raises", "labels"], ["labels"]))
def test_after_an_error_of_the_model_the_state_is_that_of_a_plain_step(how: str) -> None:
    """A program that leaves a bad batch out goes on with buffers and generators as in plain training."""
    found = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        model = Failing()
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine)
        step(*_batch(0))
        x, y = _batch(1)
        model.fails = how == "raises"
        with pytest.raises((ValueError, IndexError)) as error:
            step(x, y + 100)
        found.append((str(error.value), float(model.seen), model.calls, torch.get_rng_state().tolist()))
        model.fails = False
        step(*_batch(2))
        found[-1] += (float(model.seen),)
    assert found[0] == found[1]


def test_python_numbers_of_the_first_step_are_drawn_once() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * random.uniform(0.5, 1.5)

    found = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        step = batchtrim.TrimmedForward(Scaled(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine)
        random.seed(0)
        step(*_batch(0))
        found.append((step.last.losses.tolist(), random.random()))  # type: ignore[union-attr]
    assert found[0][1] == found[1][1]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)


# --- what the model keeps --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "ask", [lambda z: z.register_hook(lambda g: None), pytest.param(lambda z: z.retain_grad(), marks=pytest.mark.slow)]
)
def test_asking_for_the_gradient_of_a_kept_tensor_is_an_error(ask: Callable[[Tensor], Any]) -> None:
    """It would be asked in vain: the gradient of the loss stays inside the trace."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.first(x)
            return self.last(self.kept)

    model = Keeping()
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    loss = step(*_batch(0))
    ask(model.kept)
    with pytest.raises(RuntimeError, match=r"no hook and no retain_grad\(\) on a tensor \(12, 8\).*engine='exact'"):
        loss.backward()


class Exponential(nn.Module):
    """Returns features that its backward reads on all rows, for they are centred; writes into its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.first(x.mul_(2)).exp()
        return self.last((z - z.mean(0)) * z), z


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of a batch that is no leaf
def test_outputs_that_backward_reads_may_not_change_and_a_batch_with_a_graph_keeps_it() -> None:
    found = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        model, weight = Exponential(), nn.Parameter(torch.randn(6, 6) / 9)
        step = batchtrim.TrimmedForward(model, lambda out, y: _cross_entropy(out[0], y), batchtrim.Trimmer(0.5), engine)
        x, y = _batch(0)
        step((x @ weight).clone(), y).backward()
        found.append(weight.grad)
        loss = step(*_batch(1))
        step.last.outputs[1].mul_(2)  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_a_trace_that_an_error_kept_from_being_compared_is_compared_later() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                self.seen += 1
            return self.layer(x)

    step = batchtrim.TrimmedForward(Moving(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    x, y = _batch(0)
    with pytest.raises(IndexError):
        step(x, y + 100)
    with pytest.raises(EngineRefused, match="differs from the model: it leaves another value of a buffer"):
        step(x, y)


@pytest.mark.slow
def test_several_losses_per_sample_in_one_dimension_are_refused() -> None:
    step = batchtrim.TrimmedForward(
        nn.Linear(6, 5),
        lambda out, y: nn.functional.cross_entropy(out.reshape(-1, 5), y.reshape(-1), reduction="none"),
        batchtrim.Trimmer(0.5),
        "shared",
    )
    with pytest.raises(EngineRefused, match=r"3 values for each sample, in one dimension\. Return them as \(B, 3\)"):
        step(torch.randn(BATCH, 3, 6), torch.randint(0, 5, (BATCH, 3)))
