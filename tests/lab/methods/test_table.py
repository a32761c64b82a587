"""The contract that every method passes, and tests of single methods."""

from __future__ import annotations

import functools
import io
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import batchtrim
from batchtrim.lab.methods.base import InfoBatch, RunInfo
from batchtrim.lab.methods.table import METHODS, find_method, make_schedule
from batchtrim.lab.run import loading, loop
from batchtrim.lab.run.config import RunConfig
from tiers import few

ISSUE = {
    "full", "trim", "random", "ordered_sgd", "superquantile", "ohem", "selective_backprop", "selective_backprop_topk",
    "small_loss", "two_sided", "focal", "superloss", "infobatch", "rho_loss", "full_equal_compute",
    "loss_mass", "loss_mass_kept", "loss_mass_random", "trim_late", "trim_full_end", "data_dropout",
    "data_dropout_matched", "data_dropout_scalar", "proxy", "gradient_norm", "loss_drop",
}  # fmt: skip
every_method = pytest.mark.parametrize("name", METHODS)
# Each has the state of another method, and trains in the tests of every method: these train it three times more.
ALIKE = {
    "full_equal_compute", "superquantile", "ohem", "selective_backprop", "small_loss", "two_sided", "superloss",
    "loss_mass_kept", "loss_mass_random", "trim_late", "trim_full_end", "data_dropout_matched", "data_dropout_scalar",
}  # fmt: skip
every_state = pytest.mark.parametrize("name", few(METHODS, METHODS.keys() - ALIKE))


def config(name: str, **settings: Any) -> RunConfig:
    return RunConfig(method=name, epochs=4, train_size=300, batch_size=64, lr=0.003, **settings).resolved()


def start(name: str, **settings: Any) -> loop.Training:
    chosen = config(name, **settings)
    training = loop.Training(chosen, loading.load_images(chosen))
    training.prepare()
    return training


def finish(training: loop.Training) -> dict[str, Any]:
    """Train to the end; everything that must repeat, seconds left out."""
    while training.epoch < training.epochs:
        training.advance()
    curve = {name: values for name, values in training.curve.items() if name != "seconds"}
    counts = {name: value for name, value in vars(training.counts).items() if not name.startswith("seconds")}
    return {"curve": curve, "counts": counts, "weights": training.model.state_dict()}


@functools.cache
def trained(name: str) -> dict[str, Any]:
    """A method after training, for tests that only read it."""
    return finish(start(name))


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    weights = all(first["weights"][name].equal(second["weights"][name]) for name in first["weights"])
    return weights and first["curve"] == second["curve"] and first["counts"] == second["counts"]


def test_the_whole_family_is_there() -> None:
    assert set(METHODS) == ISSUE


@every_method
def test_it_trains(name: str) -> None:
    errors = trained(name)["curve"]["test_error"]
    assert errors[-1] < 0.75  # chance is 0.9; rho_loss steps on a tenth of each batch


@every_state
def test_a_seed_repeats_from_a_checkpoint_too_and_another_differs(name: str) -> None:
    """Bit for bit. Three runs: one without a checkpoint, one that writes it on its way, one that continues from it."""
    whole, other = start(name), start(name, seed=1)
    whole.advance()
    other.advance()
    assert not all(each.equal(other.model.state_dict()[key]) for key, each in whole.model.state_dict().items())
    whole.advance()
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    resumed = start(name)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert same(trained(name), finish(whole))
    assert same(trained(name), finish(resumed))


@every_method
def test_it_pickles(name: str) -> None:
    settings = pickle.loads(pickle.dumps(config(name)))
    assert settings == config(name)
    method = start(name).method
    again = pickle.loads(pickle.dumps(method))
    losses, rows = torch.rand(64), torch.arange(64)
    assert method.loss(losses, rows).equal(again.loss(losses, rows))


@every_method
def test_it_refuses_a_parameter_it_does_not_take(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected a parameter of method '{name}'.*got 'temperature'"):
        config(name, method_params={"temperature": 1.0})


@pytest.mark.parametrize(
    ("place", "value"),
    [(f"{row.name}.{param}", value) for row in METHODS.values() for param in row.params for value in ("much", -1)],
)
def test_it_refuses_bad_values_of_each_parameter(place: str, value: object) -> None:
    name, _, param = place.partition(".")
    with pytest.raises((ValueError, TypeError), match=f"`{place}`"):
        config(name, method_params={param: value})


@every_method
def test_a_last_batch_of_one_and_a_single_epoch_work(name: str) -> None:
    chosen = replace(config(name), epochs=1, train_size=65).resolved()
    training = loop.Training(chosen, loading.load_images(chosen))
    training.prepare()
    assert finish(training)["counts"]["steps"] == 2


@pytest.mark.parametrize("name", few(METHODS, ["proxy"]))  # whose network does not run on every row
def test_its_keep_log_has_every_sample(name: str) -> None:
    chosen = config(name)
    images = loading.load_images(chosen)
    log = batchtrim.KeepLog(len(images.train_labels), classes=images.classes)
    training = loop.Training(chosen, images, log=log)
    training.prepare()
    point = training.advance()
    table = log.table()
    assert table["seen"].tolist() == [1] * 300
    assert int(table["kept"].sum()) == round(300 * point["keep"])
    assert not table["last"].isnan().any()


def test_a_typo_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'infobatch'\?"):
        find_method("info_batch")


@pytest.mark.parametrize("engine", ["two_pass", "shared"])
@pytest.mark.parametrize("name", [row.name for row in METHODS.values() if not row.any_engine])
def test_an_engine_that_cannot_serve_is_refused(name: str, engine: str) -> None:
    with pytest.raises(ValueError, match=rf"`engine` to be 'exact' for method '{name}'"):
        config(name, engine=engine)


# --- what is particular to each ----------------------------------------------------------------------------------


def info(**changes: Any) -> RunInfo:
    return RunInfo(**{"samples": 1000, "classes": 10, "epochs": 10, "batch_size": 100, "seed": 0, **changes})


def build(name: str, where: RunInfo, **params: Any) -> Any:
    row = METHODS[name]
    return row.build(where, row.check_params(params))


def test_trim_and_random_keep_the_same_number() -> None:
    trim, random = trained("trim"), trained("random")
    assert trim["counts"] == random["counts"]
    assert trim["curve"]["keep"] == random["curve"]["keep"]
    assert trim["curve"]["kept_loss"][-1] > trim["curve"]["mean_loss"][-1]


def test_full_is_trim_that_keeps_everything() -> None:
    full = trained("full")
    all_kept = finish(start("trim", keep_end=1.0))
    assert same(full, all_kept)


def test_equal_compute_goes_backward_on_as_many_samples_as_trim() -> None:
    """By hand, 1000 samples, batch 100, linear 1 -> 0.2 over 5 epochs: 1000 * (1 + .8 + .6 + .4 + .2) = 3000."""
    method = build("full_equal_compute", info(epochs=5))
    assert method.budget == 3000
    assert method.epochs == 3.0
    trim, control = trained("trim"), trained("full_equal_compute")
    assert control["counts"]["samples_backward"] == trim["counts"]["samples_backward"]


def test_equal_compute_decays_its_learning_rate_to_the_end() -> None:
    control = trained("full_equal_compute")
    assert control["curve"]["lr"][-1] < 0.15 * 0.003
    assert len(control["curve"]["lr"]) == 3


def test_small_loss_drops_up_to_the_noise_rate() -> None:
    method = build("small_loss", info(epochs=21), noise_rate=0.3, ramp_epochs=10)
    keeps = []
    for _ in range(21):
        keeps.append(method.trim.keep)
        method.after_epoch(0.5)
    assert keeps[0] == 1.0
    assert keeps[5] == pytest.approx(0.85)
    assert keeps[10] == keeps[20] == pytest.approx(0.7)
    short = build("small_loss", info(epochs=6), noise_rate=0.3, ramp_epochs=10)
    short.trim.step(5)
    assert short.trim.keep == pytest.approx(1 - 0.3 * 5 / 10)


def test_ordered_sgd_follows_training_accuracy() -> None:
    method = build("ordered_sgd", info())
    assert method.trim.keep == 1.0
    method.after_epoch(0.85)
    assert method.trim.keep == 0.5
    method.after_epoch(0.999)
    assert method.trim.keep == 1 / 16


def test_selective_backprop_topk_acts_on_every_second_step_of_mid_training() -> None:
    method = build("selective_backprop_topk", info())
    keeps = []
    for _ in range(100):
        keeps.append(method.trim.keep)
        method.after_batch()
    assert set(keeps[:50]) == set(keeps[90:]) == {1.0}
    assert keeps[50:54] == [0.5, 1.0, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"start` to be less than `end`, got 0\.9 and 0\.5"):
        build("selective_backprop_topk", info(), start=0.9, end=0.5)


def test_infobatch_drops_easy_samples_and_weighs_the_rest_of_them_up() -> None:
    method: InfoBatch = build("infobatch", info(samples=10_000), ratio=0.25)
    order = torch.randperm(10_000)
    assert method.rows(order, 0).equal(order)
    losses = torch.arange(10_000).double().float()
    method.loss(losses, torch.arange(10_000))
    visited = method.rows(order, 1)
    hard = torch.arange(5_000, 10_000)
    assert torch.isin(hard, visited).all()
    easy = visited[visited < 5_000]
    assert len(easy) == pytest.approx(3750, abs=150)
    assert method.weights[easy].unique().tolist() == pytest.approx([1 / 0.75])
    assert method.weights[hard].unique().tolist() == [1.0]
    # weighted, the epoch counts as many samples as there are
    assert method.weights[visited].sum().item() == pytest.approx(10_000, rel=0.02)
    chosen = set(visited.tolist())
    assert visited.tolist() == [row for row in order.tolist() if row in chosen]  # in the epoch's order, each once


def test_infobatch_sees_everything_at_the_end() -> None:
    method = build("infobatch", info(epochs=16))
    order = torch.randperm(1000)
    method.loss(torch.rand(1000), order)
    assert [len(method.rows(order, epoch)) == 1000 for epoch in range(1, 16)] == [False] * 13 + [True] * 2


def test_infobatch_loss_is_the_weighted_mean() -> None:
    method: InfoBatch = build("infobatch", info())
    method.weights[:50] = 2.0
    losses = torch.rand(100)
    expected = (losses * method.weights[:100]).sum() / 100
    assert method.loss(losses, torch.arange(100)).item() == pytest.approx(expected.item())


def test_rho_loss_ranks_by_excess_over_the_held_out_network() -> None:
    asked = []

    def reference(rows: torch.Tensor, epochs: int, seed: int) -> torch.Tensor:
        asked.append((rows, epochs, seed))
        return torch.arange(1000).float()

    method = build("rho_loss", info(), keep=0.5, reference_epochs=3)
    method.prepare(reference)
    assert sorted(torch.cat([rows for rows, _, _ in asked]).tolist()) == list(range(1000))
    assert [epochs for _, epochs, _ in asked] == [3, 3]
    assert method.irreducible.tolist() == list(range(1000))
    losses = torch.tensor([5.0, 6.0, 7.0, 20.0])
    # excess over rows 1, 2, 3, 30: 4, 4, 4, -10; ties keep the lower row
    kept = method.loss(losses, torch.tensor([1, 2, 3, 30]))
    assert kept.item() == 5.5


def test_rho_loss_counts_the_held_out_networks() -> None:
    plain, rho = trained("full"), finish(start("rho_loss", method_params={"reference_epochs": 2}))
    # two networks on 150 images for 2 epochs each, and both score all 300
    assert rho["counts"]["samples_forward"] == plain["counts"]["samples_forward"] + 2 * 150 * 2 + 2 * 300


def test_focal_and_superloss_are_the_core_s() -> None:
    losses = torch.rand(50) * 3
    focal, superloss = build("focal", info(), gamma=1.5), build("superloss", info())
    assert focal.loss(losses, losses).equal(batchtrim.focal(losses, 1.5).mean())
    assert superloss.loss(losses, losses).equal(batchtrim.superloss(losses, math.log(10), 1.0).mean())
    assert focal.trim.stats.compute()["mean_loss"] == pytest.approx(losses.mean().item())


@pytest.mark.parametrize(
    ("name", "middle", "last"), [("linear", 0.6, 0.2), ("cosine", 0.6, 0.2), ("step", 0.6, 0.2), ("constant", 0.2, 0.2)]
)
def test_schedules_have_their_ends(name: str, middle: float, last: float) -> None:
    schedule = make_schedule(name, 1.0, 0.2)
    assert schedule(0.0) == (0.2 if name == "constant" else 1.0)
    assert schedule(0.5) == pytest.approx(middle)
    assert schedule(1.0) == last


@every_method
def test_it_has_a_card(name: str) -> None:
    card = Path(__file__).parents[3] / "docs" / "methods" / f"{name}.md"
    text = card.read_text()
    for heading in (
        "## Rule",
        "## Cost",
        "## When not to use it",
        "## Source",
        "## Differences from the authors' code",
    ):
        assert heading in text, f"{card.name} lacks {heading!r}"
    for param in METHODS[name].params:
        assert f"`{param}`" in text, f"{card.name} says nothing about {param}"
