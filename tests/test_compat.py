"""The calls of mbtrim and sqwash: values by hand, and each fault that is fixed."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import pytest
import torch

import batchtrim
from batchtrim import compat
from batchtrim.compat import SuperquantileReducer, get_adapted_loss_for_trimmed_minibatch, reduce_superquantile
from batchtrim.errors import PassUnreducedLosses


def golden(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((Path(__file__).parent / "golden" / name).read_text().splitlines()))


def trimmed(row: dict[str, str]) -> torch.Tensor:
    losses = torch.randperm(int(row["batch"])).double()
    a, b = float(row.get("a", 1.0)), float(row.get("b", 0.2))
    return get_adapted_loss_for_trimmed_minibatch(
        losses, int(row["epoch"]), int(row["epochs"]), a, b, row.get("scheme", "linear")
    )


@pytest.mark.parametrize("row", golden("linear_1.0_0.2.csv") + golden("mbtrim.csv"), ids=lambda row: str(row.values()))
def test_mbtrim_golden(row: dict[str, str]) -> None:
    kept = sorted(trimmed(row).tolist())
    assert kept == list(range(int(row["batch"])))[-int(row["k"]) :], "the k largest"


@pytest.mark.filterwarnings("ignore::batchtrim.errors.ClockPastTotal")  # two epochs past the end, on purpose
def test_mbtrim_is_the_trimmer_with_a_mean_around_it() -> None:
    losses = torch.rand(50)
    for epochs in (1, 2, 7):
        trim = batchtrim.Trimmer(batchtrim.linear(0.9, 0.3), total=epochs)
        for epoch in range(epochs + 2):
            ours, theirs = losses.clone().requires_grad_(), losses.clone().requires_grad_()
            trim(ours).backward()
            get_adapted_loss_for_trimmed_minibatch(theirs, epoch, epochs, 0.9, 0.3, "linear").mean().backward()
            torch.testing.assert_close(theirs.grad, ours.grad)
            trim.step()


def test_mbtrim_first_epoch_is_plain_training_bit_for_bit() -> None:
    losses = torch.rand(37)
    assert torch.equal(get_adapted_loss_for_trimmed_minibatch(losses, 0, 9, 1.0, 0.2, "linear"), losses)


def test_mbtrim_trims_samples_where_losses_have_a_length() -> None:
    losses = torch.tensor([[9.0, 0.0], [5.0, 5.0], [0.0, 8.0], [1.0, 1.0]])  # per column it would keep 9 and 8
    assert get_adapted_loss_for_trimmed_minibatch(losses, 9, 10, 1.0, 0.25, "linear").tolist() == [5.0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss": torch.tensor(0.5)}, PassUnreducedLosses, r"got \(\). .*reduction='none'"),
        ({"max_epochs": -1}, ValueError, "expected `max_epochs` to be at least 1, got -1. .*count batches"),
        ({"max_epochs": None}, TypeError, "expected `max_epochs` to be an int, got None"),
        ({"current_epoch": -1}, ValueError, "expected `current_epoch` to be at least 0"),
        ({"mbt_a": 100}, ValueError, r"expected `mbt_a` in \(0, 1\], got 100"),
        ({"mbt_b": 0.0}, ValueError, r"expected `mbt_b` in \(0, 1\], got 0"),
        ({"mbt_epoch_scheme": "cosine"}, ValueError, "expected `mbt_epoch_scheme` to be one of 'linear', 'constant'"),
    ],
)
def test_mbtrim_errors(change: dict[str, object], error: type[Exception], message: str) -> None:
    given: dict[str, object] = {"loss": torch.rand(4), "current_epoch": 1, "max_epochs": 3, **change}
    with pytest.raises(error, match=message):
        get_adapted_loss_for_trimmed_minibatch(**given)  # type: ignore[arg-type]


def test_constant_does_not_ask_for_the_length() -> None:
    assert len(get_adapted_loss_for_trimmed_minibatch(torch.rand(10), 3, -1, 1.0, 0.2, "constant")) == 6


@pytest.mark.parametrize("row", golden("superquantile.csv"), ids=lambda row: f"{row['n']}-{row['fraction']}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_superquantile_golden(row: dict[str, str], dtype: torch.dtype) -> None:
    losses = (torch.randperm(int(row["n"])) + 1).to(dtype).requires_grad_()
    value = SuperquantileReducer(superquantile_tail_fraction=float(row["fraction"]))(losses)
    assert value.dtype == dtype
    assert value.item() == pytest.approx(float(row["value"]), rel=2 * torch.finfo(dtype).eps)
    value.backward()
    assert losses.grad is not None
    assert float(losses.grad.min()) >= 0, "no sample is pushed up"
    assert float(losses.grad.double().sum()) == pytest.approx(1.0, abs=0.02)


def test_superquantile_of_half_losses_whose_sum_is_no_half() -> None:
    losses = torch.full((1000,), 1000.0, dtype=torch.float16)
    assert reduce_superquantile(losses, superquantile_tail_fraction=0.3335).item() == 1000.0


def test_superquantile_reads_any_shape_as_one_vector() -> None:
    losses = torch.rand(2, 3, 4)
    assert torch.equal(reduce_superquantile(losses, 0.3), reduce_superquantile(losses.flatten(), 0.3))


@pytest.mark.slow
def test_superquantile_of_more_than_16_million_losses() -> None:
    losses = torch.arange(2.0**24 + 10, dtype=torch.float64)
    assert reduce_superquantile(losses, 3 / len(losses)).item() == len(losses) - 2


def test_superquantile_of_nan_is_nan() -> None:
    assert reduce_superquantile(torch.tensor([1.0, float("nan"), 2.0])).isnan()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), 50])
def test_superquantile_errors(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"expected `superquantile_tail_fraction` in \[0, 1\], got"):
        reduce_superquantile(torch.rand(3), fraction)
    with pytest.raises(ValueError, match=r"expected `superquantile_tail_fraction` in \[0, 1\], got"):
        SuperquantileReducer(fraction)
    with pytest.raises(PassUnreducedLosses):
        reduce_superquantile(torch.tensor(0.5))


def test_reducer_prints_and_pickles() -> None:
    reducer = SuperquantileReducer(0.4)
    assert repr(pickle.loads(pickle.dumps(reducer))) == "SuperquantileReducer(superquantile_tail_fraction=0.4)"


def test_compat_is_not_at_the_top_level() -> None:
    assert not set(compat.__all__) & set(batchtrim.__all__)
