"""Sums of terms that count differently, as users add them up, against the formula on the kept samples alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim import Losses, TrimmedForward, Trimmer, accumulate, per_sample
from batchtrim.integrations._labels import plain_sums
from batchtrim.integrations._loss_finder import LossFinder

WEIGHT = torch.tensor([0.2, 1.0, 3.0])
Term = tuple[Callable[[Tensor, Tensor], Losses], Callable[[Tensor, Tensor], Tensor]]


def of_tokens(outputs: Tensor, y: Tensor) -> Losses:
    return per_sample(nn.MSELoss())(outputs[..., 0], y.float())


# un-reduced, and as a user reduces them
TERMS: dict[str, Term] = {
    "padded": (lambda o, y: per_sample(nn.CrossEntropyLoss(ignore_index=-1))(o.mT, y),
               lambda o, y: F.cross_entropy(o.mT, y, ignore_index=-1)),
    "weighted": (lambda o, y: per_sample(nn.CrossEntropyLoss(weight=WEIGHT))(o[:, 0], y[:, 0]),
                 lambda o, y: F.cross_entropy(o[:, 0], y[:, 0], weight=WEIGHT)),
    "of tokens": (of_tokens, lambda o, y: F.mse_loss(o[..., 0], y.float())),
    "of samples": (lambda o, y: per_sample(nn.L1Loss())(o.mean((1, 2)), y[:, 0].float()),
                   lambda o, y: F.l1_loss(o.mean((1, 2)), y[:, 0].float())),
}  # fmt: skip
SUMS = [("padded", "of samples"), ("of tokens", "of samples"), ("padded", "weighted", "of tokens")]


def batches(lengths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    made = [(torch.randn(4, t, 5), torch.randint(0, 3, (4, t))) for t in lengths]
    made[0][1][:2, 1:] = -1
    return made


def added(names: tuple[str, ...]) -> Callable[[Tensor, Tensor], Losses]:
    return lambda outputs, y: sum(TERMS[name][0](outputs, y) for name in names)  # type: ignore[return-value]


def right(names: tuple[str, ...], model: nn.Module, parts: list[tuple[Tensor, Tensor]], rows: list[int]) -> Tensor:
    """Return each term's own value for the kept samples, its sum over all batches by its divisor over all of them."""
    total = torch.zeros(())
    for name in names:
        losses = [TERMS[name][0](model(x), y) for x, y in parts]
        counted = [batchtrim.unreduced.counted(each) for each in losses]
        divisors = [batchtrim.unreduced.divisors(each) for each in counted]
        divisor = torch.cat([torch.ones(4) if each is None else each for each in divisors])[rows]
        counts = torch.cat([torch.ones(4) if each.counts is None else each.counts for each in counted])[rows]
        total = total + (torch.cat([each.values for each in losses])[rows] * counts).sum() / divisor.sum()
    return total


def test_what_a_mask_leaves_out_of_a_sum_is_neither_ranked_nor_counted() -> None:
    one = Losses(torch.tensor([1.0, 5.0, 2.0, 7.0]))
    other = Losses(torch.tensor([9.0, 1.0, 1.0, 3.0]), torch.tensor([False, True, True, True]))
    losses = one + other
    assert losses.values.tolist() == [1.0, 6.0, 3.0, 10.0]
    trim = Trimmer(0.6, unit="element")
    torch.testing.assert_close(trim(losses, mask=torch.tensor([True, True, True, False])), torch.tensor(4.5))
    torch.testing.assert_close(losses.masked(other.mask).mean(), one.values[1:].mean() + other.values[1:].mean())  # type: ignore[arg-type]


@pytest.mark.parametrize("names", SUMS, ids=" + ".join)
@pytest.mark.parametrize(
    ("engine", "lengths"), [("exact", (3,)), ("two_pass", (3,)), ("exact", (3, 2)), ("two_pass", (3, 5, 2))]
)
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_each_term_is_divided_by_its_own_divisor(
    names: tuple[str, ...], engine: str, lengths: tuple[int, ...], keep: float
) -> None:
    torch.manual_seed(0)
    model, parts = nn.Linear(5, 3), batches(lengths)
    step = TrimmedForward(model, added(names), Trimmer(keep), engine)
    got = 0.0
    for loss in accumulate(step, parts) if len(parts) > 1 else [step(*parts[0])]:
        loss.backward()
        got += loss.item()
    mine, model.weight.grad = model.weight.grad, None
    choice = step.trim.last
    assert choice is not None
    rows = choice.selection.indices.tolist()
    assert len(rows) == round(keep * 4 * len(parts))
    expected = right(names, model, parts, rows)
    if len(parts) == 1:
        (x, y) = (part[rows] for part in parts[0])
        torch.testing.assert_close(expected, torch.stack([TERMS[name][1](model(x), y) for name in names]).sum())
    expected.backward()
    assert got == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(mine, model.weight.grad)


def test_micro_batches_of_other_terms_are_refused() -> None:
    def sometimes_masked(outputs: Tensor, y: Tensor) -> Losses:
        values = outputs.squeeze(1)
        return Losses(values, None if bool(y.all()) else y > 0) + values

    step = TrimmedForward(nn.Linear(2, 1), sometimes_masked, Trimmer(0.5), "exact")
    parts = [(torch.randn(4, 2), torch.ones(4)), (torch.randn(4, 2), torch.arange(4.0))]
    with pytest.raises(ValueError, match=r"a sum of as many terms, got \[1, 2\]\. Add the same ones up in each"):
        next(accumulate(step, parts))


@pytest.mark.parametrize("names", SUMS, ids=" + ".join)
def test_terms_that_are_read_from_a_training_step(names: tuple[str, ...]) -> None:
    """Lightning's interception took each sample's share of the whole batch, whatever was kept."""
    torch.manual_seed(0)
    model, ((x, y),) = nn.Linear(5, 3), batches((3,))
    labels = (y, y[:, 0].clone(), y.float(), y[:, 0].float())

    def run() -> dict[str, Tensor]:
        outputs = model(x)
        return {"loss": sum(TERMS[name][1](outputs, y) for name in names), "outputs": outputs}  # type: ignore[dict-item]

    trim = Trimmer(0.5)
    loss = trim(LossFinder(apart=True)(run, lambda out: out["loss"], 4, labels).losses)
    assert trim.last is not None
    kept = trim.last.selection.indices
    torch.testing.assert_close(loss, torch.stack([TERMS[name][1](model(x[kept]), y[kept]) for name in names]).sum())


@pytest.mark.parametrize("names", [*SUMS, ("padded",), ("weighted",), ("of samples",)], ids=" + ".join)
def test_evaluation_adds_up_each_term_over_its_batches(names: tuple[str, ...]) -> None:
    parts = [(torch.randn(len(y), y.shape[1], 3), y) for _, y in batches((4, 4))]
    sums = torch.stack([plain_sums(added(names)(*part)) for part in parts]).sum(0)
    whole = added(names)(*(torch.cat(each) for each in zip(*parts, strict=True)))
    torch.testing.assert_close((sums[:, 0] / sums[:, 1]).sum(), whole.mean().double())
    masked = Losses(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))
    assert plain_sums(masked).tolist() == [[3.0, 2.0]]
