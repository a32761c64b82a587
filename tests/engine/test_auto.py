"""The engine that `auto` runs, when it changes, and its messages."""

from __future__ import annotations

import logging
import re
import time
import warnings

import pytest
import torch
import zoo
from attacks import ATTACKS
from harness import BATCH, error, gradient
from torch import nn

import batchtrim
from batchtrim.engine.auto import AutoEngine
from batchtrim.engine.capture import Capture
from batchtrim.engine.cost import Machine
from batchtrim.engine.shared import SharedEngine
from batchtrim.errors import ApproximateGradient, EngineFallback
from batchtrim.testing import check_engine
from tiers import few


class Wide(nn.Sequential):
    """Enough arithmetic for cutting to pay."""

    def __init__(self, *norms: nn.Module) -> None:
        super().__init__(nn.Linear(8, 512), *norms, nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 5))


def stepped(model: nn.Module, keep: float, batch: int = 256, engine: str = "auto") -> batchtrim.TrimmedForward:
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(keep), engine)
    step(zoo.vectors(batch), torch.randint(0, 5, (batch,))).backward()
    return step


@pytest.mark.slow  # by default test_the_first_step_that_may_pay_is_counted_and_the_next_traced
def test_it_says_once_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "batchtrim.engine"):
        step = stepped(Wide(), 0.2)
        step(zoo.vectors(64), torch.randint(0, 5, (64,)))
    assert [r.message for r in caplog.records if r.name == "batchtrim.engine"] == [
        "engine 'auto' runs 'shared': 100 % of the backward on the kept rows"
    ]
    assert step.last.engine == "shared"
    assert "engine='auto (shared)'" in repr(step)


def test_a_model_too_small_to_pay_is_given_up_for_good(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "batchtrim.engine"):
        step = stepped(zoo.Mlp(8), 0.2, BATCH)
    assert "too small for cutting to pay" in caplog.records[-1].message
    step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))
    assert step.last.engine == "exact"
    assert "engine='auto (exact)'" in repr(step)


@pytest.mark.parametrize(("texts", "engine"), [(32, "exact"), (256, "shared")])
def test_a_step_that_waits_for_python_is_not_cut(
    texts: int, engine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bfloat16 BERT on a GPU: `auto` took 1.2 of a plain step that waited for Python."""
    gpu = Machine(flops=1e30, bytes=2e9, start=0.0, python=1e-4)
    monkeypatch.setattr("batchtrim.engine.sliced.machine_of", lambda device: gpu)
    caplog.set_level(logging.INFO, "batchtrim.engine")
    step = stepped(Wide(), 0.2, texts)
    step(zoo.vectors(texts), torch.randint(0, 5, (texts,))).backward()
    assert step.last.engine == engine
    told = "a step on batches of this size waits for Python, not for the device; engine='shared' cuts anyway"
    assert (told in caplog.text) is (engine == "exact")


@pytest.fixture
def counted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `auto` decide by the model's size whether to trace it, as it does outside of tests."""
    monkeypatch.setattr(AutoEngine, "forecast", None)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[SharedEngine]:
    """The engines for which `auto` imports torch's compiler."""
    found: list[SharedEngine] = []
    begin = SharedEngine._reset
    monkeypatch.setattr(SharedEngine, "_reset", lambda self: (found.append(self), begin(self))[1])
    return found


@pytest.mark.usefixtures("counted_first")
def test_a_model_whose_trace_is_not_paid_back_is_not_traced(
    caplog: pytest.LogCaptureFixture, made: list[SharedEngine]
) -> None:
    """The import of torch's compiler took longer than a hundred steps of a small model."""
    model, batch = Wide(), (zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))
    model.register_forward_hook(lambda *_: time.sleep(5e-3))  # slow on the clock, as a first forward often is
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.2), "auto")
    with caplog.at_level(logging.INFO, "batchtrim.engine"):
        with torch.no_grad():
            step(*batch)  # no step of training, which is not counted
        assert step.engine.forecast is None
        for _ in range(3):
            step(*batch).backward()
            assert step.last.engine == "exact"
    (told,) = caplog.records
    assert re.search(r"continues with 'exact': a trace .* \d\.\d s, and 100 steps 0\.\d s", told.message)
    assert "engine='auto (exact)'" in repr(step)
    assert not made


@pytest.mark.usefixtures("counted_first")
@pytest.mark.parametrize("begins", [0, 2])
def test_a_gradient_penalty(
    begins: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, made: list[SharedEngine]
) -> None:
    """The first traced step ended in torch's error about double backward, in the middle of training."""
    monkeypatch.setattr(Capture, "traced", True)
    monkeypatch.setattr("batchtrim.engine.auto.machine_of", lambda device: Machine(flops=1e8, bytes=1e8, start=6e-6))
    model, batch = Wide(), (zoo.vectors(64), torch.randint(0, 5, (64,)))
    trim = batchtrim.Trimmer(lambda progress: 0.98 if progress < 0.5 else 0.2, total=6)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), trim, "auto")
    with caplog.at_level(logging.INFO, "batchtrim.engine"):
        for number in range(6):
            loss = step(*batch)
            gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=number >= begins)
            if number >= begins:
                (loss + sum(each.square().sum() for each in gradients)).backward()
            assert step.last.engine == "exact"
            trim.step()
    assert [r.message for r in caplog.records if r.name == "batchtrim.engine"] == [
        "engine 'auto' continues with 'exact': backward runs with create_graph=True"
    ]
    assert not made


def test_a_gradient_penalty_that_begins_after_a_trace(caplog: pytest.LogCaptureFixture) -> None:
    """The first such step ended in an error."""
    caplog.set_level(logging.INFO, "batchtrim.engine")
    batch, found = (zoo.vectors(64), torch.randint(0, 5, (64,))), {}
    for engine in ("exact", "auto"):
        torch.manual_seed(0)
        model = Wide()
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.2), engine)
        step(*batch).backward()
        ran = [step.last.engine]
        for _ in range(2):
            gradients = torch.autograd.grad(step(*batch), list(model.parameters()), create_graph=True)
            sum(each.square().sum() for each in gradients).backward()  # type: ignore[union-attr]
            ran.append(step.last.engine)
        found[engine] = [each.grad for each in model.parameters()]
    assert ran == ["shared", "shared", "exact"]
    torch.testing.assert_close(*found.values())
    assert caplog.messages[-1] == "engine 'auto' continues with 'exact': backward runs with create_graph=True"


@pytest.mark.usefixtures("counted_first")
def test_nothing_is_made_ready_where_nearly_everything_is_kept(made: list[SharedEngine]) -> None:
    step = stepped(Wide(), 0.95)
    assert step.engine.forecast is None
    assert not made


@pytest.mark.usefixtures("counted_first")
def test_the_first_step_that_may_pay_is_counted_and_the_next_traced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "batchtrim.engine")
    monkeypatch.setattr(Capture, "traced", True)  # the first in a process takes longer
    monkeypatch.setattr("batchtrim.engine.auto.machine_of", lambda device: Machine(flops=4e10, bytes=6e9, start=6e-6))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1280), nn.Tanh(), nn.Linear(1280, 1280), nn.Tanh(), nn.Linear(1280, 5))
    batch = zoo.vectors(512), torch.randint(0, 5, (512,))
    trim = batchtrim.Trimmer(lambda progress: (1.0, 0.8, 0.2)[min(int(4 * progress), 2)], total=4)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), trim, "auto")
    ran = []
    for epoch in range(4):
        ran += [(epoch, step(*batch).requires_grad and step.last.engine) for _ in range(2)]
        trim.step()
    assert ran == [
        (0, "exact"), (0, "exact"),  # all are kept
        (1, "exact"), (1, "exact"),  # counted; a trace saves too little at 0.8
        (2, "shared"), (2, "shared"), (3, "shared"), (3, "shared"),
    ]  # fmt: skip
    assert [r.message for r in caplog.records if r.name == "batchtrim.engine"] == [
        "engine 'auto' runs 'shared': 100 % of the backward on the kept rows"
    ], "once"
    assert "engine='auto (shared)'" in repr(step)


@pytest.mark.usefixtures("counted_first")
def test_two_passes_need_no_trace_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count nothing for the shared engine where it is refused before its first step."""
    monkeypatch.setattr("batchtrim.engine.shared.refusal", lambda forward: "refused")
    compiled = torch.compile(zoo.Mlp(8), backend="eager")
    with pytest.warns(EngineFallback, match="two_pass"):
        step = batchtrim.TrimmedForward(compiled, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.3), "auto")  # type: ignore[arg-type]
    for _ in range(2):
        step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
        assert step.last.engine == "two_pass"


def test_two_passes_are_not_taken_where_a_sparse_gradient_would_have_fewer_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("batchtrim.engine.shared.refusal", lambda forward: "refused")
    model = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Flatten(), nn.Linear(16, 5))
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(EngineFallback, match="an embedding's sparse gradient.* Continuing with engine='exact'"):
        step = batchtrim.TrimmedForward(compiled, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.3), "auto")  # type: ignore[arg-type]
    words = torch.arange(2 * BATCH).view(BATCH, 2)
    step(words, torch.randint(0, 5, (BATCH,))).backward()
    assert model[0].weight.grad.coalesce().indices().numel() == 2 * BATCH


@pytest.mark.slow
@pytest.mark.usefixtures("counted_first")
@pytest.mark.filterwarnings("ignore")  # torch's own, of a compile inside
def test_a_branch_by_cond_can_be_counted() -> None:
    """`auto` raised torch's error in the step that it counts."""
    torch._dynamo.reset()
    attack = ATTACKS["branch_of_the_batch_by_cond"]
    first, *more = attack.batches()
    assert check_engine(attack.make(), first, attack.loss(), engine="auto", more=more, verbose=False).verdict == "right"


def test_counting_changes_nothing() -> None:
    model, batch = Wide(nn.Dropout(0.3)), (zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))
    found = []
    for counted in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        engine = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "auto").engine
        (engine._counted if counted else engine.exact)(*batch, None).loss.backward()
        found.append(gradient(model))
    assert torch.equal(*found)


def test_nothing_is_traced_where_nearly_everything_is_kept() -> None:
    step = stepped(Wide(), 0.95)
    assert step.last.engine == "exact"
    assert step.engine.saving.capture.traces == 0


@pytest.mark.slow  # by default the next but one computes the approximate form by hand
@pytest.mark.parametrize(("cosine", "approximate"), few([(0.97, True), (0.93, False)], [(0.93, False)]))
def test_batch_norm_is_approximated_only_where_that_is_near(
    cosine: float, approximate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchtrim.engine.shared.cosine_of", lambda *_: cosine)
    torch.manual_seed(0)
    model = Wide(nn.BatchNorm1d(512))
    with pytest.warns(ApproximateGradient, match=f"cosine {cosine:.3f}") as told:
        step = stepped(model, 0.2)
    assert len(told) == 1
    assert step.engine.saving.approximate is approximate
    assert bool(step.last.approximate) is approximate
    x, y = zoo.vectors(256), torch.randint(0, 5, (256,))
    found = []
    for engine in (step, batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.2), "exact")):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine(x, y).backward()
        found.append(gradient(model))
    assert (error(found[1], found[0]) <= 1e-5) is not approximate


@pytest.mark.slow
def test_the_cosine_is_that_of_the_two_gradients() -> None:
    torch.manual_seed(0)
    model = Wide(nn.BatchNorm1d(512))
    x, y = zoo.vectors(64), torch.randint(0, 5, (64,))
    found = []
    for engine in ("exact", "shared"):
        model.zero_grad()
        batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), engine)(x, y).backward()
        found.append(gradient(model))
    expected = float(nn.functional.cosine_similarity(*found, dim=0))
    with pytest.warns(ApproximateGradient, match=f"cosine {expected:.3f}"):
        batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "auto")(x, y)


def test_batch_norm_keeps_statistics_and_takes_its_means_over_the_kept_rows() -> None:
    # dx = weight / S * (g - mean_k(g) - u * mean_k(g * u)), u = (x - M) / S with the whole batch's mean and deviation
    torch.manual_seed(3)
    x = torch.randn(64, 2, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, eps=1e-12)).double()
    nn.init.eye_(model[0].weight)
    scale = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    trim = batchtrim.Trimmer(0.25)
    step = batchtrim.TrimmedForward(model, lambda out, _: (out * scale).sum(1) ** 2, trim, "shared")
    step(x).backward()
    rows, k = trim.last_selection.rising().indices, trim.last_selection.k
    mean, deviation = x.mean(0), x.std(0, unbiased=False)
    u = ((x - mean) / deviation)[rows]
    g = 2 * (u * scale).sum(1, keepdim=True) * scale / k
    dx = (g - g.mean(0) - u * (g * u).mean(0)) / deviation
    torch.testing.assert_close(model[0].weight.grad, dx.t() @ x[rows])
    torch.testing.assert_close(model[1].weight.grad, (g * u).sum(0))
    torch.testing.assert_close(model[1].bias.grad, g.sum(0))
    torch.testing.assert_close(model[1].running_mean, 0.1 * mean)
    assert step.last.approximate


@pytest.mark.slow  # by default test_compiled.py has them
def test_a_compiled_model_runs_under_shared() -> None:
    step = stepped(torch.compile(Wide(), backend="eager"), 0.3)  # type: ignore[arg-type]
    assert step.last.engine == "shared"


@pytest.mark.slow  # by default test_two_passes_need_no_trace_to_pay goes there
def test_a_compiled_model_goes_to_two_pass_where_shared_refuses() -> None:
    torch.manual_seed(0)
    compiled = torch.compile(zoo.Sparse(), backend="eager")
    step = batchtrim.TrimmedForward(compiled, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.3), "auto")  # type: ignore[arg-type]
    for number in range(2):
        x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
        if number == 0:
            with pytest.warns(EngineFallback, match="sparse.*two_pass"):
                step(x, y).backward()
        else:
            step(x, y).backward()
    assert step.last.engine == "two_pass"


@pytest.mark.slow
@pytest.mark.parametrize("engine", few(["shared", "auto"], ["auto"]))
def test_batch_norm_in_evaluation_mode_is_exact_and_reported_as_exact(engine: str) -> None:
    model = Wide(nn.BatchNorm1d(512))
    model[1].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ApproximateGradient)
        step = stepped(model, 0.2, engine=engine)
    assert step.last.engine == "shared"
    assert step.last.approximate is None
