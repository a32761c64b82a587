"""The shared engine against the exact one, on networks of every kind."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from harness import BATCH, agree, error, train
from torch import nn

import batchtrim
from batchtrim.engine import tape
from tiers import few

GROUP = lambda width: nn.GroupNorm(2, width)  # noqa: E731
INSTANCE = lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True)  # noqa: E731

# rows never meet: all of the backward runs on the kept ones
EXACT = {
    "group_norm": (lambda: zoo.Residual(GROUP), zoo.images),
    "instance_norm": (lambda: zoo.Residual(INSTANCE), zoo.images),
    "channels_last": (lambda: zoo.Residual(GROUP).to(memory_format=torch.channels_last), zoo.images_channels_last),
    "add_on_convolution": (zoo.AddOnConvolution, zoo.images),
    "encoder": (lambda: zoo.Encoder(True, 0.0, 1), zoo.tokens),
    "encoder_batch_first_dropout": (lambda: zoo.Encoder(True, 0.2, 1), zoo.tokens),
    "encoder_time_major_dropout": (lambda: zoo.Encoder(False, 0.2, 1), zoo.tokens),
    "attention_weights_dropout": (lambda: zoo.Attention(0.3), zoo.tokens),
    "width_is_batch": (lambda: zoo.Mlp(BATCH, 0.3), zoo.vectors),
    "width_is_twice_batch": (lambda: zoo.Mlp(2 * BATCH, 0.5), zoo.vectors),
    "length_is_batch": (lambda: zoo.Encoder(False, 0.1, 1), lambda batch: zoo.tokens(batch, batch)),
    "stochastic_depth": (zoo.StochasticDepth, zoo.vectors),
    "tied": (zoo.Tied, zoo.tokens),
    "checkpoint_reentrant": (lambda: zoo.Checkpointed(True), zoo.vectors),
    "checkpoint_dropout": (lambda: zoo.Checkpointed(False, 0.3), zoo.vectors),
    "windows": (zoo.WindowShift, lambda batch: zoo.vectors(batch, 24)),
    "zero_init": (zoo.ZeroInit, zoo.tokens),
    "zero_init_dropout": (zoo.ZeroInitDropout, zoo.tokens),
    "buffers": (zoo.Counter, zoo.vectors),
    "spectral_norm": (zoo.spectral, zoo.vectors),
    "lstm": (lambda: zoo.Recurrent(layers=1), lambda batch: zoo.tokens(batch, 3)),
    "prototypes": (zoo.Prototypes, zoo.vectors),
    "own_kernels": (zoo.OwnKernels, zoo.images),
    "transformed": (zoo.Transformed, zoo.images),
    "matrices": (zoo.Matrices, zoo.vectors),
}

# rows meet: exact all the same, and whole from there on; the operator that mixes, and how
PARTLY = {
    "batch_attention": (zoo.BatchAttention, zoo.vectors, "mm", "rows"),
    "batch_mean": (zoo.BatchMean, zoo.vectors, "expand", "rows that are not kept"),
    "constant": (zoo.Slopes, zoo.vectors, "expand", "rows that are not kept"),
    "shuffled": (zoo.Shuffled, zoo.vectors, "index_put", "index into the batch"),
}


@pytest.fixture(scope="module")
def traced() -> batchtrim.TrimmedForward:
    """A step that is traced already, for tests that leave it as it was: a trace takes longer than all they do."""
    torch.manual_seed(0)
    step = batchtrim.TrimmedForward(zoo.Mlp(8), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))
    return step


# In every run: images. Buffers are in test_compiled.py, tokens and shared weights in
# test_tokens.py.
DEFAULT = ("group_norm",)


@pytest.mark.parametrize("name", few(EXACT, DEFAULT))
def test_equals_exact(name: str) -> None:
    make, data = EXACT[name]
    exact, shared = (train(make, data, engine, steps=4) for engine in ("exact", "shared"))
    assert shared.share == 1.0, f"rows meet at {shared.step.engine.trace.mixing(True)}"
    assert shared.step.last.engine == "shared"
    agree(exact, shared)


@pytest.mark.parametrize("name", few(PARTLY, ["shuffled"]))
def test_rows_that_meet_are_exact_and_whole_from_there_on(name: str) -> None:
    make, data, operator, reason = PARTLY[name]
    exact, shared = (train(make, data, engine) for engine in ("exact", "shared"))
    agree(exact, shared)
    assert 0.0 < shared.share < 1.0
    place, why = shared.step.engine.trace.mixing(True)
    assert operator in place
    assert reason in why


@pytest.mark.parametrize("keep", few([0.02, 0.2, 0.6, 0.95, 1.0], [1.0]))
def test_any_keep_equals_exact(keep: float) -> None:
    make, data = EXACT["group_norm"]
    agree(train(make, data, "exact", keep=keep), train(make, data, "shared", keep=keep))


@pytest.mark.slow
@pytest.mark.parametrize("keep", few([0.02, 0.2], [0.02]))
def test_a_single_kept_row_may_have_any_memory_layout(keep: float) -> None:
    """As in transformers' Doge: a view in backward was possible on all rows and not on one."""
    agree(*(train(zoo.GatedAttention, zoo.tokens, engine, keep=keep) for engine in ("exact", "shared")))


@pytest.mark.slow  # by default test_accumulation.py has a window of it
def test_autocast_equals_exact_up_to_bfloat16() -> None:
    make = lambda: zoo.Autocast(zoo.Residual(GROUP))  # noqa: E731
    agree(train(make, zoo.images, "exact"), train(make, zoo.images, "shared"), 2e-2)  # bf16 keeps 8 bits


@pytest.mark.slow  # by default test_accumulation.py has a window of it
def test_autocast_around_the_step_and_a_gradient_scaler() -> None:
    found = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        model = zoo.Residual(GROUP)
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = step(zoo.images(BATCH), torch.randint(0, 5, (BATCH,)))
        scaler.scale(loss).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert error(found[0], found[1]) <= 2e-2


@pytest.mark.parametrize("kind", few([dict, tuple], [dict]))
def test_dict_and_tuple_inputs_and_outputs_in_a_dataclass(kind: type) -> None:
    def data(batch: int) -> Any:
        found = {"tokens": zoo.tokens(batch), "scale": torch.tensor(2.0)}
        return found if kind is dict else tuple(found.values())

    logits = lambda out, y: F.cross_entropy(out.logits, y, reduction="none")  # noqa: E731
    exact, shared = (train(zoo.DataOfTwoInputs, data, engine, loss=logits) for engine in ("exact", "shared"))
    agree(exact, shared)
    assert type(shared.step.last.outputs) is type(exact.step.last.outputs)
    assert not shared.step.last.outputs.logits.requires_grad


@pytest.mark.slow
def test_time_major_batch_dim() -> None:
    time_major = lambda batch: torch.randn(7, batch, 8)  # noqa: E731
    runs = [train(zoo.TimeMajor, time_major, engine, batch_dim=1) for engine in ("exact", "shared")]
    assert runs[1].share == 1.0
    agree(*runs)


@pytest.mark.slow
def test_one_odd_last_batch_makes_at_most_two_traces() -> None:
    for make, data in (EXACT["group_norm"], EXACT["encoder_time_major_dropout"]):
        torch.manual_seed(0)
        model = make()
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
        for batch in (20, 20, 7, 20, 7, 20, 1, 2):
            step(data(batch), torch.randint(0, 5, (batch,))).backward()
        assert step.engine.capture.traces <= 2


@pytest.mark.slow
def test_other_lengths_are_traced_once_more() -> None:
    torch.manual_seed(0)
    step = batchtrim.TrimmedForward(
        zoo.Encoder(False, layers=1), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared"
    )
    exact = batchtrim.TrimmedForward(step.forward.model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "exact")
    for length in (4, 6, 9, 4, 5):
        x, y = zoo.tokens(BATCH, length), torch.randint(0, 5, (BATCH,))
        gradients = [torch.autograd.grad(each(x, y), list(step.forward.model.parameters())) for each in (step, exact)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert step.engine.capture.traces <= 2


@pytest.mark.slow
def test_weights_frozen_and_set_free_between_steps(traced: batchtrim.TrimmedForward) -> None:
    model = traced.forward.model
    twin = copy.deepcopy(model)
    exact = batchtrim.TrimmedForward(twin, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "exact")
    for free in (True, False, True):
        x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
        for step in (traced, exact):
            step.forward.model[0].weight.requires_grad_(free)
            step.forward.model.zero_grad()
            step(x, y).backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.slow
def test_a_hook_added_later_is_seen(traced: batchtrim.TrimmedForward) -> None:
    model = traced.forward.model
    exact = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "exact")
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    traced(x, y)
    hook = model[0].register_forward_hook(lambda _, __, out: 2 * out)
    torch.testing.assert_close(traced(x, y), exact(x, y))
    hook.remove()


def test_an_exception_inside_a_step_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.05), "shared")
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    step(x, y).backward()
    assert step.last.selection.k == 1, "a single kept sample does not break BatchNorm"
    for error_type in (RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError):
        _fails_once(step, x, y, error_type)


def _fails_once(step: batchtrim.TrimmedForward, x: Any, y: Any, error_type: type[BaseException]) -> None:
    before = copy.deepcopy(step.forward.model.state_dict())
    run = step.engine.trace._forward

    def fails(args: Any) -> Any:
        run(args)
        raise error_type("planted")

    step.engine.trace._forward = fails
    with pytest.raises(error_type, match="planted"):
        step(x, y)
    torch.testing.assert_close(step.forward.model.state_dict(), before)
    step.engine.trace._forward = run
    step(x, y).backward()


def test_what_was_saved_is_let_go(traced: batchtrim.TrimmedForward, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.freeze()  # leaves what is alive by now out of the collection below
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    tapes: list[weakref.ref] = []
    cut = traced.engine._cut
    monkeypatch.setattr(traced.engine, "_cut", lambda tape, *rest: (tapes.append(weakref.ref(tape)), cut(tape, *rest)))
    for _ in range(2):
        loss = traced(x, y)
        assert all(t.shape[0] < BATCH for t in tapes[-1]().kept.values())
        assert not tapes[-1]().saved
    loss.backward()
    del loss
    gc.collect()
    assert tapes
    assert all(ref() is None for ref in tapes)


@pytest.mark.slow
def test_small_tensors_are_cut_first_to_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    cut = tape.cut

    def noted(tensor: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return cut(tensor, *rest)

    monkeypatch.setattr(tape, "cut", noted)
    step = batchtrim.TrimmedForward(zoo.Residual(GROUP), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "shared")
    step(zoo.images(BATCH), torch.randint(0, 5, (BATCH,)))  # backward cuts the gradient of the losses besides
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 3


def test_backward_twice(traced: batchtrim.TrimmedForward) -> None:
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    parameters = list(traced.forward.model.parameters())
    loss = traced(x, y)
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), first)


def test_a_batch_changed_between_forward_and_backward_does_not_change_the_gradient(traced: Any) -> None:
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    parameters = list(traced.forward.model.parameters())
    expected = torch.autograd.grad(traced(x, y), parameters)
    loss = traced(x, y)
    x.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected)


def test_weights_changed_between_forward_and_backward_are_noticed(traced: batchtrim.TrimmedForward) -> None:
    loss = traced(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))
    with torch.no_grad():
        traced.forward.model[-1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_is_noted_on_the_callers_tensors(traced: batchtrim.TrimmedForward) -> None:
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    traced(x, y)
    assert not vars(x)
    assert not vars(y)


@pytest.mark.slow
def test_gradient_of_the_inputs() -> None:
    torch.manual_seed(0)
    model = zoo.Mlp(8)
    x, y = zoo.vectors(BATCH).requires_grad_(), torch.randint(0, 5, (BATCH,))
    found = [
        torch.autograd.grad(batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), e)(x, y), x)
        for e in ("exact", "shared")
    ]
    torch.testing.assert_close(found[0], found[1])


def smoothed(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out, y, reduction="none", label_smoothing=0.2)


def plain(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out, y, reduction="none")


def masked(out: torch.Tensor, y: torch.Tensor) -> batchtrim.Losses:
    return batchtrim.Losses(plain(out, y), y != 0)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "rank_by"), few([(smoothed, plain), (masked, None)], [(smoothed, plain)]))
def test_rank_by_another_loss_and_masks(loss: Any, rank_by: Any) -> None:
    options = {"loss": loss, **({} if rank_by is None else {"rank_by": rank_by})}
    agree(*(train(lambda: zoo.Mlp(8), zoo.vectors, engine, **options) for engine in ("exact", "shared")))


def test_without_gradients_it_is_one_plain_forward() -> None:
    torch.manual_seed(0)
    step = batchtrim.TrimmedForward(zoo.Mlp(8), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    with torch.no_grad():
        loss = step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))
    assert not loss.requires_grad
    assert step.last.outputs.shape == (BATCH, 5)
    assert step.engine.capture.traces == 0


def test_nan_losses_are_kept_as_in_plain_training(traced: batchtrim.TrimmedForward) -> None:
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    traced(x, y)
    x[3] = float("nan")
    assert traced(x, y).isnan()
    assert 3 in traced.trim.last_selection.indices
    x[3] = 0.0
    assert traced(x, y).isfinite()


@pytest.mark.slow  # by default test_dict_and_tuple_inputs_and_outputs_in_a_dataclass
@pytest.mark.parametrize("make", [zoo.NamedOutput, zoo.DataOutput])
def test_outputs_are_of_the_models_own_type(make: type) -> None:
    torch.manual_seed(0)
    model = make()
    loss = lambda out, y: F.cross_entropy(out.logits, y, reduction="none")  # noqa: E731
    step = batchtrim.TrimmedForward(model, loss, batchtrim.Trimmer(0.5), "shared")
    step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
    assert type(step.last.outputs) is type(model(zoo.vectors(2)))
    assert not step.last.outputs.logits.requires_grad


@pytest.mark.slow
def test_the_approximate_form_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """BatchNorm's means over the kept rows: the gradient is off, and only `step.last` told."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    for _ in range(3):
        step(torch.randn(8, 5), torch.randint(0, 3, (8,))).backward()
        assert step.last is not None
        assert step.last.approximate == "the means of BatchNorm's backward are taken over the kept rows"
    assert [record.message for record in caplog.records if record.name == "batchtrim"] == [
        "engine='shared' is approximate for this model: the means of BatchNorm's backward are taken over the kept rows."
    ]
