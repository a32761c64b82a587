"""What a traced step runs again on for second derivatives, and where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from harness import penalty, stepper, vectors
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says about odd models is not the subject

NONE = "cannot be differentiated here"


class Swish(torch.autograd.Function):
    """Saves what it computes, so that autograd itself takes it for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate := x.sigmoid())
        return x * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        x, gate = ctx.saved_tensors
        return gradient * (gate + x * gate * (1 - gate))


class Exponential(torch.autograd.Function):
    """Saves its output, and returns something without a gradient beside it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        result, sign = x.exp(), x > 0
        ctx.save_for_backward(x, result)
        ctx.mark_non_differentiable(sign)
        return result, sign

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:  # type: ignore[override]
        x, result = ctx.saved_tensors
        return gradient * result + 0 * x


class Applies(nn.Sequential):
    def __init__(self, function: Any) -> None:
        super().__init__(nn.Linear(8, 6), nn.Linear(6, 5))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        found = self.function.apply(self[0](x).tanh())
        return self[1](found[0] * found[1] if isinstance(found, tuple) else found)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(
            Exponential,
            marks=pytest.mark.skipif(
                torch.__version__ < "2.12", reason="older traces need not tell what an autograd function saves"
            ),
        ),
        Swish,  # the model's own Python runs again
    ],
)
def test_an_autograd_function(function: Any) -> None:
    batch, found = vectors(), []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        found.append(penalty(stepper(Applies(function), engine), batch))
    torch.testing.assert_close(*found)


class Grows(Applies):
    """Computes something else in each of its calls, and so cannot run again."""

    def __init__(self) -> None:
        super().__init__(Swish)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x * self.calls)


@pytest.mark.skipif("2.11" <= torch.__version__ < "2.12", reason="there this one can run again")
@pytest.mark.parametrize("options", [{}, {"allow_unused": True}])
def test_what_cannot_run_again_is_an_error(options: dict[str, bool]) -> None:
    """With allow_unused=True, None came back without a word."""
    model = Grows()
    with pytest.raises(RuntimeError, match=f"{NONE}: it calls an autograd function.*; its losses are others"):
        penalty(stepper(model), vectors(), **options)
    assert model.calls == 1


def test_a_model_that_runs_again_leaves_no_mark() -> None:
    """Its Python runs twice; the state is that after one forward."""
    found = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        model = nn.Sequential(Applies(Swish), nn.Dropout(), nn.BatchNorm1d(5), Notes())
        step, batch = stepper(model, engine), vectors()
        gradients = [*penalty(step, batch), *penalty(step, batch)]
        found.append([*gradients, *model.buffers(), torch.get_rng_state(), *model[-1].seen])
    torch.testing.assert_close(*found)


class Notes(nn.Module):
    """Keeps what its inputs were on average."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().mean())
        return x


def test_gradients_that_overflow_are_those_of_plain_training() -> None:
    """GradScaler meets them when its scale is too large, and skips the step. They ended in an error."""
    batch, found = vectors(), []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        step = stepper(zoo.Mlp(8), engine)
        parameters = list(step.model.parameters())
        gradients = torch.autograd.grad(step(*batch) * 1e39, parameters, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in gradients), parameters))  # type: ignore[arg-type]
    assert any(not each.isfinite().all() for each in found[0])
    torch.testing.assert_close(*found, equal_nan=True)


def test_a_layer_frozen_between_forward_and_backward() -> None:
    found = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        model, (x, y) = zoo.Mlp(8), vectors()
        step, x = stepper(model, engine), x.requires_grad_()
        loss = step(x, y)
        first = next(model.children())
        first.requires_grad_(False)
        (gradient,) = torch.autograd.grad(loss, [x], create_graph=True)
        gradient.square().sum().backward()
        found.append([x.grad, *(each.grad for each in model.parameters())])
        assert not next(first.parameters()).requires_grad
        assert step.last.engine == engine
    torch.testing.assert_close(*found)


class HoldsWeight(nn.Sequential):
    """A weight in a list, which is no parameter, and a model whose own Python has to run again."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))
        self.held = [torch.ones(5, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return Swish.apply(super().forward(x)) * self.held[0]


def test_a_gradient_that_is_lost_where_batch_norm_is_approximate_is_an_error() -> None:
    model, below, (x, y) = HoldsWeight(), nn.Linear(8, 8), vectors()
    loss = stepper(model)(below(x), y)
    gradients = torch.autograd.grad(loss, [*model.parameters(), *model.held], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{NONE}: .*something else"):
        sum(each.square().sum() for each in gradients).backward()  # type: ignore[union-attr]


def test_a_layer_thawed_between_forward_and_backward_is_an_error() -> None:
    model = zoo.Mlp(8)
    first = next(model.children()).requires_grad_(False)
    loss = stepper(model)(*vectors())
    first.requires_grad_(True)
    others = [each for each in model.parameters() if id(each) not in set(map(id, first.parameters()))]
    gradients = torch.autograd.grad(loss, others, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{NONE}: an input or a weight began to require a gradient"):
        sum(each.square().sum() for each in gradients).backward()  # type: ignore[union-attr]


def test_a_weight_written_into_before_backward_is_an_error() -> None:
    model = zoo.Mlp(8)
    loss = stepper(model)(*vectors())
    with torch.no_grad():
        next(each for each in model.parameters() if each.ndim == 1).add_(1)  # a bias, which no backward reads
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match=f"{NONE}: an input or a weight was written into"):
        sum(each.sum() for each in gradients).backward()  # type: ignore[union-attr]
