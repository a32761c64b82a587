"""Accumulation: a window trimmed as one large batch, or micro-batch by micro-batch, and the scale of either."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim.accumulation import first_pass
from batchtrim.engine import ENGINES
from batchtrim.errors import EngineFallback, EngineRefused
from tiers import few

SIZES = (4, 4, 3)  # the last micro-batch is smaller
KEEP = 0.4


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def window(sizes: tuple[int, ...] = SIZES) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 6, generator=draw), torch.randint(0, 3, (n,), generator=draw)) for n in sizes]


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def run(model: nn.Module, over: str, engine: str = "exact", criterion: Callable = F.cross_entropy, **options) -> float:
    trim = batchtrim.Trimmer(KEEP, **options)
    return summed(batchtrim.TrimmedForward(model, batchtrim.per_sample(criterion), trim, engine), window(), over)


def summed(step: batchtrim.TrimmedForward, batches: list[tuple[Tensor, Tensor]], over: str) -> float:
    total = 0.0
    for loss in batchtrim.accumulate(step, batches, over):
        loss.backward()
        total += loss.item()
    return total


@pytest.mark.parametrize(
    ("engine", "scale"),
    few(
        itertools.product(sorted(set(ENGINES) - {"auto"}), ["kept", "batch"]),
        [("exact", "kept"), ("exact", "batch"), ("two_pass", "kept"), ("two_pass", "batch"), ("shared", "batch")],
    ),
)
def test_a_window_is_one_large_batch(engine: str, scale: str) -> None:
    whole = mlp()
    x, y = (torch.cat(parts) for parts in zip(*window(), strict=True))
    losses = F.cross_entropy(whole(x), y, reduction="none")
    rows = losses.topk(4).indices  # round(0.4 * 11) = 4
    expected = losses[rows].sum() / (4 if scale == "kept" else 11)
    expected.backward()
    model = mlp()
    assert run(model, "window", engine, scale=scale) == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient(model), gradient(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", ["kept", "batch"])
def test_micro_batches_weigh_by_their_samples(scale: str) -> None:
    whole = mlp()
    expected = torch.zeros(())
    for (x, y), k in zip(window(), (2, 2, 1), strict=True):  # round(0.4 * 4) = 2, round(0.4 * 3) = 1
        losses = F.cross_entropy(whole(x), y, reduction="none")
        kept = losses.topk(k).values.sum() / (k if scale == "kept" else len(y))
        expected = expected + len(y) / 11 * kept
    expected.backward()
    model = mlp()
    assert run(model, "micro", scale=scale) == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient(model), gradient(whole), rtol=1e-5, atol=1e-7)


def test_class_weights_are_summed_over_the_window() -> None:
    weight = torch.tensor([1.0, 5.0, 0.2])
    x, y = (torch.cat(parts) for parts in zip(*window(), strict=True))
    losses = F.cross_entropy(mlp()(x), y, weight=weight, reduction="none")
    rows = losses.topk(4).indices
    expected = losses[rows].sum() / weight[y[rows]].sum()
    assert run(mlp(), "window", criterion=nn.CrossEntropyLoss(weight=weight)) == pytest.approx(
        expected.item(), rel=1e-6
    )


class Noisy(nn.Module):
    """Dropout and BatchNorm: both notice a second forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("engine", ["exact", "two_pass"])
def test_generators_and_running_statistics_end_as_after_plain_accumulation(engine: str) -> None:
    plain, trimmed = Noisy(), Noisy()
    torch.manual_seed(1)
    for x, y in window():
        F.cross_entropy(plain(x), y)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    run(trimmed, "window", engine)
    assert torch.equal(torch.get_rng_state(), after)
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, dict(trimmed.named_buffers())[name]), name


def test_a_window_trains_under_the_dropout_it_chose_under() -> None:
    """Against all graphs kept in memory at once, which is what the two passes stand for."""
    whole = Noisy()
    torch.manual_seed(1)
    losses = torch.cat([F.cross_entropy(whole(x), y, reduction="none") for x, y in window()])
    losses.topk(4).values.mean().backward()
    model = Noisy()
    torch.manual_seed(1)
    run(model, "window")
    torch.testing.assert_close(gradient(model), gradient(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.torch28
def test_everything_kept_is_the_plain_mean() -> None:
    for over in ("window", "micro"):
        whole, model = mlp(), mlp()
        x, y = (torch.cat(parts) for parts in zip(*window(), strict=True))
        F.cross_entropy(whole(x), y).backward()
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(1.0))
        for loss in batchtrim.accumulate(step, window(), over):
            loss.backward()
        torch.testing.assert_close(gradient(model), gradient(whole))


ENGINES_OVER = list(itertools.product(["exact", "two_pass", "shared"], ["window", "micro"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "over"), few(ENGINES_OVER, [each for each in ENGINES_OVER if each != ("shared", "micro")])
)
def test_under_autocast_and_a_scaler(engine: str, over: str) -> None:
    """Autocast may not reuse in the second pass the weights that it cast in the first, without a graph."""
    whole, model = mlp(), mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [F.cross_entropy(whole(x), y, reduction="none") for x, y in window()]
        if over == "window":
            expected = torch.cat(parts).topk(4).values.mean()
        else:
            expected = sum(  # type: ignore[assignment]
                len(part) / 11 * part.topk(batchtrim.keep_count(KEEP, len(part))).values.mean() for part in parts
            )
    expected.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(KEEP), engine)
    with torch.autocast("cpu", torch.bfloat16):
        for loss in batchtrim.accumulate(step, window(), over):
            scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(gradient(model), gradient(whole), rtol=2e-2, atol=2e-3)


@pytest.mark.torch28
def test_only_the_two_names_and_no_empty_window() -> None:
    step = batchtrim.TrimmedForward(mlp(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5))
    for over in ("window", "micro"):
        with pytest.raises(ValueError, match="expected `batches` to hold at least one micro-batch, got none"):
            next(batchtrim.accumulate(step, [], over))
    with pytest.raises(ValueError, match="expected `over` to be one of 'window', 'micro', got 'batch'"):
        next(batchtrim.accumulate(step, window(), "batch"))


class Normalizing(nn.Module):
    """Reads a buffer that it also updates, in place or by a new tensor."""

    def __init__(self, *, assign: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.assign = nn.Linear(6, 3), assign
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layer(x - self.mean)
        mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        if self.assign:
            self.mean = mean
        else:
            self.mean.copy_(mean)
        return outputs


@pytest.mark.parametrize("engine", ["exact", "two_pass"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_buffer_that_the_model_reads_is_what_it_was(engine: str, assign: bool) -> None:
    """The second pass of a micro-batch found the buffers as the whole first pass had left them."""
    whole, model = Normalizing(assign=assign), Normalizing(assign=assign)
    losses = torch.cat([F.cross_entropy(whole(x), y, reduction="none") for x, y in window()])
    losses.topk(4).values.mean().backward()
    assert run(model, "window", engine) == pytest.approx(losses.topk(4).values.mean().item(), rel=1e-5)
    torch.testing.assert_close(gradient(model), gradient(whole))
    torch.testing.assert_close(model.mean, whole.mean)
    assert model.state_dict()["mean"] is not None


class Momentum(nn.Module):
    """Its forward moves a slow copy of the weights, from its ``begin``-th call on."""

    def __init__(self, move: str, begin: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fast, self.slow, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)
        self.slow.requires_grad_(False)
        self.move, self.begin, self.calls = move, begin, 0

    def forward(self, x: Tensor) -> Tensor:
        slow, fast = self.slow.weight, self.fast.weight
        with torch.no_grad():
            if self.calls < self.begin:
                self.calls += 1
            elif self.move == "in place":
                slow.lerp_(fast, 0.3)
            elif self.move == "past autograd":
                slow.data.lerp_(fast, 0.3)
            else:
                slow.data = 0.7 * slow.data + 0.3 * fast.data
            key = self.slow(x)
        return self.head(self.fast(x) * key.tanh())


MOVES = ("in place", "past autograd", "by assignment")


@pytest.mark.parametrize(
    ("engine", "move", "compiled"),
    [
        *(("exact", move, False) for move in MOVES),
        ("exact", "past autograd", True),
        pytest.param("shared", "in place", False, marks=pytest.mark.slow),
    ],
)
def test_parameters_that_a_forward_moves_are_moved_once(engine: str, move: str, compiled: bool) -> None:
    """The first pass of a window moved them once more, and training ran with what it had left."""
    torch._dynamo.reset()
    plain, model = Momentum(move), Momentum(move)
    wrapped = torch.compile(model, backend="eager") if compiled else model
    step = batchtrim.TrimmedForward(wrapped, nn.CrossEntropyLoss(), batchtrim.Trimmer(KEEP), engine)
    for _ in range(2):
        batches, losses = window(), []
        for each in (plain, model):
            each.zero_grad()
        for x, y in batches:
            losses.append(F.cross_entropy(plain(x), y, reduction="none"))
        chosen = torch.cat([each.detach() for each in losses]).topk(4).indices
        for loss in batchtrim.accumulate(step, batches):
            loss.backward()
        assert sorted(step.trim.last.selection.indices.tolist()) == sorted(chosen.tolist())
        torch.testing.assert_close(model.slow.weight, plain.slow.weight)
        torch.cat(losses)[chosen].mean().backward()
        torch.testing.assert_close(gradient(model), gradient(plain))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, of its own look at a loss
def test_a_compiled_function_may_run_a_window() -> None:
    """Torch's tracer failed in the copy of the model's state that the window makes."""
    torch._dynamo.reset()
    model, twin, batches = mlp(), mlp(), window()
    step = batchtrim.TrimmedForward(model, batchtrim.per_sample(F.cross_entropy), batchtrim.Trimmer(KEEP), "exact")

    def train() -> float:
        return summed(step, batches, "window")

    for _ in range(2):
        assert torch.compile(train, backend="eager")() == pytest.approx(run(twin, "window"))
        torch.testing.assert_close(gradient(model), gradient(twin))


@pytest.mark.parametrize(("move", "compiled"), [*((move, False) for move in MOVES), ("in place", True)])
def test_two_passes_refuse_parameters_that_a_forward_moves(move: str, compiled: bool) -> None:
    torch._dynamo.reset()
    model = Momentum(move)
    wrapped = torch.compile(model, backend="eager") if compiled else model
    step = batchtrim.TrimmedForward(wrapped, nn.CrossEntropyLoss(), batchtrim.Trimmer(KEEP), "two_pass")
    held = model.slow.weight.detach().clone()
    for _ in range(2):  # the second time as well
        with pytest.raises(EngineRefused, match="cannot run this model: its forward writes into its parameters"):
            list(batchtrim.accumulate(step, window()))
    assert torch.equal(model.slow.weight, held)


@pytest.mark.parametrize("move", ["in place", "by assignment"])
def test_parameters_that_begin_to_move_later(move: str) -> None:
    model = Momentum(move, begin=3)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(KEEP), "exact")
    sum(batchtrim.accumulate(step, window())).backward()
    held = model.slow.weight.detach().clone()
    if move == "in place":
        with pytest.raises(EngineRefused, match=r"began to write into its parameters \(slow.weight\)"):
            list(batchtrim.accumulate(step, window()))
        return
    for loss in batchtrim.accumulate(step, window()):
        loss.backward()
    expected = model.fast.weight.lerp(held, 0.7**3)
    torch.testing.assert_close(model.slow.weight, expected)


@pytest.mark.filterwarnings("ignore:Graph break due to")  # torch 2.4's own
def test_auto_continues_with_exact_if_two_passes_cannot_train_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raised; and where two passes did not pay, the repeated forward moved buffers once more."""
    monkeypatch.setattr("batchtrim.engine.shared.refusal", lambda forward: "refused")
    for keep, mixes in ((KEEP, True), (0.8, False)):
        plain, model = Follows(mixes), Follows(mixes)
        model.compile(backend="eager")
        with pytest.warns(EngineFallback, match="two_pass"):
            step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(keep), "auto")
        losses = torch.cat([F.cross_entropy(plain(x), y, reduction="none") for x, y in window()])
        losses.topk(batchtrim.keep_count(keep, 11)).values.mean().backward()
        told = pytest.warns(EngineFallback, match=r"two-pass engine cannot .* engine='exact'")
        with told if mixes else nullcontext():
            for loss in batchtrim.accumulate(step, window()):
                loss.backward()
        torch.testing.assert_close(gradient(model), gradient(plain))
        torch.testing.assert_close(model.mean, plain.mean)


class Follows(nn.Module):
    """A buffer follows the batches; the samples of a batch mix if asked to."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.mixes = nn.Linear(6, 3), mixes
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layer(x - self.mean - (x.mean(0) if self.mixes else 0.0))
        self.mean.lerp_(x.mean(0), 0.3)
        return outputs


class InPlace(nn.Module):
    """Changes what it is given (pytorch/vision#517)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.div_(10))


def changing_loss(outputs: Tensor, y: Tensor) -> Tensor:
    y %= 2
    return F.cross_entropy(outputs, y, reduction="none")


@pytest.mark.parametrize("engine", ["exact", "two_pass"])
def test_inputs_changed_in_place_are_changed_once(engine: str) -> None:
    """The second pass got them changed."""
    whole, model = InPlace(), InPlace()
    losses = torch.cat([changing_loss(whole(x), y) for x, y in window()])
    losses.topk(4).values.mean().backward()
    step = batchtrim.TrimmedForward(model, changing_loss, batchtrim.Trimmer(KEEP), engine)
    total = sum(loss.backward() or loss.detach() for loss in batchtrim.accumulate(step, window()))
    torch.testing.assert_close(total, losses.topk(4).values.mean())
    torch.testing.assert_close(gradient(model), gradient(whole))


def test_a_first_pass_that_changes_its_batch_is_refused() -> None:
    """The caller runs the forward again on the same batch, as the Hugging Face Trainer's window does."""
    parts = [x for x, _ in window()]
    with pytest.raises(ValueError, match="expected the model and its loss to leave inputs and targets alone, got one"):
        first_pass(mlp(), parts, lambda x: x.add_(1))


def test_a_sum_beyond_half_precision() -> None:
    """40,000 losses of 5: their sum is beyond float16, and was inf; their mean is not."""
    step = batchtrim.TrimmedForward(nn.Identity(), lambda outputs, _: outputs, batchtrim.Trimmer(0.999), "exact")
    parts = [(torch.full((20_000,), 5.0).half().requires_grad_(), None) for _ in range(2)]
    for over in ("window", "micro"):
        assert sum(batchtrim.accumulate(step, parts, over)).item() == pytest.approx(5.0, rel=1e-3), over  # type: ignore[union-attr]
        assert batchtrim.Trimmer(0.999)(parts[0][0]).item() == 5.0


def test_inputs_without_a_batch_to_count() -> None:
    step = batchtrim.TrimmedForward(mlp(), nn.CrossEntropyLoss(), batchtrim.Trimmer(KEEP), "exact")
    with pytest.raises(ValueError, match="expected `x` to hold a tensor with a dimension 0, its batch, got 'text'"):
        next(batchtrim.accumulate(step, [("text", torch.zeros(2))], "micro"))
