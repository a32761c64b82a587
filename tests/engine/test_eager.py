"""A trace is compared with the model's own step: rounding elsewhere is no difference, a lost gradient is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import batchtrim
from batchtrim.engine.eager import EagerStep
from batchtrim.engine.shared import SharedEngine
from batchtrim.errors import EngineRefused
from batchtrim.testing import check_engine


class Sensitive(nn.Module):
    """Rounding hardly moves its losses and turns a gradient around, as in a deep network at the start of training."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.fast = nn.Linear(16, 5), nn.Linear(16, 5)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        fast = self.fast(x).float()
        fast = fast.detach() + self.scale * (fast - fast.detach())
        return self.plain(x).float() + 1e-3 * torch.sin(3e2 * fast)


@pytest.mark.parametrize(("scale", "same"), [(1.0, True), (0.0, False), (3.0, False)])
def test_rounding_elsewhere_is_no_difference(scale: float, same: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Sensitive(), torch.randn(12, 16), torch.arange(12) % 5
    forward = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5)).forward
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        own = EagerStep(forward, x, y, gradients=True)
        with torch.autocast("cpu", enabled=False):  # stands for a trace that rounds elsewhere
            model.scale = scale
            losses, outputs = forward(x, y, model=model)
            model.scale = 1.0
        differs = own.difference(losses.values, outputs, coarse=True)
    assert (differs is None) if same else str(differs).startswith("the gradient of fast")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    losses.values.sum().backward()  # autograd sees no write into a weight


def test_without_low_precision_the_same_gradient_is_another_one() -> None:
    torch.manual_seed(0)
    model, x, y = Sensitive(), torch.randn(12, 16), torch.arange(12) % 5
    forward = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5)).forward
    own = EagerStep(forward, x, y, gradients=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses, outputs = forward(x, y, model=model)
    assert own.difference(losses.values, outputs, coarse=False) is not None


def test_a_criterion_with_parameters() -> None:
    """Uncertainty weights, a temperature: they were counted twice, "zip() argument 2 is longer than argument 1"."""

    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t, self.reduction = nn.Parameter(torch.tensor(1.5)), "mean"

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.mse_loss(outputs * self.t, targets, reduction=self.reduction)

    model, x, y = nn.Linear(5, 2), torch.randn(8, 5), torch.randn(8, 2)
    forward = batchtrim.TrimmedForward(model, Temperature(), batchtrim.Trimmer(0.5)).forward
    own = EagerStep(forward, x, y, gradients=True)
    losses, outputs = forward(x, y, model=model)
    assert own.difference(losses.values, outputs, coarse=False) is None


@pytest.mark.slow
def test_a_trace_of_a_model_that_changes_its_attributes_is_compared_in_two_steps() -> None:
    """The first run cannot show that a trace takes the value for a constant."""

    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.last = "large" if len(x) > 8 else "small"
            return super().forward(x)

    found = []
    for layer in (nn.Linear(6, 8), Noting(6, 8)):
        model = nn.Sequential(layer, nn.Linear(8, 5))
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
        for _ in range(3):
            step(torch.randn(12, 6), torch.arange(12) % 5)
            found.append(step.engine.trace.checked)  # type: ignore[attr-defined]
    assert found == [True, True, True, False, True, True]


class Tallies(nn.Module):
    def __init__(self, entries: int, changes: bool) -> None:
        super().__init__()
        self.layer, self.changes = nn.Linear(8, 5), changes
        self.tally = dict.fromkeys(range(entries), 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.changes:
            self.tally[3] += 1
        return self.layer(x) * (1 + self.tally[3])


def test_a_change_of_a_large_dictionary_is_refused_before_it_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's tracer took 71 s for 20,000 entries, in each of the first steps."""
    monkeypatch.setattr(SharedEngine, "_capture", lambda self: pytest.fail)
    model = Tallies(2001, changes=True)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "shared")
    with pytest.raises(EngineRefused, match="its forward changes a dict of 2001 entries, which torch's tracer"):
        step(torch.randn(12, 8), torch.arange(12) % 5)
    assert model.tally[3] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("entries", "changes"), [(2001, False), (20, True)])
def test_a_large_dictionary_that_is_read_and_a_small_one_are_traced(entries: int, changes: bool) -> None:
    model = Tallies(entries, changes)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "shared")
    step(torch.randn(12, 8), torch.arange(12) % 5).backward()
    assert step.last is not None
    assert step.last.engine == "shared"
    assert model.tally[3] == changes


_ran: list[str] = []


@torch.library.custom_op("batchtrim_tests::noted", mutates_args=())
def noted(x: Tensor) -> Tensor:
    _ran.append("forward")
    return x.clone()


@torch.library.custom_op("batchtrim_tests::noted_backward", mutates_args=())
def noted_backward(g: Tensor) -> Tensor:
    _ran.append("backward")
    return g.clone()


noted.register_fake(torch.empty_like)
noted_backward.register_fake(torch.empty_like)
noted.register_autograd(lambda _, g: noted_backward(g))


class Noted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return noted(super().forward(x))


def test_operators_of_the_user_run_once() -> None:
    model = nn.Sequential(Noted(8, 8), nn.Linear(8, 5))
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "shared")
    _ran.clear()
    step(torch.randn(12, 8), torch.arange(12) % 5).backward()
    assert _ran == ["forward", "backward"]


def test_a_method_under_autocast_is_traced_again() -> None:
    """As in diffusion libraries: what the decorator had noted of torch's cache was taken for the model's state."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        @torch.autocast("cpu", enabled=False)
        def scaled(self, x: Tensor) -> Tensor:
            return 2 * x

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.scaled(x))

    batch = torch.randn(8, 4), torch.randint(0, 3, (8,))
    assert check_engine(Model(), batch, nn.CrossEntropyLoss(), steps=2, verbose=False).verdict == "right"
