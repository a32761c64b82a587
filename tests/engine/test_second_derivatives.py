"""Second derivatives of the loss of a traced step: those of the exact engine, or an error."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from attacks import ATTACKS
from harness import BATCH, penalty, stepper, vectors
from torch import Tensor, nn

import batchtrim
from batchtrim.engine.copies import fresh
from batchtrim.errors import EngineRefused
from tiers import few

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says about odd models is not the subject

NONE = "cannot be differentiated here"


def derivatives(name: str, engine: str, steps: int = 3) -> tuple[list[Any], batchtrim.TrimmedForward]:
    """The gradient of an attack and that of its square, after a step that is traced; and what the steps leave."""
    attack = ATTACKS[name]
    model, (batch, *_) = attack.make(), attack.batches()
    options = {name: each for name, each in attack.options.items() if name != "keep"}
    step = batchtrim.TrimmedForward(model, attack.loss(), batchtrim.Trimmer(0.4), engine, **options)
    parameters = [each for each in step.forward.inner.parameters() if each.requires_grad]
    found: list[Any] = []
    for number in range(steps):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(10 + number)
        loss = step(*fresh(batch))
        if number == 0:
            loss.backward()
            continue
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        square = sum(_dense(each).square().sum() for each in first if each is not None)
        if square.requires_grad:  # type: ignore[union-attr]
            found += [*first, *torch.autograd.grad(square, parameters, allow_unused=True)]  # type: ignore[arg-type]
        found += [*model.buffers(), torch.get_rng_state(), torch.tensor(random.getstate()[1])]
    return [None if each is None else _dense(each).detach().double() for each in found], step


def _dense(value: Tensor) -> Tensor:
    return value.to_dense() if value.is_sparse else value


# computed, not refused: state of many kinds, random numbers, several outputs with a gradient, a sparse gradient
RIGHT = (
    "two_checkpoints_with_dropout", "norm_in_a_list", "sparse_gradient", "three_dropouts_of_one_sample",
    "spectral_norm_by_parametrization", "codebook_moved_before_use", "queue_filled_before_use",
    "momentum_encoder", "renormalised_embedding", "average_of_the_weights_beside",
    "hook_that_counts", "function_that_remembers_the_batch", "scanned_with_a_captured_weight",
    "branch_of_the_batch_by_cond",
)  # fmt: skip


@pytest.mark.parametrize("name", few(ATTACKS, RIGHT))
def test_second_derivatives_are_right_or_an_error(name: str) -> None:
    try:
        exact, _ = derivatives(name, "exact")
    except (RuntimeError, NotImplementedError):
        pytest.skip("plain training has no second derivative")
    try:
        ours, step = derivatives(name, "shared")
    except EngineRefused:
        assert name not in RIGHT
        return
    except RuntimeError as error:
        if NONE not in str(error):
            raise
        assert name not in RIGHT
        return
    assert step.last.engine == "shared"
    for right, own in zip(exact, ours, strict=True):
        if right is None or own is None:
            assert right is own or not (own if right is None else right).any()
            continue
        assert torch.equal(right.isnan(), own.isnan())
        right, own = right.nan_to_num(), own.nan_to_num()
        assert (right - own).norm() <= 1e-4 * right.norm() + 1e-9


def test_hooks_run_as_often_as_in_plain_training() -> None:
    batch = vectors()
    exact, shared = (_calls_of_hooks(engine, batch) for engine in ("exact", "shared"))
    assert [name for name, _ in exact] == [name for name, _ in shared]
    torch.testing.assert_close([size for _, size in exact], [size for _, size in shared])


def _calls_of_hooks(engine: str, batch: tuple[Tensor, Tensor]) -> list[tuple[str, float]]:
    torch.manual_seed(0)
    model, seen = zoo.Mlp(8), []
    for name, each in model.named_parameters():
        each.register_hook(lambda gradient, name=name: seen.append((name, float(gradient.norm()))))
        each.register_post_accumulate_grad_hook(lambda each, name=name: seen.append((name, float(each.grad.norm()))))
    stepper(model, engine)(*batch).backward(create_graph=True)
    sum(each.grad.square().sum() for each in model.parameters()).backward()  # type: ignore[union-attr]
    return sorted(seen)


def test_a_model_whose_backward_reads_no_weight() -> None:
    """No tensor that it reads requires a gradient: torch before 2.13 then made no graph of the gradient."""
    batch, found = vectors(), []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        found.append(penalty(stepper(nn.Linear(8, 5), engine), batch))
    torch.testing.assert_close(*found)


def test_running_statistics_move_once() -> None:
    batch, found = vectors(), []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5))
        found.append([*penalty(stepper(model, engine), batch), *model.buffers()])
    torch.testing.assert_close(*found)


def test_the_gradient_of_a_batch_that_another_network_made() -> None:
    """The network below is upstream of the batch only; its second derivative passes through the trace once."""
    found = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        below, step = nn.Linear(8, 8), stepper(zoo.Mlp(8), engine)
        x, y = vectors()
        gradients = torch.autograd.grad(step(below(x).tanh(), y), [*below.parameters()], create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in gradients), [*below.parameters()]))  # type: ignore[arg-type]
        assert step.last.engine == engine
    torch.testing.assert_close(*found)


class WritesIntoItsBatch(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2).tanh_())


@pytest.mark.parametrize("also", [0.0, 1.0])
def test_a_batch_that_the_forward_writes_into(also: float) -> None:
    """``also``: the share of a loss that reads the batch as the forward left it."""
    found = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        below, step = nn.Linear(8, 8), stepper(WritesIntoItsBatch(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), engine)
        (x, y), asked = vectors(), [*below.parameters(), *step.model.parameters()]
        batch = below(x) * 1.0
        loss = step(batch, y) + also * batch.square().mean()
        gradients = torch.autograd.grad(loss, asked, create_graph=True)
        found.append([*gradients, *torch.autograd.grad(sum(each.square().sum() for each in gradients), asked)])  # type: ignore[arg-type]
        assert step.last.engine == engine
    torch.testing.assert_close(*found)


class WithWeights(nn.Module):
    """A network whose weights come with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(self.net, weights, (x,))


def test_weights_that_a_step_made_are_trained_through_it() -> None:
    """MAML. The check of the second trace ran backward through the graph of the first step, and freed it."""
    found = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        step = stepper(model := WithWeights(), engine)
        x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
        weights = dict(model.net.named_parameters())
        gradients = torch.autograd.grad(step((x, weights), y), [*weights.values()], create_graph=True)
        fast = {name: each - 0.1 * own for (name, each), own in zip(weights.items(), gradients, strict=True)}
        found.append(torch.autograd.grad(step((x, fast), y), [*weights.values()]))
        assert step.last.engine == engine
    torch.testing.assert_close(*found)


class WithBothWeights(WithWeights):
    def forward(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return self.net(x) + super().forward(x, weights)


def test_weights_that_depend_on_other_weights_of_the_step() -> None:
    """The gradient by way of the first step is not part of the second one's."""
    found = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        step = stepper(model := WithBothWeights(), engine)
        x, y = vectors()
        weights = dict(model.net.named_parameters())
        gradients = torch.autograd.grad(step((x, weights), y), [*weights.values()], create_graph=True)
        fast = {name: each - 0.1 * own for (name, each), own in zip(weights.items(), gradients, strict=True)}
        gradients = torch.autograd.grad(step((x, fast), y), [*weights.values()], create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in gradients), [*weights.values()]))  # type: ignore[arg-type]
        assert step.last.engine == engine
    torch.testing.assert_close(*found)


def test_a_buffer_made_in_inference_mode() -> None:
    """Its writes are not counted. ``shared`` refused the model."""
    batch, found = vectors(), []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 5), Shifts())
        found.append(penalty(stepper(model, engine), batch))
    torch.testing.assert_close(*found)


class Shifts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.inference_mode():
            self.register_buffer("shift", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift
