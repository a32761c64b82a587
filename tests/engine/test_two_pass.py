"""Two passes: right without dropout and BatchNorm, and no side effect where peers have one."""

from __future__ import annotations

import pytest
import torch
import zoo
from harness import BATCH, error, train
from torch import nn

import batchtrim
from batchtrim.engine.plan import Plan
from batchtrim.engine.two_pass import padded_rows

CASES = {
    "group_norm": (lambda: zoo.Residual(lambda width: nn.GroupNorm(2, width)), zoo.images),
    "encoder": (lambda: zoo.Encoder(False), zoo.tokens),
    "tied": (zoo.Tied, zoo.tokens),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_exact_where_samples_do_not_interact(name: str) -> None:
    make, data = CASES[name]
    exact, other = train(make, data, "exact"), train(make, data, "two_pass")
    assert other.chosen == exact.chosen
    for ours, theirs in zip(other.gradients, exact.gradients, strict=True):
        assert error(theirs, ours) <= 1e-5


@pytest.mark.parametrize("make", [lambda: zoo.Residual(nn.BatchNorm2d), lambda: zoo.Encoder(True, 0.3)])
def test_buffers_and_generators_are_those_of_one_forward(make: object) -> None:
    data = zoo.images if isinstance(make(), zoo.Residual) else zoo.tokens  # type: ignore[operator]
    exact, other = (train(make, data, engine, lr=0.0) for engine in ("exact", "two_pass"))  # type: ignore[arg-type]
    torch.testing.assert_close(other.buffers, exact.buffers)
    assert all(torch.equal(a, b) for a, b in zip(other.generators, exact.generators, strict=True))


def test_one_kept_sample_does_not_break_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    for engine in ("two_pass", "shared"):
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.05), engine)
        step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
        assert step.last.selection.k == 1


def test_auto_takes_the_plain_graph_where_little_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    small = batchtrim.TrimmedForward(zoo.Mlp(8), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.2), "auto")
    for _ in range(3):
        small(*data).backward()
    (plan,) = small.engine.saving.plans.values()
    assert plan.used == 0, "a network this small is faster on the plain graph"
    assert plan.flops == 2 * BATCH * (8 * 8 + 8 * 8 + 8 * 5)
    monkeypatch.setattr("batchtrim.engine.plan._SECONDS_PER_OPERATOR", 0.0)
    monkeypatch.setattr("batchtrim.engine.plan._BYTES_PER_SECOND", {"cpu": 1e15})
    rows: list[int] = []
    model = zoo.Mlp(8)
    model[3].register_full_backward_hook(lambda _, __, grad: rows.append(grad[0].shape[0]))
    for keep in (1.0, 0.95, 0.5):
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(keep), "auto")
        step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
    assert rows == [12, 12, 6]


def test_auto_counts_what_the_second_pass_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    step = batchtrim.TrimmedForward(zoo.Mlp(8), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
    (plan,) = step.engine.plans.values()
    assert plan.remembered == BATCH * (8 + 8 + 5) * 4
    assert plan.written > plan.remembered / BATCH  # what is taken, and what is computed again
    monkeypatch.setattr("batchtrim.engine.plan._SECONDS_PER_OPERATOR", 0.0)
    monkeypatch.setattr("batchtrim.engine.plan._BYTES_PER_SECOND", {"cpu": 1e9})
    monkeypatch.setattr("batchtrim.engine.plan._FLOPS_PER_SECOND", {"cpu": 1e9})
    plan = Plan(flops=10**9, remembered=5 * 10**8, written=125e6, batch=8)  # 2 (1 - q) against 0.5 + q
    assert plan.pays(0.49, "cpu")
    assert not plan.pays(0.51, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((object(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5)), "expected `model` to be a torch.nn.Module"),
        ((nn.Linear(2, 2), nn.CrossEntropyLoss(), 0.5), "expected `trim` to be a batchtrim.Trimmer, got 0.5"),
        ((nn.Linear(2, 2), None, batchtrim.Trimmer(0.5)), "expected `per_sample_loss` to be callable"),
    ],
)
def test_wrong_arguments(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        batchtrim.TrimmedForward(*arguments)  # type: ignore[arg-type]


def test_wrong_engine_and_averaged_loss() -> None:
    with pytest.raises(ValueError, match="expected `engine` to be one of 'auto', 'exact', 'shared', 'two_pass'"):
        batchtrim.TrimmedForward(nn.Linear(2, 2), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "fast")
    step = batchtrim.TrimmedForward(nn.Linear(8, 5), nn.functional.cross_entropy, batchtrim.Trimmer(0.5))
    with pytest.raises(ValueError, match="reduction='none'"):
        step(zoo.vectors(4), torch.randint(0, 5, (4,)))


@pytest.mark.parametrize(
    ("kept", "companions", "expected"),
    [
        ([0, 3], 0, [0, 3]),
        ([3], 0, [3, 0]),
        ([], 0, [0, 3]),
        ([1, 4], 2, [1, 4, 0, 3]),
        ([0, 1, 2, 3, 4], 4, [0, 1, 2, 3, 4, 5]),
        ([0, 1, 2, 3, 4, 5], 4, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_companions_are_dropped_samples_spread_over_the_batch(
    kept: list[int], companions: int, expected: list[int]
) -> None:
    selection = batchtrim.Selection(indices=torch.tensor(kept, dtype=torch.int64), size=6, candidates=6)
    assert padded_rows(selection, companions).tolist() == expected
