"""The public check tells a right engine from a wrong one."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import nn

from batchtrim import Selection, TrimmedForward, Trimmer
from batchtrim.engine import ENGINES
from batchtrim.engine.exact import ExactEngine
from batchtrim.testing import EngineReport, check_engine
from tiers import few

MODELS: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, 6), torch.randint(0, 3, (16,))


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


# by default the example of check_engine runs "shared"
@pytest.mark.parametrize("engine", few(["shared", "auto", "exact"], ["exact"]))
def test_right_engines_pass(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    network = model()
    data = batch()
    before = torch.get_rng_state()
    report = check_engine(network, data, nn.CrossEntropyLoss(), engine=engine, keep=0.4)
    assert torch.equal(before, torch.get_rng_state())
    assert report.ok
    assert report.gradient_error < 1e-6
    assert "against 'exact', 6 steps: ok" in capsys.readouterr().out
    assert all(parameter.grad is None for parameter in network.parameters())


def test_two_pass_with_dropout_is_detected() -> None:
    report = check_engine(model(), batch(), nn.CrossEntropyLoss(), engine="two_pass", keep=0.4, verbose=False)
    assert not report.ok
    assert "NOT THE SAME" in str(report)


def test_a_broken_engine_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(step: Any, *_: Any) -> Any:
        return step._replace(loss=step.loss * step.selection.k / step.selection.size)

    report = planted(monkeypatch, change, keep=0.5)
    assert not report.ok
    assert report.gradient_error == pytest.approx(0.5, rel=1e-4)  # half of the samples kept, divided by all


def test_an_engine_that_breaks_later_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def later_nan(step: Any, *_: Any) -> Any:
        calls.append(step)
        return step._replace(loss=step.loss * (float("nan") if len(calls) == 3 else 1.0))

    report = planted(monkeypatch, later_nan)
    assert len(calls) == report.steps
    assert not report.ok
    assert math.isnan(report.gradient_error)
    with pytest.raises(ValueError, match="expected `steps` to be at least 1, got 0"):
        check_engine(model(), batch(), nn.CrossEntropyLoss(), steps=0)


def contrastive(outputs: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return -(outputs @ outputs.t()).log_softmax(1).diagonal()


@pytest.mark.slow
@pytest.mark.torch28
def test_refusal_is_reported() -> None:
    report = check_engine(model(), batch(), contrastive, verbose=False)
    assert not report.ok
    assert report.verdict == "refused"
    assert "mixes rows, since it makes a tensor with rows along two dimensions" in str(report)


@pytest.mark.slow
@pytest.mark.torch28
def test_batch_norm_is_judged_by_its_direction() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    report = check_engine(network, batch(), nn.CrossEntropyLoss(), keep=0.6, verbose=False)
    assert report.batch_norm
    assert report.ok
    assert "BatchNorm couples samples" in str(report)


class Scaled(nn.Module):
    """A network with a fault to be planted in the gradient of one small parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate = model(), nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + 1e-3 * self.gate


def planted(monkeypatch: pytest.MonkeyPatch, change: Any, **options: Any) -> EngineReport:
    """The report on an engine that is exact but for ``change(step, model, x)`` before its loss is returned."""

    class Faulty(ExactEngine):
        name = "faulty"

        def __call__(self, x: Any, y: Any, selection: Any = None) -> Any:
            step = super().__call__(x, y, selection)._replace(engine=self.name)
            return change(step, self.forward.model, x) or step

    monkeypatch.setitem(ENGINES, "faulty", Faulty)
    return check_engine(Scaled(), batch(), nn.CrossEntropyLoss(), engine="faulty", verbose=False, **options)


def test_one_small_parameter_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(step: Any, network: Any, _: Any) -> Any:
        gate = network.gate
        return step._replace(loss=step.loss + 1e-5 * (gate - gate.detach()).sum())

    report = planted(monkeypatch, change)
    assert report.gradient_error < 1e-4  # what a look at all parameters together would let pass
    assert report.parameter == "gate"
    assert not report.ok
    assert report.verdict == "wrong"
    assert "worst parameter    gate, relative error" in str(report)


@pytest.mark.parametrize("in_float64_too", [False, True])
def test_an_error_of_float32_alone_is_rounding(in_float64_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a compiled ReLU: its forward rounds differently, and an activation moves across zero."""

    def change(step: Any, network: Any, x: torch.Tensor) -> Any:
        gate = network.gate
        if x.dtype == torch.float32 or in_float64_too:
            return step._replace(loss=step.loss + 1e-5 * (gate - gate.detach()).sum())
        return None

    report = planted(monkeypatch, change)
    assert report.parameter_error > 1e-4
    assert (report.ok, report.verdict) == ((False, "wrong") if in_float64_too else (True, "right"))
    assert report.float64_error is not None
    assert (report.float64_error > 1e-4) == in_float64_too
    assert ("the errors above are rounding" in str(report)) != in_float64_too
    given = planted(monkeypatch, change, tolerance=1e-5)
    assert (given.ok, given.float64_error) == (False, None), "a given tolerance is kept to"


def test_a_difference_in_float64_alone_is_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(step: Any, network: Any, x: torch.Tensor) -> Any:
        if x.dtype == torch.float64:
            raise RuntimeError("no float64 here")
        return step._replace(loss=step.loss + 1e-5 * (network.gate - network.gate.detach()).sum())

    report = planted(monkeypatch, change)
    assert (report.ok, report.float64_error) == (False, math.inf)
    assert "in float64         not the same, or it does not run" in str(report)


@pytest.mark.parametrize("field", ["same_batch", "same_generators", "attributes"])
def test_what_is_left_otherwise_is_wrong(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(step: Any, network: Any, x: Any) -> None:
        with torch.no_grad():
            if field == "same_batch":
                x.data.add_(1)
            elif field == "same_generators":
                torch.rand(1)
            else:
                network.body[0].in_features = 7

    report = planted(monkeypatch, changed)
    assert getattr(report, field) == {"attributes": ("Linear.in_features",)}.get(field, False)
    assert report.verdict == "wrong"


def test_another_sample_of_the_same_loss_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ExactEngine):
        def __call__(self, x: Any, y: Any, selection: Any = None) -> Any:
            return super().__call__(x, y, Selection(torch.tensor([2, 3]), size=4, candidates=4))

    monkeypatch.setitem(ENGINES, "other", Other)
    x = torch.randn(1, 6).expand(4, 6).clone()
    network = nn.Linear(6, 3)
    for labels, right in ((torch.ones(4, dtype=torch.long), True), (torch.tensor([0, 0, 1, 1]), False)):
        report = check_engine(
            network, (x, labels), nn.CrossEntropyLoss(), engine="other", keep=0.5, more=[(x, labels)], verbose=False
        )
        assert report.same_samples == right
        assert report.ok == right


def test_batches_of_other_sizes_and_orders_are_made_from_one() -> None:
    sizes: list[tuple[int, float]] = []
    network = model()
    network.register_forward_pre_hook(lambda _, given: sizes.append((len(given[0]), float(given[0][0, 0]))))
    check_engine(network, batch(), nn.CrossEntropyLoss(), engine="exact", verbose=False)
    x, _ = batch()
    assert {size for size, _ in sizes} == {16, 12}
    assert {first for _, first in sizes} == {float(x[0, 0]), float(x[-1, 0])}


def test_the_engine_that_ran_is_reported() -> None:
    network = nn.Sequential(nn.LazyLinear(3))
    report = check_engine(network, batch(), nn.CrossEntropyLoss(), engine="two_pass", verbose=False)
    assert report.engine == "exact, two_pass"  # the first step makes the weights
    assert report.ok


def test_an_engine_that_raises_where_a_plain_step_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of luck")

    report = planted(monkeypatch, fails)
    assert report.failed == "RuntimeError: out of luck"
    assert report.verdict == "wrong"
    assert "fails although a plain step trains: RuntimeError: out of luck" in str(report)


def test_two_pass_with_dropout_says_that_it_is_approximate() -> None:
    report = check_engine(model(), batch(), nn.CrossEntropyLoss(), engine="two_pass", verbose=False)
    assert report.verdict == "approximate"
    assert "  approximate        it draws random numbers" in str(report)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, of its own look at a loss
def test_a_model_compiled_in_place_is_checked_compiled() -> None:
    """``copy.deepcopy`` returns it as it was before ``model.compile()``."""
    ran: list[bool] = []

    def backend(graph: Any, _: Any) -> Any:
        ran.append(True)
        return graph.forward

    class Loss(nn.Module):
        def forward(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs, y, reduction="none")

    network, loss = nn.Sequential(Scaled(), nn.Linear(3, 3)), Loss()
    network[0].compile(backend=backend)
    loss.compile(backend=backend)
    report = check_engine(network, batch(), loss, engine="exact", verbose=False)
    assert report.ok
    assert len(ran) >= 4, "model and loss, on both sides"


@pytest.mark.slow
@pytest.mark.torch28
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside its compiler
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_network_with_dropout_is_compared_on_the_same_masks(in_place: bool) -> None:
    """Inductor's own generator gives each graph other masks."""
    network = Scaled()
    if in_place:
        network.compile()
    report = check_engine(network if in_place else torch.compile(network), batch(), nn.CrossEntropyLoss(), keep=0.4)  # type: ignore[arg-type]
    assert report.ok
    assert report.gradient_error <= 1e-6
    assert report.engine == "shared"


def test_the_models_own_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        check_engine(nn.Linear(5, 3), batch(), nn.CrossEntropyLoss(), engine="exact", verbose=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 1.5}, r"expected `keep` in \(0, 1\], got 1.5"),
        ({"keep": [0.5, "a"]}, "expected `keep` to be a number, got 'a'"),
        ({"keep": []}, "expected `keep` to hold at least one fraction, got none"),
        ({"more": [torch.ones(3)]}, r"expected `more` to be \(x, y\), got a tensor"),
        ({"tolerance": -1.0}, "expected `tolerance` to be positive"),
        ({"lr": float("nan")}, "expected `lr` to be positive"),
        ({"engine": "fast"}, "expected `engine` to be one of"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_engine(model(), batch(), nn.CrossEntropyLoss(), verbose=False, **arguments)


def test_arguments_the_other_way_round() -> None:
    batch = torch.randn(8, 3), torch.randint(2, (8,))
    with pytest.raises(TypeError, match=r"expected `batch` to be \(x, y\), got CrossEntropyLoss\(\)"):
        check_engine(nn.Linear(3, 2), nn.CrossEntropyLoss(), batch)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"callable, got a tuple of a tensor of shape \(8, 3\) and dtype"):
        TrimmedForward(nn.Linear(3, 2), batch, Trimmer(0.5))  # type: ignore[arg-type]


class TestWhatIsNotCopied:
    """Functions are not copied, so both sides of the comparison shared what they hold, and changed it."""

    def test_a_forward_that_runs_the_model_itself(self) -> None:
        network = model()
        plain = network.forward
        network.forward = lambda x: 2 * plain(x)
        self.refused(network, nn.CrossEntropyLoss(), "Linear's weight")

    def test_a_hook(self) -> None:
        network = model()
        network[1].register_forward_hook(lambda module, args, output: output + network[0].bias)
        self.refused(network, nn.CrossEntropyLoss(), "Linear's bias")

    def test_a_hook_that_only_notes_something(self) -> None:
        network: Any = model()
        network.seen = []
        network[0].register_forward_hook(lambda module, args, output: network.seen.append(len(output)))
        assert check_engine(network, batch(), nn.CrossEntropyLoss(), engine="exact", verbose=False).verdict == "right"

    def test_a_loss_that_names_the_model(self) -> None:
        network = model()

        def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            decay = sum(p.square().sum() for p in network.parameters())
            return nn.functional.cross_entropy(outputs, labels, reduction="none") + decay

        self.refused(network, loss, "Linear's weight")

    @pytest.mark.parametrize("kind", [nn.Linear, nn.Parameter])
    def test_a_loss_that_names_what_is_trained(self, kind: Any) -> None:
        trained = kind(torch.ones(3)) if kind is nn.Parameter else kind(3, 3)
        scaled = trained if kind is nn.Linear else lambda outputs: outputs * trained
        what = "Linear's weight" if kind is nn.Linear else "a tensor that requires a gradient"
        loss = lambda o, y: nn.functional.cross_entropy(scaled(o), y, reduction="none")  # noqa: E731
        given = trained.weight if kind is nn.Linear else trained
        given.grad, before = torch.ones_like(given), given.detach().clone()
        self.refused(model(), loss, what)
        assert torch.equal(given.grad, torch.ones_like(given))
        assert torch.equal(given, before)

    def test_a_teacher_is_only_read(self) -> None:
        teacher = model()

        def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                wanted = teacher(batch()[0][: len(outputs)]).softmax(-1)
            return nn.functional.cross_entropy(outputs, wanted, reduction="none")

        assert check_engine(model(), batch(), loss, engine="exact", verbose=False).verdict == "right"

    @pytest.mark.parametrize("engine", ["exact", "shared"])
    def test_a_registry_of_all_models_leads_to_the_other_copy(self, engine: str) -> None:
        """As in spikingjelly: it was a KeyError, or attributes that differ."""

        class Registered(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(6, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                MODELS[self] = [self.layer]
                return self.layer(x)

        network = Registered()
        network(batch()[0])
        assert check_engine(network, batch(), nn.CrossEntropyLoss(), engine=engine, verbose=False).verdict == "right"

    @staticmethod
    def refused(network: nn.Module, loss: Any, what: str) -> None:
        before = [p.detach().clone() for p in network.parameters()]
        with pytest.raises(ValueError, match=f"whose copy still uses {what}: a function holds it"):
            check_engine(network, batch(), loss, engine="exact", verbose=False)
        assert all(map(torch.equal, before, network.parameters()))
        assert all(p.grad is None for p in network.parameters())
