"""The shared engine against the exact one, on networks of every kind, and where it must refuse."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import zoo
from harness import BATCH, error, prove_all, train
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import batchtrim
from batchtrim.engine.batch_norm import KeptBatchNorm
from batchtrim.engine.two_pass import padded_rows
from batchtrim.errors import EngineFallback, EngineRefused

GROUP = lambda width: nn.GroupNorm(2, width)  # noqa: E731
INSTANCE = lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True)  # noqa: E731

EXACT = {
    "group_norm": (lambda: zoo.Residual(GROUP), zoo.images),
    "layer_norm": (lambda: zoo.Residual(lambda width: nn.GroupNorm(1, width)), zoo.images),
    "instance_norm": (lambda: zoo.Residual(INSTANCE), zoo.images),
    "channels_last": (lambda: zoo.Residual(GROUP).to(memory_format=torch.channels_last), zoo.images_channels_last),
    "add_on_convolution": (zoo.AddOnConvolution, zoo.images),
    "encoder_batch_first": (lambda: zoo.Encoder(True), zoo.tokens),
    "encoder_time_major": (lambda: zoo.Encoder(False), zoo.tokens),
    "encoder_batch_first_dropout": (lambda: zoo.Encoder(True, 0.2), zoo.tokens),
    "encoder_time_major_dropout": (lambda: zoo.Encoder(False, 0.2), zoo.tokens),
    "attention_weights": (lambda: zoo.Attention(0.0), zoo.tokens),
    "attention_weights_dropout": (lambda: zoo.Attention(0.3), zoo.tokens),
    "attention_batch_first_dropout": (lambda: zoo.Attention(0.3, batch_first=True), zoo.tokens),
    "width_is_batch": (lambda: zoo.Mlp(BATCH, 0.3), zoo.vectors),
    "width_divides_batch": (lambda: zoo.Mlp(BATCH // 3), zoo.vectors),
    "width_is_twice_batch": (lambda: zoo.Mlp(2 * BATCH, 0.5), zoo.vectors),
    "length_is_batch": (lambda: zoo.Encoder(False, 0.1), lambda batch: zoo.tokens(batch, batch)),
    "stochastic_depth": (zoo.StochasticDepth, zoo.vectors),
    "layer_drop": (zoo.LayerDrop, zoo.vectors),
    "branching": (zoo.Branching, zoo.vectors),
    "sparse": (zoo.Sparse, zoo.vectors),
    "tied": (zoo.Tied, zoo.tokens),
    "checkpoint_reentrant": (lambda: zoo.Checkpointed(True), zoo.vectors),
    "checkpoint": (lambda: zoo.Checkpointed(False), zoo.vectors),
    "windows": (zoo.WindowShift, lambda batch: zoo.vectors(batch, 24)),
    "zero_init": (zoo.ZeroInit, zoo.tokens),
    "buffers": (zoo.Counter, zoo.vectors),
    "spectral_norm": (zoo.spectral, zoo.vectors),
    "lstm": (zoo.Recurrent, zoo.tokens),
    "lstm_dropout": (lambda: zoo.Recurrent(0.3), zoo.tokens),
}

REFUSED = {
    "batch_attention": (zoo.BatchAttention, zoo.vectors, "depends on the other samples"),
    "batch_mean": (zoo.BatchMean, zoo.vectors, "depends on the other samples"),
    "shuffled": (zoo.Shuffled, zoo.vectors, "index into the batch"),
    "checkpoint_dropout": (lambda: zoo.Checkpointed(False, 0.3), zoo.vectors, "checkpointing"),
    "checkpoint_reentrant_dropout": (lambda: zoo.Checkpointed(True, 0.3), zoo.vectors, "checkpointing"),
    "checkpoint_batch_norm": (lambda: zoo.Checkpointed(False, norm=True), zoo.vectors, "BatchNorm"),
}


@pytest.mark.parametrize("chains", ["large", "all"])
@pytest.mark.parametrize("name", EXACT)
def test_equals_exact(name: str, chains: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if chains == "all":
        monkeypatch.setattr("batchtrim.engine.chains._LEAST", 0)
    make, data = EXACT[name]
    exact, shared = (train(make, data, engine, steps=6) for engine in ("exact", "shared"))
    assert shared.sliced > 0, "nothing was taken from memory: the test would pass on a plain second forward"
    assert name == "layer_drop" or not shared.step.engine._failures
    assert shared.chosen == exact.chosen
    torch.testing.assert_close(shared.losses, exact.losses, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(shared.gradients, exact.gradients, strict=True):
        assert error(theirs, ours) <= 1e-5
    torch.testing.assert_close(shared.buffers, exact.buffers, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(shared.generators, exact.generators, strict=True):
        assert torch.equal(ours, theirs)
    assert shared.python == exact.python


def test_an_output_changed_in_place_is_remembered_as_it_was() -> None:
    shared = train(zoo.AddOnConvolution, zoo.images, "shared")
    assert shared.sliced == 3, "an operator whose remembered output was overwritten cannot be matched"


def test_dropout_on_values_that_tell_nothing_waits_until_they_do() -> None:
    exact, shared = (train(zoo.ZeroInitDropout, zoo.tokens, engine, steps=4) for engine in ("exact", "shared"))
    assert shared.sliced > 0
    for ours, theirs in zip(shared.gradients, exact.gradients, strict=True):
        assert error(theirs, ours) <= 1e-5


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 3), (3, 4, 2, 2)])
def test_batch_norm_of_all_rows_is_batch_norm(shape: tuple[int, ...], affine: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    gradient = torch.randn(shape, dtype=torch.float64)
    found = []
    for mode in (nullcontext(), KeptBatchNorm()):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4, affine=affine) if len(shape) == 4 else nn.BatchNorm1d(4, affine=affine)
        norm.double()
        if affine:
            nn.init.normal_(norm.weight)
        leaf = x.clone().requires_grad_()
        with mode:
            out = norm(leaf)
            seen = norm.eval()(x)
        out.backward(gradient)
        found.append([out, seen, leaf.grad, norm.running_mean, norm.running_var, *(p.grad for p in norm.parameters())])
    torch.testing.assert_close(found[1], found[0])
    with KeptBatchNorm():
        plain = torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, torch.backends.cudnn.enabled)
    torch.testing.assert_close(plain, F.batch_norm(x, None, None, training=True))


def test_a_channel_that_is_constant_over_the_kept_rows_has_a_finite_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2))
    nn.init.constant_(model[1].bias, -9.0)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.25), "shared")
    for _ in range(3):
        step(torch.randn(16, 3), torch.randint(0, 2, (16,))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_says_why(name: str) -> None:
    make, data, reason = REFUSED[name]
    with pytest.raises(EngineRefused, match=reason):
        train(make, data, "shared")


@pytest.mark.parametrize("name", REFUSED)
def test_auto_goes_on_exactly_with_one_warning(name: str) -> None:
    make, data, reason = REFUSED[name]
    exact = train(make, data, "exact")
    with pytest.warns(EngineFallback, match=reason) as caught:
        auto = train(make, data, "auto")
    assert sum(issubclass(each.category, EngineFallback) for each in caught) == 1
    assert auto.chosen == exact.chosen
    torch.testing.assert_close(auto.losses, exact.losses, rtol=0, atol=0)
    torch.testing.assert_close(auto.gradients, exact.gradients, rtol=0, atol=0)
    torch.testing.assert_close(auto.buffers, exact.buffers, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(auto.generators, exact.generators, strict=True))
    assert auto.step.trim.stats.compute() == exact.step.trim.stats.compute()


def test_contrastive_loss_is_refused() -> None:
    with pytest.raises(EngineRefused, match="depends on the other samples"):
        train(lambda: zoo.Mlp(8), zoo.vectors, "shared", loss=zoo.contrastive)


def test_model_for_one_batch_size_runs_exactly_and_is_given_up() -> None:
    make = lambda: zoo.HardCoded(BATCH)  # noqa: E731
    exact, shared = train(make, zoo.vectors, "exact"), train(make, zoo.vectors, "shared")
    torch.testing.assert_close(shared.gradients, exact.gradients, rtol=0, atol=0)
    with pytest.raises(EngineRefused, match="runs on 12 samples but not on 5"):
        train(make, zoo.vectors, "shared", steps=6)


@pytest.mark.parametrize("keep", [0.02, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0])
def test_any_keep(keep: float) -> None:
    make, data = EXACT["group_norm"]
    exact, shared = train(make, data, "exact", keep=keep), train(make, data, "shared", keep=keep)
    assert shared.chosen == exact.chosen
    for ours, theirs in zip(shared.gradients, exact.gradients, strict=True):
        assert error(theirs, ours) <= 1e-5


def test_batch_norm_keeps_statistics_and_direction() -> None:
    make, data = lambda: zoo.Residual(nn.BatchNorm2d), zoo.images
    # no update in between, so that buffers stay comparable
    exact, shared = (train(make, data, engine, lr=0.0, batch=32, keep=0.4) for engine in ("exact", "shared"))
    two_pass = train(make, data, "two_pass", lr=0.0, batch=32, keep=0.4)
    assert shared.chosen == exact.chosen
    torch.testing.assert_close(shared.losses, exact.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared.buffers, exact.buffers, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(two_pass.buffers, exact.buffers, rtol=1e-6, atol=1e-7)
    for ours, peers, theirs in zip(shared.gradients, two_pass.gradients, exact.gradients, strict=True):
        cosine = float(F.cosine_similarity(ours, theirs, dim=0))
        assert cosine >= 0.97
        assert cosine >= float(F.cosine_similarity(peers, theirs, dim=0))


@pytest.mark.parametrize("keep", [0.6, 0.25])
def test_batch_norm_backward_centres_and_scales_by_the_kept_rows(keep: float) -> None:
    # dx = weight / S * (g - mean(g) - u * mean(g * u)), u the rows that go backward, centred and scaled by their own
    torch.manual_seed(3)
    batch = 64
    x = torch.randn(batch, 2, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, eps=1e-12)).double()
    nn.init.eye_(model[0].weight)
    scale = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    losses = lambda out, _: (out * scale).sum(1) ** 2  # noqa: E731
    trim = batchtrim.Trimmer(keep)
    batchtrim.TrimmedForward(model, losses, trim, "shared")(x).backward()
    kept = trim.last_selection.rising()
    rows = padded_rows(kept, 2 if keep < 0.5 else 0)
    assert len(rows) == kept.k + (2 if keep < 0.5 else 0)
    normal = ((x - x.mean(0)) / x.std(0, unbiased=False))[rows]
    g = 2 * (normal * scale).sum(1, keepdim=True) * scale / kept.k
    g[kept.k :] = 0  # companions have no loss
    own = (x[rows] - x[rows].mean(0)) / x[rows].std(0, unbiased=False)
    dx = (g - g.mean(0) - own * (g * own).mean(0)) / x.std(0, unbiased=False)
    torch.testing.assert_close(dx.sum(0), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close((dx * x[rows]).sum(0), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(model[0].weight.grad, dx.t() @ x[rows])
    torch.testing.assert_close(model[1].weight.grad, (g * normal).sum(0))
    torch.testing.assert_close(model[1].bias.grad, g.sum(0))


def test_autocast_and_grad_scaler_dtype() -> None:
    def make() -> nn.Module:
        return zoo.Autocast(zoo.Residual(GROUP))

    exact, shared = train(make, zoo.images, "exact"), train(make, zoo.images, "shared")
    assert shared.sliced > 0
    assert shared.chosen == exact.chosen
    for ours, theirs in zip(shared.gradients, exact.gradients, strict=True):
        assert error(theirs, ours) <= 2e-2  # bf16 keeps 8 bits


def test_dict_and_tuple_inputs_and_time_major_batch_dim() -> None:
    as_dict = lambda batch: {"tokens": zoo.tokens(batch), "scale": torch.tensor(2.0)}  # noqa: E731
    for data in (as_dict, lambda batch: tuple(as_dict(batch).values())):
        exact, shared = train(zoo.TwoInputs, data, "exact"), train(zoo.TwoInputs, data, "shared")
        assert error(exact.gradients[-1], shared.gradients[-1]) <= 1e-5
    time_major = lambda batch: torch.randn(7, batch, 8)  # noqa: E731
    runs = [train(zoo.TimeMajor, time_major, engine, batch_dim=1) for engine in ("exact", "shared")]
    assert runs[1].sliced > 0
    assert error(runs[0].gradients[-1], runs[1].gradients[-1]) <= 1e-5


def test_new_shapes_are_proven_anew() -> None:
    torch.manual_seed(0)
    step = batchtrim.TrimmedForward(zoo.Encoder(False), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    for length in (4, 6, 6, 4, 9):
        step(zoo.tokens(BATCH, length), torch.randint(0, 5, (BATCH,))).backward()
    step(zoo.tokens(5, 6), torch.randint(0, 5, (5,))).backward()
    assert len(step.engine.plans) == 4


def test_verified_again_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    step = batchtrim.TrimmedForward(zoo.Mlp(8), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    step.engine.verify_every = 3
    adopted = []
    adopt = step.engine._adopt
    monkeypatch.setattr(step.engine, "_adopt", lambda key, plan: (adopted.append(number), adopt(key, plan)))
    for number in range(8):  # noqa: B007
        step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
    assert adopted == [0, 3, 6]


def test_operators_that_change_between_steps_never_give_a_wrong_gradient() -> None:
    exact, shared = (train(zoo.Alternating, zoo.vectors, engine, steps=4) for engine in ("exact", "shared"))
    for ours, theirs in zip(shared.gradients, exact.gradients, strict=True):
        assert error(theirs, ours) <= 1e-5


def test_a_planted_wrong_layout_is_caught_before_its_backward() -> None:
    make, data = EXACT["encoder_time_major"]
    torch.manual_seed(0)
    step = batchtrim.TrimmedForward(make(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "shared")
    exact = batchtrim.TrimmedForward(step.forward.model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "exact")
    x, y = data(BATCH), torch.randint(0, 5, (BATCH,))
    step(x, y)
    (plan,) = step.engine.plans.values()
    for place, planned in enumerate(plan.steps):  # batch-minor taken for batch-major
        layouts = tuple(
            type(layout)(layout.dim, layout.inner, layout.outer) if layout.outer > 1 else layout
            for layout in planned.layouts or ()
        )
        plan.steps[place] = type(planned)(planned.func, layouts, planned.shapes)
    loss = prove_all(step, x, y)
    assert step.engine._failures, "a wrong layout went unnoticed"
    torch.testing.assert_close(loss, exact(x, y), rtol=0, atol=0)


@pytest.mark.parametrize("error_type", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("at_call", [1, 2, 3])
def test_after_an_exception_nothing_stays_behind(error_type: type[BaseException], at_call: int) -> None:
    torch.manual_seed(0)
    model = zoo.Failing(error_type)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    step(x, y)
    statistics = model.norm.running_mean.clone(), int(model.norm.num_batches_tracked)
    generator = torch.get_rng_state()
    model.fail_in = at_call
    if error_type is RuntimeError and at_call == 2:
        step(x, y)  # runs on the whole batch and not on a part of it: done again exactly, this is call 3
        return
    if at_call < 3:
        with pytest.raises(error_type):
            step(x, y)
        assert torch.equal(model.norm.running_mean, statistics[0])
        assert int(model.norm.num_batches_tracked) == statistics[1]
        assert torch.equal(torch.get_rng_state(), generator)
    assert not _get_current_dispatch_mode_stack()
    model.fail_in = 0
    step(x, y).backward()


def test_remembered_outputs_are_let_go() -> None:
    torch.manual_seed(0)
    model = zoo.Mlp(8)
    seen: list[weakref.ref] = []
    model[0].register_forward_hook(lambda _, __, out: seen.append(weakref.ref(out)))
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    for _ in range(2):
        loss = step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))
    del loss
    gc.collect()
    assert seen
    assert all(ref() is None for ref in seen)


def test_backward_sees_kept_rows_only() -> None:
    torch.manual_seed(0)
    model = zoo.Mlp(8)
    rows: list[int] = []
    model[3].register_full_backward_hook(lambda _, __, grad: rows.append(grad[0].shape[0]))
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.25), "shared")
    for _ in range(2):
        step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
    assert rows == [3, 3]


def test_no_convolution_is_computed_twice() -> None:
    torch.manual_seed(0)
    make, data = EXACT["group_norm"]
    step = batchtrim.TrimmedForward(make(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    x, y = data(BATCH), torch.randint(0, 5, (BATCH,))
    step(x, y)
    with torch.profiler.profile() as profile:
        step(x, y)
    calls = [event.name for event in profile.events()]
    assert calls.count("aten::mkldnn_convolution") + calls.count("aten::thnn_conv2d") == 3


def test_rank_by_another_loss_and_masks() -> None:
    def smoothed(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out, y, reduction="none", label_smoothing=0.2)

    def plain(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out, y, reduction="none")

    def masked(out: torch.Tensor, y: torch.Tensor) -> batchtrim.Losses:
        return batchtrim.Losses(plain(out, y), y != 0)

    for options in ({"loss": smoothed, "rank_by": plain}, {"loss": masked}):
        runs = [train(lambda: zoo.Mlp(8), zoo.vectors, engine, **options) for engine in ("exact", "shared")]
        assert runs[0].chosen == runs[1].chosen
        assert error(runs[0].gradients[-1], runs[1].gradients[-1]) <= 1e-5


def test_compiled_models_and_elements_are_handed_on() -> None:
    compiled = torch.compile(zoo.Mlp(8), backend="eager")
    with pytest.raises(EngineRefused, match="compiled"):
        batchtrim.TrimmedForward(compiled, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    with pytest.warns(EngineFallback, match="two_pass"):
        step = batchtrim.TrimmedForward(compiled, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "auto")
    assert step.engine.saving.name == "two_pass"
    for engine in ("shared", "two_pass"):
        with pytest.raises(EngineRefused, match="elements"):
            batchtrim.TrimmedForward(zoo.Mlp(8), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5, unit="element"), engine)


class _FunctionalDropout(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize(
    "noisy", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(8), lambda: _FunctionalDropout(8, 8)]
)
def test_a_compiled_model_whose_second_pass_would_differ_goes_to_exact(noisy: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), noisy(), nn.Linear(8, 5))
    twin = copy.deepcopy(model)
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        step = batchtrim.TrimmedForward(compiled, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.3), "auto")
        torch.manual_seed(1)
        step(x, y).backward()
    said = [str(each.message) for each in told if each.category is EngineFallback]
    assert said[-1].endswith("Going on with engine='exact'.")
    assert step.engine.saving is None
    torch.manual_seed(1)
    batchtrim.TrimmedForward(twin, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.3), "exact")(x, y).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_elements_are_chosen_one_by_one() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 1)
    x, y = torch.randn(4, 3, 4, 4), torch.randint(5, (4, 4, 4))
    y[0] = 3
    trim = batchtrim.Trimmer(0.25, unit="element")
    with pytest.warns(EngineFallback, match="exact"):
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(ignore_index=3), trim, "auto")
    loss = step(x, y)
    values = nn.functional.cross_entropy(model(x), y, reduction="none")[y != 3]
    k = batchtrim.keep_count(0.25, len(values))
    assert step.last.selection.k == k
    torch.testing.assert_close(loss, values.topk(k).values.mean())
    with pytest.raises(ValueError, match="expected `per_sample_loss` and `trim` to have one unit"):
        batchtrim.TrimmedForward(
            model, batchtrim.per_sample(nn.CrossEntropyLoss(), unit="element"), batchtrim.Trimmer(1)
        )


def test_without_gradients_it_is_one_plain_forward() -> None:
    torch.manual_seed(0)
    step = batchtrim.TrimmedForward(zoo.Mlp(8), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    with torch.no_grad():
        loss = step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))
    assert not loss.requires_grad
    assert step.last.outputs.shape == (BATCH, 5)
    assert not step.engine.plans


def test_nan_losses_are_kept_as_in_plain_training() -> None:
    torch.manual_seed(0)
    step = batchtrim.TrimmedForward(zoo.Mlp(8), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    step(x, y)
    x[3] = float("nan")
    assert step(x, y).isnan()
    assert 3 in step.trim.last_selection.indices
    x[3] = 0.0
    assert step(x, y).isfinite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["group_norm", "channels_last", "encoder_time_major_dropout", "layer_drop"])
def test_equals_exact_on_cuda(name: str) -> None:
    make, data = EXACT[name]
    to_device = lambda: make().cuda()  # noqa: E731
    runs = [train(to_device, lambda batch: data(batch).cuda(), engine) for engine in ("exact", "shared")]
    assert runs[0].chosen == runs[1].chosen
    assert error(runs[0].gradients[-1], runs[1].gradients[-1]) <= 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batch_norm_on_cuda_uses_no_vendor_kernel_in_the_kept_graph() -> None:
    make = lambda: zoo.Residual(nn.BatchNorm2d).cuda()  # noqa: E731
    data = lambda batch: zoo.images(batch).cuda()  # noqa: E731
    exact, shared = (train(make, data, engine, lr=0.0, batch=32) for engine in ("exact", "shared"))
    torch.testing.assert_close(shared.buffers, exact.buffers, rtol=1e-5, atol=1e-6)
    assert float(F.cosine_similarity(shared.gradients[-1], exact.gradients[-1], dim=0)) >= 0.97
