"""One loss per sample, from any criterion; methods that weight losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchtrim
from batchtrim import Losses, Trimmer, focal, per_sample, superloss, token_losses
from batchtrim.errors import PassUnreducedLosses
from batchtrim.losses import flatten, lambert_w


def batch(*shape: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape[0], classes, *shape[1:], requires_grad=True), torch.randint(0, classes, shape)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 4.0])),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=2),
        nn.CrossEntropyLoss(ignore_index=2, weight=torch.tensor([1.0, 2.0, 0.5, 4.0])),
        F.cross_entropy,
    ],
)
def test_keeping_everything_equals_the_criterions_own_mean(criterion: object) -> None:
    logits, labels = batch(32)
    losses = per_sample(criterion)(logits, labels)  # type: ignore[arg-type]
    assert losses.values.shape == (32,)
    if getattr(criterion, "label_smoothing", 0.0) and getattr(criterion, "weight", None) is not None:
        return
    torch.testing.assert_close(Trimmer(1.0)(losses), criterion(logits, labels))  # type: ignore[operator]


def test_class_weights_divide_by_the_kept_weights() -> None:
    weight = torch.tensor([1.0, 10.0])
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.5], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 1])
    losses = per_sample(nn.CrossEntropyLoss(weight=weight))(logits, labels)
    plain = F.cross_entropy(logits, labels, reduction="none")
    assert Trimmer(0.5).select(losses).rising().indices.tolist() == [1, 3]  # the heavy class
    assert float(Trimmer(0.5)(losses)) == pytest.approx(float((10 * plain[1] + 10 * plain[3]) / 20))
    assert Trimmer(0.5).select(losses, rank_by=plain).rising().indices.tolist() == [2, 3]


def test_dense_losses_by_sample_and_by_element() -> None:
    logits, labels = batch(3, 4, 5)
    logits = logits.detach()
    labels[0, :2] = 255
    labels[2] = 255
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    by_sample = per_sample(criterion)(logits, labels)
    raw = F.cross_entropy(logits, labels, reduction="none", ignore_index=255)
    assert by_sample.mask.tolist() == [True, True, False]
    assert float(by_sample.values[0]) == pytest.approx(float(raw[0].sum() / 10), rel=1e-6)
    by_element = per_sample(criterion, unit="element")(logits, labels)
    trim = Trimmer(0.1, unit="element")
    loss = trim(by_element)
    counted = raw[labels != 255]
    assert trim.last_selection.candidates == 30
    assert trim.last_selection.k == 3, "ignored pixels count neither in the ranking nor in k"
    assert float(loss) == pytest.approx(float(counted.topk(3).values.mean()), rel=1e-6)
    torch.testing.assert_close(Trimmer(1.0, unit="element")(by_element), criterion(logits, labels))


def test_other_criteria() -> None:
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    torch.testing.assert_close(per_sample(nn.MSELoss())(x, y).values, ((x - y) ** 2).mean(1))
    torch.testing.assert_close(per_sample(F.l1_loss)(x, y).values, (x - y).abs().mean(1))
    target = torch.rand(6, 3)
    expected = F.binary_cross_entropy_with_logits(x, target, reduction="none").mean(1)
    torch.testing.assert_close(per_sample(nn.BCEWithLogitsLoss())(x, target).values, expected)
    soft = torch.rand(6, 3).softmax(1)
    assert per_sample(nn.CrossEntropyLoss())(x, soft).values.shape == (6,)
    assert per_sample(lambda a, b: (a - b).abs().sum(1))(x, y).values.shape == (6,)
    criterion = nn.CrossEntropyLoss()
    per_sample(criterion)
    assert criterion.reduction == "mean", "the criterion given is left alone"


def test_a_criterion_that_averages_by_itself() -> None:
    with pytest.raises(PassUnreducedLosses, match="averages by itself"):
        per_sample(lambda a, b: (a - b).abs().mean())(torch.rand(3), torch.rand(3))
    with pytest.raises(TypeError, match="expected `criterion` to be callable"):
        per_sample(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected `unit` to be one of 'sample', 'element'"):
        per_sample(F.mse_loss, unit="token")


@pytest.mark.parametrize(("given", "computed"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_token_losses_are_in_at_least_float32(given: torch.dtype, computed: torch.dtype) -> None:
    logits, labels = torch.randn(2, 3, 5, dtype=given), torch.randint(0, 5, (2, 3))
    expected = F.cross_entropy(logits.to(computed).transpose(1, 2), labels)
    torch.testing.assert_close(
        token_losses(logits, labels).mean(), expected, rtol=1e-12 if given == computed else 1e-6, atol=0.0
    )


def test_token_losses_mask_padding_and_shift() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[1, 3:] = -100
    losses = token_losses(logits, labels)
    assert losses.values.shape == (2, 5)
    assert losses.mask.sum() == 8
    torch.testing.assert_close(
        Trimmer(1.0, unit="element")(losses), F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    )
    shifted = token_losses(logits, labels, shift=True)
    assert shifted.values.shape == (2, 4)
    assert shifted.mask.tolist() == (labels[:, 1:] != -100).tolist()
    sample = flatten(losses, "sample")
    assert float(sample.values[1]) == pytest.approx(float(losses.values[1, :3].mean())), (
        "a mean, not a sum, over tokens"
    )


def test_focal_by_hand() -> None:
    p = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    torch.testing.assert_close(focal(-p.log(), 2.0), (1 - p) ** 2 * -p.log())
    losses = torch.rand(4)
    assert torch.equal(focal(losses, 0.0), losses)
    with pytest.raises(ValueError, match="expected `gamma` to be at least 0"):
        focal(losses, -1.0)


def test_lambert_w_against_scipy() -> None:
    import scipy.special

    z = torch.cat([torch.linspace(-1 / math.e + 1e-9, 3, 500, dtype=torch.float64), torch.tensor([10.0, 1e3, 1e6])])
    expected = torch.from_numpy(scipy.special.lambertw(z.numpy()).real)
    torch.testing.assert_close(lambert_w(z), expected, rtol=1e-7, atol=1e-6)
    assert float(lambert_w(torch.tensor([-1 / math.e]))) == pytest.approx(-1.0, abs=1e-6)


def test_superloss_weighs_hard_samples_down_and_its_gradient_is_sigma() -> None:
    losses = torch.tensor([-50.0, 0.0, 0.5, 1.0, 3.0, 10.0], dtype=torch.float64, requires_grad=True)
    superloss(losses, tau=1.0, lam=0.5).sum().backward()
    sigma = losses.grad
    assert bool(sigma.isfinite().all())
    assert float(sigma[0]) == pytest.approx(math.e), "where the branch of W ends"
    assert bool((sigma[2:].diff() < 0).all())
    assert float(sigma[3]) == pytest.approx(1.0)
    step = 1e-5
    with torch.no_grad():
        up, down = superloss(losses + step, 1.0, 0.5), superloss(losses - step, 1.0, 0.5)
    torch.testing.assert_close((up - down) / (2 * step), sigma, rtol=1e-5, atol=1e-7)


def test_numbers_that_half_precision_cannot_hold() -> None:
    losses = torch.zeros(1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"expected `gamma` within torch.float16, up to 65504, got 65505"):
        focal(losses, 65505.0)
    for name, arguments in (("tau", (1e5, 1.0)), ("lam", (0.0, 1e5))):
        with pytest.raises(ValueError, match=f"expected `{name}` within torch.float16"):
            superloss(losses, *arguments)
    assert superloss(losses.float(), 1e5, 1e5).isfinite().all()


def test_losses_detach() -> None:
    losses = Losses(torch.rand(3, requires_grad=True) * 2, torch.ones(3, dtype=torch.bool))
    assert not losses.detach().values.requires_grad
    assert losses.detach().weights is None


@pytest.mark.parametrize("scale", ["kept", "batch"])
@pytest.mark.parametrize("rule", [batchtrim.hardest(), batchtrim.superquantile()], ids=repr)
@pytest.mark.parametrize("arguments", [{}, {"reduction": "sum"}, {"weight": torch.tensor([0.2, 1.0, 3.0])}], ids=str)
def test_the_selection_of_a_rule_itself_is_reduced_as_the_trimmers(
    scale: str, rule: Any, arguments: dict[str, Any]
) -> None:
    logits, labels = torch.randn(7, 3, 4), torch.randint(3, (7, 4))
    labels[2, 1:] = labels[5, 2:] = -100
    criterion = nn.CrossEntropyLoss(**arguments)
    for losses in (per_sample(criterion)(logits, labels), per_sample(criterion)(logits[..., 0], labels[:, 0])):
        own = rule(losses.values, 0.4)
        torch.testing.assert_close(batchtrim.reduce(losses, own, scale), Trimmer(0.4, select=rule, scale=scale)(losses))
        torch.testing.assert_close(batchtrim.reduce(losses, batchtrim.hardest()(losses.values, 1.0)), losses.mean())
    if losses.weights is not None:
        rows, factors = own.indices, 1.0 if own.weights is None else own.weights
        divisor = losses.weights.sum() if scale == "batch" else (losses.weights[rows] * factors).sum()
        expected = (losses.values[rows] * factors).sum() / divisor
        torch.testing.assert_close(batchtrim.reduce(losses.values, own, scale, losses.weights), expected)


def test_sums_keep_their_unit_and_the_mean_of_nothing_is_0() -> None:
    plain, element = Losses(torch.ones(2)), Losses(torch.ones(2), unit="element")
    masked = Losses(torch.ones(2), torch.tensor([True, False]))
    for losses in (plain + element, element + plain, masked + element, element + masked):
        assert losses.unit == "element"
    assert (torch.tensor([4.0, 3.0]) - plain).values.tolist() == [3.0, 2.0]
    assert Losses(torch.zeros(0)).mean() == 0.0
    with pytest.raises(ValueError, match=r"expected a term of shape \(2,\)"):
        plain + Losses(torch.ones(1))
