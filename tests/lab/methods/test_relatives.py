"""Loss mass in the lab, and the relatives; test_table.py has the contract of all methods."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import batchtrim
from batchtrim.lab.methods.base import RunInfo
from batchtrim.lab.methods.relatives import Importance
from batchtrim.lab.methods.table import METHODS
from batchtrim.lab.run import loading, loop
from batchtrim.lab.run.config import RunConfig


def start(name: str, epochs: int = 4, **settings: Any) -> loop.Training:
    config = RunConfig(method=name, epochs=epochs, train_size=300, batch_size=64, lr=0.003, **settings).resolved()
    training = loop.Training(config, loading.load_images(config))
    training.prepare()
    return training


def finish(training: loop.Training) -> loop.Training:
    while training.epoch < training.epochs:
        training.advance()
    return training


def build(name: str, epochs: int = 10, **params: Any) -> Any:
    row = METHODS[name]
    return row.build(RunInfo(1000, 10, epochs, 100, 0), row.check_params(params))


def keeps(method: Any, epochs: int) -> list[float]:
    found = []
    for _ in range(epochs):
        found.append(round(method.trim.keep, 6))
        method.after_epoch(0.5)
    return found


def test_loss_mass_bounds_what_is_dropped_and_its_other_scale_and_control_keep_as_many() -> None:
    losses = torch.rand(64) ** 6
    mass, kept, control = (build(name) for name in ("loss_mass", "loss_mass_kept", "loss_mass_random"))
    loss = mass.loss(losses, torch.arange(64))
    assert 0.9 * losses.mean() <= loss < losses.mean()
    assert kept.loss(losses, torch.arange(64)) == pytest.approx(float(loss) * 64 / mass.trim.last_selection.k)
    control.loss(losses, torch.arange(64))
    assert mass.trim.last_selection.k == kept.trim.last_selection.k == control.trim.last_selection.k < 64
    assert build("loss_mass", skip=0.5, at_least=0.4).trim.rule == batchtrim.loss_mass(0.5, 0.4)
    with pytest.raises(ValueError, match=r"expected `loss_mass.at_least` up to `at_most`, got 0\.6 and 0\.5"):
        build("loss_mass", at_least=0.6, at_most=0.5)


def test_trim_late_starts_at_half_and_runs_through_the_schedule() -> None:
    found = keeps(build("trim_late", epochs=9), 9)
    assert found[:5] == [1.0] * 5  # epochs 0 to 3 before it, epoch 4 at its start
    assert found[5:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert keeps(build("trim_late", epochs=5, start=0.0), 5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(("epochs", "full"), [(16, 2), (8, 1), (3, 1), (2, 1), (1, 1)])
def test_trim_full_end_trims_to_the_end_of_the_schedule_and_then_not_at_all(epochs: int, full: int) -> None:
    found = keeps(build("trim_full_end", epochs=epochs), epochs)
    assert found[-full:] == [1.0] * full
    if epochs > 4:
        assert found[0] == 1.0
        assert 0.2 <= found[-full - 1] < 0.3
        assert found[:-full] == sorted(found[:-full], reverse=True)
    assert keeps(build("trim_full_end", epochs=4, last=1.0), 4) == [1.0] * 4


def test_data_dropout_keeps_what_is_improbable_and_the_last_epoch_whole() -> None:
    losses = -torch.tensor([0.9, 0.31, 0.29, 0.1]).log()
    method, matched = build("data_dropout", epochs=3), build("data_dropout_matched", epochs=3)
    for each in (method, matched):
        each.loss(losses, torch.arange(4))
        assert each.trim.last_selection.k == 2
        each.loss(losses[:3], torch.arange(3))
        assert each.trim.expected_keep == 1 / 3, "engine auto goes by what was kept, not by the 0.5 of the schedule"
        each.loss(losses, torch.arange(4))
    assert set(method.trim.last_selection.indices.tolist()) == {2, 3}
    for each in (method, matched):
        each.after_epoch(0.5)
        each.after_epoch(0.5)
        each.loss(losses, torch.arange(4))
        assert each.trim.last_selection.k == 4
    method = build("data_dropout", epochs=3)
    method.loss(torch.zeros(4), torch.arange(4))
    assert method.trim.last_selection.k == 1
    assert keeps(build("data_dropout_scalar", epochs=4, decay=0.5), 4) == [1.0, 0.5, 0.25, 1.0]


def test_the_matched_control_draws() -> None:
    method = build("data_dropout_matched")
    losses = torch.cat([torch.full((50,), 3.0), torch.zeros(50)])
    method.loss(losses, torch.arange(100))
    assert method.trim.last_selection.k == 50
    assert 5 < (method.trim.last_selection.indices < 50).sum() < 45


def test_importance_is_unbiased_and_draws_by_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    losses, scores = torch.rand(20, dtype=torch.float64), torch.rand(20, dtype=torch.float64) + 0.05
    of_kept, of_batch, counts = [], [], torch.zeros(20)
    for _ in range(4000):
        selection = Importance()(scores, 0.5, generator)
        of_kept.append(batchtrim.reduce(losses, selection))
        of_batch.append(batchtrim.reduce(losses, selection, "batch"))
        counts[selection.indices] += 1
        assert selection.k <= 10
    torch.testing.assert_close(torch.stack(of_kept), torch.stack(of_batch), rtol=1e-6, atol=1e-12)
    assert float(torch.stack(of_kept).mean()) == pytest.approx(float(losses.mean()), rel=0.02)
    assert counts[scores.argmax()] > 2 * counts[scores.argmin()]


def test_importance_accepts_zeros_and_keeps_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    assert Importance()(torch.zeros(8), 0.5, generator).k >= 1
    losses = torch.zeros(8)
    losses[5] = float("nan")
    assert Importance()(losses, 0.5, generator).indices.tolist() == [5]


def test_gradient_norm_reads_the_outputs() -> None:
    method = build("gradient_norm")
    outputs, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    method.watch(outputs, targets)
    logits = outputs.clone().requires_grad_()
    F.cross_entropy(logits, targets, reduction="sum").backward()
    torch.testing.assert_close(method.norms, logits.grad.norm(dim=1))  # type: ignore[union-attr]
    method.loss(F.cross_entropy(outputs, targets, reduction="none"), torch.arange(6))
    assert method.norms is None, "used once"


def test_loss_drop_keeps_what_fell_least() -> None:
    method = build("loss_drop", epochs=3)
    rows = torch.tensor([4, 7, 9, 2])
    first = torch.tensor([5.0, 1.0, 3.0, 0.5])
    assert method.loss(first, rows) == first.mean(), "the first epoch keeps everything"
    method.after_epoch(0.5)
    # fell by 4, 0.5, 0.1, 0.4
    assert method.loss(torch.tensor([1.0, 0.5, 2.9, 0.1]), rows) == pytest.approx((2.9 + 0.1) / 2)
    torch.testing.assert_close(method.first[rows], first)
    assert method.trim.last_selection.k == 2
    assert keeps(build("loss_drop", epochs=1), 1) == [1.0]


def test_proxy_counts_every_forward_and_the_network_sees_the_kept_alone() -> None:
    training = start("proxy", model="cnn", width=8)
    seen: list[int] = []
    training.model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    training.train_epoch()
    # 300 images in batches of 64: 4 of 64 and one of 44; the proxy sees 300, and learns in steps 0 and 4
    assert seen == [32, 32, 32, 32, 22]
    assert training.counts.samples_forward == 300 + 150
    assert training.counts.samples_backward == 150 + 64 + 44
    method: Any = training.method
    proxy, network = (sum(p.numel() for p in model.parameters()) for model in (method.proxy, training.model))
    assert proxy < network / 2 + 50
    assert method.optimizer.param_groups[0]["lr"] == training.optimizer.param_groups[0]["lr"]


def test_a_proxy_does_not_change_the_network_or_the_draws() -> None:
    plain, proxy = start("full"), start("proxy")
    for mine, theirs in zip(plain.model.parameters(), proxy.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(plain.order.get_state(), proxy.order.get_state())


@pytest.mark.parametrize("name", ["proxy", "gradient_norm", "loss_drop", "data_dropout"])
def test_relatives_train_in_half_precision(name: str) -> None:
    training = start(name, model="cnn", width=8, precision="bf16-mixed")
    while training.epoch < training.config.epochs:
        training.advance()
    assert all(parameter.isfinite().all() for parameter in training.model.parameters())


@pytest.mark.parametrize("name", ["trim", "loss_mass", "infobatch", "rho_loss", "loss_drop", "data_dropout", "proxy"])
def test_label_smoothing_ranks_by_the_plain_loss(name: str) -> None:
    training = start(name, label_smoothing=0.2)
    targets = torch.tensor([0, 1, 2, 3])
    outputs = torch.randn(4, 10)
    plain = F.cross_entropy(outputs, targets, reduction="none")
    smoothed = training.criterion(outputs, targets)
    torch.testing.assert_close(smoothed, F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.2))
    torch.testing.assert_close(training.criterion.plain(outputs, targets), plain)
    asked = []
    original = training.method.loss
    training.method.loss = lambda losses, rows, plain=None: asked.append(plain) or original(losses, rows, plain)  # type: ignore[method-assign]
    training.train_epoch()
    assert asked
    assert all(each is not None for each in asked)


def test_with_an_engine_label_smoothing_ranks_by_the_plain_loss_too() -> None:
    exact, engine = (start("loss_mass", label_smoothing=0.2, engine=name) for name in ("exact", "two_pass"))
    for training in (exact, engine):
        finish(training)
    assert exact.counts.samples_backward == engine.counts.samples_backward < 4 * 300
    with pytest.raises(ValueError, match=r"expected `label_smoothing` 0 with method 'focal', got 0\.1"):
        RunConfig(method="focal", label_smoothing=0.1).resolved()


def test_loss_mass_falls_by_itself_as_the_network_learns() -> None:
    training = finish(start("loss_mass", epochs=12))
    kept = training.curve["keep"]
    assert kept[0] > 0.8
    assert kept[-1] < kept[0] - 0.1
    assert math.isclose(sum(kept) * 300, training.counts.samples_backward)
