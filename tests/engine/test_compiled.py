"""Models that the user compiled: their graphs run compiled, with the gradient of the exact engine.

By default the graphs that would be compiled run as they are, in what memory layout the operators leave; the slow tests
have Inductor compile them, which takes a C++ compiler and seconds each.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from harness import BATCH, compiled, error, gradient, near, seeded, stepper, train, whole_and_kept
from torch import Tensor, nn

import batchtrim
from batchtrim.engine import inductor
from batchtrim.engine.auto import AutoEngine
from batchtrim.errors import ApproximateGradient, EngineFallback
from batchtrim.testing import check_engine
from tiers import few, in_part

pytestmark = pytest.mark.usefixtures("compiles")
GROUP = lambda width: nn.GroupNorm(2, width)  # noqa: E731

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "mlp": (lambda: zoo.Mlp(8), zoo.vectors),
    "group_norm": (lambda: zoo.Residual(GROUP), zoo.images),
    "encoder": (lambda: zoo.Encoder(True, 0.0, 1), zoo.tokens),
    "time_major": (lambda: zoo.Encoder(False, 0.0, 1), zoo.tokens),
    "dropout": (lambda: zoo.Encoder(True, 0.2, 1), zoo.tokens),
    "mlp_dropout": (lambda: zoo.Mlp(8, 0.3), zoo.vectors),
    "tied": (zoo.Tied, zoo.tokens),
    "batch_mean": (zoo.BatchMean, zoo.vectors),
    "batch_attention": (zoo.BatchAttention, zoo.vectors),
    "shuffled": (zoo.Shuffled, zoo.vectors),
    "counter": (zoo.Counter, zoo.vectors),
}


@pytest.fixture
def outer(request: pytest.FixtureRequest) -> str:  # the backend of what a test compiles around a step
    return {"graphs": "aot_eager", "inductor": "inductor"}[request.node.callspec.params["compiles"]]


MIXING = ("batch_mean", "batch_attention", "shuffled")
SAME_NUMBERS = [name for name in NETWORKS if "dropout" not in name]  # Inductor draws others


WAYS = [(name, way) for name in NETWORKS for way in ("graphs", "inductor")]
WAYS.remove(("dropout", "inductor"))  # half a minute; mlp_dropout has Inductor's dropout


@pytest.mark.slow
@pytest.mark.parametrize(("name", "compiles"), in_part(WAYS), indirect=["compiles"])
def test_equals_backward_on_all_rows(name: str, compiles: list[bool]) -> None:
    make, data = NETWORKS[name]
    step = stepper(compiled(make))
    for batch in (BATCH, BATCH, 7, BATCH):
        near(*whole_and_kept(step, data(batch), torch.randint(0, 5, (batch,))))
    assert sorted(compiles) == [False, True]
    step(data(BATCH), torch.randint(0, 5, (BATCH,)))
    assert (step.engine.trace.mixing(True) is None) is (name not in MIXING)


@pytest.mark.parametrize("name", few(SAME_NUMBERS, []))
def test_equals_the_exact_engine_in_training(name: str, compiles: list[bool]) -> None:
    """By default the next test holds a smaller part against it."""
    make, data = NETWORKS[name]
    exact = train(make, data, "exact", steps=4)
    shared = train(lambda: compiled(make), data, "shared", steps=4)
    assert compiles == [False, True]
    assert shared.chosen == exact.chosen
    assert shared.step.last.engine == "shared"
    for ours, theirs in zip(shared.gradients, exact.gradients, strict=True):
        assert error(theirs, ours) <= 1e-5
    torch.testing.assert_close(shared.buffers, exact.buffers)
    for ours, theirs in zip(shared.generators, exact.generators, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", few(["mlp", "group_norm"], ["mlp"]))
def test_neither_another_k_nor_an_odd_last_batch_is_compiled_again(name: str, compiles: list[bool]) -> None:
    make, data = NETWORKS[name]
    model = compiled(make)
    trim = batchtrim.Trimmer(batchtrim.linear(0.9, 0.1), total=10)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), trim, "shared")
    twin = copy.deepcopy(model)
    exact = batchtrim.TrimmedForward(twin, nn.CrossEntropyLoss(), batchtrim.Trimmer(1.0), "exact")
    for batch in (14, 14, 9, 14, 14, 9, 14, 5):
        x, y = data(batch), torch.randint(0, 5, (batch,))
        model.zero_grad()
        twin.zero_grad()
        step(x, y).backward()
        losses, _ = exact.forward(x, y, model=twin._call_impl)  # the model's own Python
        losses.values[step.last.selection.indices].mean().backward()
        assert error(gradient(twin), gradient(model)) <= 1e-5
        trim.step()
    assert step.engine.capture.traces == 1
    assert compiles == [False, True]


@pytest.mark.slow
def test_one_row_and_nearly_all(compiles: list[bool]) -> None:
    step = stepper(compiled(lambda: zoo.Mlp(8)))
    for keep in (0.4, 0.4, 0.01, 0.99, 1.0):
        near(*whole_and_kept(step, zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)), keep))
    assert compiles == [False, True]


@pytest.mark.slow  # by default test_auto.py has both on a plain model
@pytest.mark.parametrize("approximate", [True, False])
def test_batch_norm_in_both_forms(approximate: bool, compiles: list[bool]) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 5))

    runs = []
    for compile_ in (False, True):
        model = compiled(make) if compile_ else seeded(make)
        step = stepper(model)
        step.engine.approximate = approximate
        found = []
        for number in range(3):
            torch.manual_seed(number)
            model.zero_grad()
            step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
            found.append((gradient(model), [b.clone() for b in model.buffers()]))
        runs.append(found)
        assert bool(step.last.approximate) is approximate
    for (exact, buffers), (ours, own_buffers) in zip(*runs, strict=True):
        assert error(exact, ours) <= 1e-5
        torch.testing.assert_close(own_buffers, buffers)
    assert compiles == [False, True]


@pytest.mark.slow  # by default test_auto.py measures it on a plain model
def test_the_cosine_of_batch_norm_is_measured(compiles: list[bool]) -> None:
    model = compiled(lambda: nn.Sequential(nn.Linear(8, 512), nn.BatchNorm1d(512), nn.Tanh(), nn.Linear(512, 512)))
    step = stepper(model, "auto", 0.2)
    with pytest.warns(ApproximateGradient, match="cosine"):
        step(zoo.vectors(128), torch.randint(0, 5, (128,))).backward()
    for _ in range(2):
        step(zoo.vectors(128), torch.randint(0, 5, (128,))).backward()
    assert step.last.engine == "shared"
    assert compiles == [False, True]


@pytest.mark.slow
def test_autocast_is_near_a_whole_backward(compiles: list[bool]) -> None:
    step = stepper(compiled(lambda: zoo.Residual(GROUP)))
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            whole, kept = whole_and_kept(step, zoo.images(BATCH), torch.randint(0, 5, (BATCH,)))
        near(whole, kept, 5e-2)
    assert compiles == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shift", "compiles"), [(False, "graphs"), (True, "graphs"), (True, "inductor")], indirect=["compiles"]
)
def test_kept_tokens_of_a_compiled_model_equal_exact(shift: bool, compiles: list[bool]) -> None:
    """By default test_tokens.py has them, on a plain model."""
    torch.manual_seed(0)
    model = zoo.LanguageModel(30, layers=1)
    twin = copy.deepcopy(model)
    model.compile()
    loss = functools.partial(batchtrim.token_losses, shift=shift)
    steps = [
        batchtrim.TrimmedForward(each, loss, batchtrim.Trimmer(0.4, unit="element"), engine)
        for each, engine in ((twin, "exact"), (model, "shared"))
    ]
    for size, length in ((6, 9), (6, 9), (4, 9), (5, 7)):
        x = torch.randint(0, 30, (size, length))
        y = x.clone()
        y[0, length // 3 :] = -100
        for step in steps:
            step.forward.model.zero_grad()
            step(x, y).backward()
        assert error(gradient(twin), gradient(model)) <= 1e-5
    assert "attention" in steps[1].engine.trace.mixing(True)[0]
    assert compiles == [False, True]


@pytest.mark.slow
def test_accumulation_and_backward_twice() -> None:
    model = compiled(lambda: zoo.Mlp(8))
    twin = copy.deepcopy(model)
    steps = [stepper(twin, "exact"), stepper(model)]
    batches = [(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))) for _ in range(3)]
    for step in steps:
        for _ in range(2):
            step.forward.model.zero_grad()
            losses = [step(*batch) for batch in batches]  # all forwards before the first backward
            for loss in losses:
                loss.backward(retain_graph=True)
            losses[0].backward()
    assert error(gradient(twin), gradient(model)) <= 1e-5


@pytest.mark.slow  # by default test_shared.py has it on a plain model
def test_a_batch_changed_between_forward_and_backward_does_not_change_the_gradient() -> None:
    model = compiled(lambda: zoo.Mlp(8))
    step = stepper(model)
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    parameters = list(model.parameters())
    for _ in range(3):
        expected = torch.autograd.grad(step(x, y), parameters)
        loss = step(x, y)
        kept = x.clone()
        x.zero_()
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected)
        x.copy_(kept)


@pytest.mark.slow
def test_outputs_changed_between_forward_and_backward_are_noticed() -> None:
    step = stepper(compiled(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5), nn.Sigmoid())))
    for _ in range(3):
        loss = step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))
        if step.engine.trace is None or step.engine.trace.runs < 3:
            continue  # operator by operator, what is read was cut by now
        step.last.outputs.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.slow
def test_what_inductor_does_not_compile_runs_operator_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx_inner", fails)
    exact = train(lambda: zoo.Mlp(8), zoo.vectors, "exact", steps=4)
    with pytest.warns(EngineFallback, match=r"RuntimeError: no C\+\+ compiler") as told:
        shared = train(lambda: compiled(lambda: zoo.Mlp(8)), zoo.vectors, "shared", steps=4)
    assert sum(issubclass(each.category, EngineFallback) for each in told) == 1
    with pytest.raises(EngineFallback):  # warnings are errors here; the engine took it for a trace that fails
        train(lambda: compiled(lambda: zoo.Mlp(8)), zoo.vectors, "shared", steps=4)
    for ours, theirs in zip(shared.gradients, exact.gradients, strict=True):
        assert error(theirs, ours) <= 1e-5


@pytest.mark.slow  # by default neither of the two graphs is compiled
@pytest.mark.parametrize("name", ["mlp", "group_norm"])
def test_a_backward_that_is_not_compiled_runs_operator_by_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, data = NETWORKS[name]
    compile_ = inductor.Inductor.compile

    def forward_alone(self: Any, *args: Any, backward: bool, **options: Any) -> Any:
        if backward:
            raise inductor.CannotCompile("planted")
        return compile_(self, *args, backward=backward, **options)

    monkeypatch.setattr(inductor.Inductor, "compile", forward_alone)
    exact = train(make, data, "exact", steps=4)
    with pytest.warns(EngineFallback, match="planted"):
        shared = train(lambda: compiled(make), data, "shared", steps=4)
    for ours, theirs in zip(shared.gradients, exact.gradients, strict=True):
        assert error(theirs, ours) <= 1e-5


@pytest.mark.slow
def test_a_compiled_part_and_options(compiles: list[bool]) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.compile(zoo.Mlp(8), options={"max_fusion_size": 7})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    assert inductor.inductor_of(Outer()).options == {"max_fusion_size": 7}  # type: ignore[union-attr]
    assert inductor.inductor_of(zoo.Mlp(8)) is None
    assert inductor.inductor_of(torch.compile(zoo.Mlp(8), backend="aot_eager")) is None  # type: ignore[arg-type]
    graphs = torch.compile(zoo.Mlp(8), mode="reduce-overhead")
    assert inductor.inductor_of(graphs).options == {}  # type: ignore[arg-type, union-attr]
    in_place = zoo.Mlp(8)
    in_place.compile(options={"max_fusion_size": 7})
    with torch._inductor.config.patch(fallback_random=True):  # set later, and no option of the model's
        assert inductor.inductor_of(in_place).options == {"max_fusion_size": 7}  # type: ignore[union-attr]
    step = stepper(Outer())
    for _ in range(3):
        near(*whole_and_kept(step, zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))))
    assert compiles == [False, True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CUTLASS backend")  # torch 2.12's own, in a build with CUDA
def test_a_wrapper_in_cpp_calls_the_kernels_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's outer function sets this apart from the other options, and passes it on by itself."""
    whole, asked = torch._inductor.compile_fx.compile_fx_inner, []

    def inner(*args: Any, **options: Any) -> Any:
        asked.append(options.get("cpp_wrapper"))
        return whole(*args, **options)

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx_inner", inner)
    step = stepper(torch.compile(zoo.Mlp(8), options={"cpp_wrapper": True}))
    for size in (BATCH, BATCH, BATCH, BATCH - 3, BATCH + 7):
        near(*whole_and_kept(step, zoo.vectors(size), torch.randint(0, 5, (size,))))
    assert asked == [True, True]


@pytest.mark.slow  # by default another test compiles the model
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, of its own look at a loss
@pytest.mark.parametrize("engine", few(["shared", "auto", "two_pass"], ["shared"]))
def test_a_compiled_training_function(engine: str, outer: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 5)))
    twin = copy.deepcopy(model)
    step, exact = stepper(model, engine), stepper(twin, "exact")

    def trained(x: Tensor, y: Tensor) -> Tensor:
        loss = step(x, y)
        loss.backward()
        return loss.detach() * 2

    run = torch.compile(trained, backend=outer)
    for _ in range(3):
        x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
        model.zero_grad()
        twin.zero_grad()
        exact(x, y).backward()
        torch.testing.assert_close(run(x, y), exact.last.loss * 2)
        assert error(gradient(twin), gradient(model)) <= 1e-5


@pytest.mark.slow  # by default test_pickle.py copies a step of a plain model
def test_it_is_pickled_with_its_weights(compiles: list[bool]) -> None:
    model = compiled(lambda: zoo.Mlp(8))
    step = stepper(model)
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    for _ in range(2):
        step(x, y).backward()
    other = copy.deepcopy(step)
    again = pickle.loads(pickle.dumps(step.forward.model.state_dict()))
    torch.testing.assert_close(again, dict(model.state_dict()))
    torch.testing.assert_close(other(x, y), step(x, y))


@pytest.mark.slow  # by default test_auto.py has both
def test_auto_runs_it_under_shared_and_two_pass_where_that_refuses() -> None:
    layers = lambda: (nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 5))  # noqa: E731
    step = stepper(compiled(lambda: nn.Sequential(*layers())), "auto", 0.2)
    for _ in range(3):
        step(zoo.vectors(256), torch.randint(0, 5, (256,))).backward()
    assert step.last.engine == "shared"


def compiled_in_its_class() -> nn.Module:
    class Compiled(zoo.Mlp):
        forward = torch.compile(zoo.Mlp.forward)

    return Compiled(8)


def compiled_forward() -> nn.Module:
    model = zoo.Mlp(8)
    model.forward = torch.compile(model.forward)
    return model


# by default the second is compiled as the first
@pytest.mark.parametrize("make", few([compiled_forward, compiled_in_its_class, lambda: zoo.Mlp(8)], [compiled_forward]))
def test_a_compiled_forward_and_a_model_compiled_late(
    make: Callable[[], nn.Module], compiles: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They ran operator by operator, and `auto` took them for eager ones."""
    monkeypatch.setattr(AutoEngine, "forecast", None)
    model = seeded(make)
    step, auto = stepper(model), stepper(model, "auto")
    if type(model) is zoo.Mlp and "forward" not in vars(model):
        model.compile()
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    for _ in range(3):
        near(*whole_and_kept(step, x, y))
    assert compiles == [False, True]
    auto(x, y)
    assert auto.engine.forecast.step == math.inf, "taken for a compiled one"


@pytest.mark.filterwarnings("ignore")  # torch's own, when it compiles
def test_a_copy_of_a_compiled_forward_is_compiled_and_independent(compiles: list[bool]) -> None:
    """A copy ran the model itself, so that `check_engine` compared the model with itself and changed its weights."""
    model = seeded(compiled_forward)
    before = copy.deepcopy(dict(model.state_dict()))
    report = check_engine(model, (zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))), nn.CrossEntropyLoss(), steps=3)
    assert report.ok
    assert True in compiles
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
