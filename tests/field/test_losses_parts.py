"""`Losses` that a user's own function returns: parts that do not fit, terms and factors that are plain tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim import Losses, Trimmer, per_sample

VALUES = torch.tensor([[1.0, 4.0, 2.0], [3.0, 5.0, 1.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ({"mask": MASK.long()}, TypeError, r"`mask` to have dtype torch\.bool, got torch\.int64\. Convert: mask\.bool"),
        (
            {"mask": MASK[:, :1]},
            ValueError,
            r"`mask` .* of `losses`, \(2, 3\), got \(2, 1\)\. Expand it",
        ),
        ({"mask": MASK[:1]}, ValueError, r"`mask` to have the shape of `losses`, \(2, 3\), got \(1, 3\)"),
        ({"mask": MASK.tolist()}, TypeError, "`mask` to be a tensor"),
        ({"weights": torch.ones(2, 1)}, ValueError, r"`weights` to have the shape of `losses`"),
        ({"weights": 2.0}, TypeError, r"`weights` to be a tensor, got 2\.0"),
        ({"unit": "token"}, ValueError, "`unit` to be one of 'sample', 'element', got 'token'"),
        ({"reduction": "batchmean"}, ValueError, "`reduction` to be one of 'mean', 'sum', got 'batchmean'"),
    ],
)
def test_parts_that_do_not_fit(parts: dict[str, Any], error: type[Exception], words: str) -> None:
    """A mask (B, 1) divided by 1 instead of T, one of (1, T) kept the first sample only, both without a word."""
    with pytest.raises(error, match=words):
        Losses(VALUES, **parts)


def test_values_and_counts_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="expected `values` to be a tensor, got "):
        Losses([1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`counts` to have the shape of `losses`, \(3,\), got \(3, 1\)"):
        Losses(VALUES[0], counts=torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"`mask` to have the shape of `losses`, \(2, 3\), got \(2,\)"):
        Losses(VALUES).masked(MASK[:, 0])


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_a_tensor_added_to_a_sum(keep: float) -> None:
    """The usual loss of a VAE: of its two terms, one was summed and the other averaged."""
    x, again, kl = torch.rand(4, 6), torch.rand(4, 6), torch.rand(4)
    whole = F.binary_cross_entropy(again, x, reduction="none").sum(1) + kl
    losses = per_sample(nn.BCELoss(reduction="sum"))(again, x)
    for total in (losses + kl, kl + losses):
        torch.testing.assert_close(Trimmer(keep)(total), whole.topk(round(keep * 4)).values.sum())


def test_a_learned_factor_of_shape_1_scales_losses() -> None:
    """A learned weight often has shape (1,): an error that named neither shape."""
    weight = nn.Parameter(torch.tensor([2.0]))
    losses = Losses(VALUES[0])
    assert (weight * losses).values.tolist() == (losses * weight).values.tolist() == [2.0, 8.0, 4.0]
    Trimmer(0.4)(weight * losses).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [4.0]
    with pytest.raises(ValueError, match=r"a factor of one number, or of shape \(2, 3\), to scale `Losses` by, got"):
        Losses(VALUES) * torch.ones(2)


def masked(outputs: Tensor, targets: Tensor) -> Losses:
    return Losses(F.cross_entropy(outputs, targets, reduction="none"), targets != 0)


def test_what_needs_no_per_sample() -> None:
    """The advice was to index what the function returns, which cannot be indexed."""
    batch = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for criterion in (masked, per_sample(nn.CrossEntropyLoss())):
        with pytest.raises(TypeError, match="to return a tensor, got `Losses`, which need no per_sample"):
            per_sample(criterion)(*batch)


@pytest.mark.parametrize(
    ("losses", "cure"),
    [
        (Losses(VALUES[0]), r"They are its values: losses\.values\.$"),
        ([VALUES[0, 0], VALUES[0, 1]], r"Stack one loss per sample \(torch\.stack\)"),
        ({"box": VALUES[0]}, r"Add the terms, one loss per sample each: sum\(losses\.values\(\)\)\.$"),
    ],
)
def test_what_holds_losses_and_is_none(losses: Any, cure: str) -> None:
    for call in (batchtrim.focal, lambda losses: batchtrim.hardest()(losses, 0.5)):
        with pytest.raises(TypeError, match=f"expected `losses` to be a tensor, got .*{cure}"):
            call(losses)


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": lambda outputs, targets: (outputs - targets) ** 2,
    "absolute": lambda outputs, targets: 0.5 * (targets - outputs).abs(),
    "log-cosh": lambda outputs, targets: torch.log(torch.cosh(outputs - targets)),
    "binary": lambda outputs, targets: -(targets * outputs.sigmoid().log()),
    "normal": lambda outputs, targets: -torch.distributions.Normal(outputs, 1.0).log_prob(targets),
    "Charbonnier": lambda outputs, targets: ((0.5 * (targets - outputs)) ** 2 + 1e-6).sqrt().mul(2.0).sub(1e-3).relu(),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_losses_of_every_pair_of_samples(name: str) -> None:
    """Outputs (B, 1) and targets (B,), or the other way round, gave B x B losses without a word."""
    outputs, targets = torch.randn(8, 1, requires_grad=True), torch.rand(8)
    with pytest.warns(
        UserWarning, match=r"got losses \(8, 8\) computed from \(8, 1\)\. .* broadcast against each other"
    ) as told:
        batchtrim.Trimmer(0.5)(CRITERIA[name](outputs, targets))
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match=r"got losses \(8, 8\) computed from \(8,\)\. "):
        batchtrim.Trimmer(0.5)(CRITERIA[name](outputs.squeeze(1), targets[:, None]))


def test_as_many_tokens_as_samples_are_no_pairs() -> None:
    logits = torch.randn(8, 3, 8, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batchtrim.Trimmer(0.5)(F.cross_entropy(logits, torch.zeros(8, 8, dtype=torch.int64), reduction="none"))
        batchtrim.Trimmer(0.5)(CRITERIA["squared"](logits[:, 0], torch.rand(8, 8)))
        batchtrim.Trimmer(0.5)(CRITERIA["squared"](logits[:, 0, :1], torch.rand(8, 1)))


class Scaled(nn.Module):
    """Outputs times a learned number each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


# the biases and scales have as many numbers as the batch has samples
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 8),
    "from one": lambda: nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 8)),
    "normed": lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)),
    "scaled": Scaled,
}


@pytest.mark.parametrize("name", LAYERS)
def test_as_many_outputs_as_samples_are_no_pairs(name: str) -> None:
    """A layer's bias was taken for broadcast outputs, with a false warning in every training with B outputs."""
    outputs, targets = LAYERS[name]()(torch.randn(8, 4)), torch.rand(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for criterion in CRITERIA.values():
            batchtrim.Trimmer(0.5)(criterion(outputs, targets))
        batchtrim.Trimmer(0.5)(batchtrim.per_sample(nn.MSELoss())(outputs, targets))
        batchtrim.Trimmer(0.5)((outputs - targets) ** 2 * nn.Parameter(torch.ones(8, 1)))  # a weight for each sample


@pytest.mark.slow
def test_a_trace_of_as_many_outputs_as_samples_holds_for_other_batches() -> None:
    """The shared engine refused a first batch of as many samples as outputs, whose sizes were compared."""
    x, targets = torch.randn(9, 4), torch.rand(9, 8)
    model = nn.Linear(4, 8)
    step = batchtrim.TrimmedForward(model, nn.MSELoss(), batchtrim.Trimmer(0.5), "shared")
    for size in (8, 9):
        losses = ((model(x[:size]) - targets[:size]) ** 2).mean(1)
        hardest = losses.topk(batchtrim.keep_count(0.5, size)).values
        torch.testing.assert_close(step(x[:size], targets[:size]), hardest.mean())


@pytest.mark.parametrize(
    ("losses", "given", "cure"),
    [
        ((4, 3), (4,), "mask[..., None].expand_as(losses)"),
        ((4, 4), (4,), "mask[..., None].expand_as(losses)"),
        ((4, 3, 2), (4,), "mask[..., None, None].expand_as(losses)"),
        ((4, 3, 2), (4, 3), "mask[..., None].expand_as(losses)"),
        ((4, 3), (4, 1), "mask.expand_as(losses)"),
        ((4,), (4, 1), "mask.reshape(losses.shape)"),
        ((4, 1, 3), (4, 3), "mask.reshape(losses.shape)"),
        ((4, 3), (3, 4), None),
        ((4, 3), (3,), None),
    ],
)
def test_a_mask_of_another_shape(losses: tuple[int, ...], given: tuple[int, ...], cure: str | None) -> None:
    """`expand_as` was advised for a mask (B,) of losses (B, T): it fails, or leaves out tokens if B = T."""
    mask = torch.arange(torch.Size(given).numel()).reshape(given) % 2 == 0
    values = torch.rand(losses)
    with pytest.raises(ValueError, match=r"`mask` to have the shape of `losses`") as refused:
        Trimmer(0.5)(values, mask=mask)
    if cure is None:
        assert str(refused.value).endswith("Each loss needs one of its own.")
        return
    assert f": {cure}." in str(refused.value)
    cured = eval(cure, {"mask": mask, "losses": values})
    first = (slice(None), *[0] * (values.ndim - 1))
    assert torch.equal(cured[first], mask.reshape(len(mask), -1)[:, 0])  # still of the same sample
    Trimmer(0.5)(values, mask=cured)


@pytest.mark.parametrize(
    ("use", "operator"),
    [
        (lambda losses: losses[0], "[...]"),
        (lambda losses: losses[losses.values > 1], "[...]"),
        (lambda losses: losses**2, "**"),
        (lambda losses: losses > 1, ">"),
        (lambda losses: 1 / losses, "/ by them"),
        (float, "float()"),
        (np.asarray, "a conversion to NumPy"),
    ],
)
def test_what_a_tensor_can_do(use: Callable[[Losses], Any], operator: str) -> None:
    losses = per_sample(nn.MSELoss())(torch.rand(4, 2), torch.rand(4, 2))
    with pytest.raises(TypeError, match=re.escape(f"of `Losses`, got {operator}. Use a tensor: ")):
        use(losses)
    with pytest.raises(TypeError, match="unsupported operand"):
        losses * losses  # type: ignore[operator]
