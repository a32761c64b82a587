"""Criteria that show their divisor late, change when they are called, or are changed after they were wrapped."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchtrim import Trimmer, per_sample


class Own(nn.Module):
    """A criterion as people write them: a reduction, and a divisor of its own."""

    weight: Tensor

    def __init__(self, weight: Tensor | None = None, reduction: str = "mean") -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(3) if weight is None else weight)
        self.reduction = reduction

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weights = self.weight[targets]
        losses = F.cross_entropy(outputs, targets, reduction="none") * weights
        return losses if self.reduction == "none" else losses.sum() / weights.sum()


class TestEveryBatchOfACriterionThatIsNotTorchs:
    @pytest.mark.parametrize("unit", ["sample", "element"])
    def test_weights_that_the_first_batches_do_not_show(self, unit: str) -> None:
        """A class-balanced loss (Cui et al.) on sorted data: its divisor was taken for the number of samples."""
        criterion = per_sample(Own(torch.tensor([1.0, 1.0, 10.0])), unit=unit)
        outputs = torch.randn(6, 3)
        for _ in range(3):
            criterion(outputs, torch.tensor([0, 1, 0, 1, 1, 0]))
        with pytest.raises(ValueError, match="It uses another divisor"):
            criterion(outputs, torch.tensor([0, 1, 2, 2, 1, 0]))

    def test_a_function_whose_divisor_shows_late(self) -> None:
        def dice(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
            losses = (outputs - targets).square()
            return losses if reduction == "none" else losses.sum() / targets.sum().clamp(min=losses.numel())

        criterion, outputs = per_sample(dice), torch.rand(4, 3)
        criterion(outputs, torch.ones(4, 3))
        with pytest.raises(ValueError, match="It uses another divisor"):
            criterion(outputs, torch.full((4, 3), 2.0))

    def test_a_criterion_that_holds_a_network_is_compared_now_and_then(self) -> None:
        class Perceptual(Own):
            def __init__(self) -> None:
                super().__init__(torch.tensor([1.0, 1.0, 10.0]))
                self.network, self.calls = nn.Linear(300, 300), 0

            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                self.calls += 1
                return super().forward(outputs, targets)

        own = Perceptual()
        criterion, outputs = per_sample(own), torch.randn(4, 3)
        for _ in range(99):
            criterion(outputs, torch.tensor([0, 1, 0, 1]))
        with pytest.raises(ValueError, match="It uses another divisor"):
            criterion(outputs, torch.tensor([0, 1, 2, 2]))
        assert own.calls == 100, "and it is not called more often than that"

    def test_a_mean_near_nothing(self) -> None:
        class Centred(Own):
            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                losses = 100.0 * (outputs - outputs.mean())
                return losses if self.reduction == "none" else losses.mean()

        criterion = per_sample(Centred())
        for _ in range(20):
            criterion(torch.randn(64, 3), torch.zeros(64, 3))

    def test_an_ignore_index_that_the_criterion_does_not_know(self) -> None:
        class Squared(Own):
            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                losses = (outputs - targets).square()
                return losses if self.reduction == "none" else losses.mean()

        outputs, targets = torch.randn(4, 3), torch.randn(4, 3)
        targets[0] = 255
        found = per_sample(Squared(), ignore_index=255)(outputs, targets).mean()
        torch.testing.assert_close(found, (outputs - targets)[1:].square().mean())

    def test_a_criterion_that_changes_when_it_is_called(self) -> None:
        """Losses over their running mean: the un-reduced call is the one that counts."""

        class Running(Own):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("running", torch.ones(()))
                self.calls = 0

            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                losses = (outputs - targets).square()
                self.running, self.calls = 0.5 * self.running + 0.5 * losses.detach().mean(), self.calls + 1
                losses = losses / self.running
                return losses if self.reduction == "none" else losses.mean()

        plain, own = Running(), Running()
        wrapped = per_sample(own)
        for _ in range(3):
            outputs, targets = torch.randn(4, 3), torch.randn(4, 3)
            torch.testing.assert_close(wrapped(outputs, targets).mean(), plain(outputs, targets))
        assert (own.calls, float(own.running)) == (3, pytest.approx(float(plain.running)))

    def test_a_criterion_that_keeps_its_last_loss(self) -> None:
        class Keeps(Own):
            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                losses = (outputs - targets).square()
                self.last = losses  # with its graph: no copy can be made of it
                return losses if self.reduction == "none" else losses.mean()

        criterion, outputs = per_sample(Keeps()), torch.randn(4, 3, requires_grad=True)
        for _ in range(2):
            criterion(outputs, torch.zeros(4, 3)).mean().backward()


class TestACriterionChangedAfterItWasWrapped:
    @pytest.mark.parametrize("copied", [False, True])
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("label_smoothing", 0.3),
            ("weight", torch.tensor([1.0, 2.0, 3.0])),
            ("ignore_index", 0),
            ("reduction", "sum"),
        ],
    )
    def test_torchs_criteria_are_read_at_each_call(self, name: str, value: Any, copied: bool) -> None:
        """Deferred re-weighting (LDAM-DRW) and smoothing that is switched off for the last epochs do this."""
        own = nn.CrossEntropyLoss()
        wrapped = per_sample(own)
        if copied:
            wrapped = pickle.loads(pickle.dumps(wrapped))
            own = wrapped._criterion.given  # type: ignore[assignment]
        setattr(own, name, value)
        outputs, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
        torch.testing.assert_close(Trimmer(1.0)(wrapped(outputs, labels)), own(outputs, labels))
        assert own.reduction == ("sum" if name == "reduction" else "mean")

    def test_a_custom_criterion(self) -> None:
        own = Own()
        wrapped = per_sample(own)
        wrapped(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
        own.weight *= 2.0
        outputs, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        losses = F.cross_entropy(outputs, labels, reduction="none")
        torch.testing.assert_close(wrapped.criterion(outputs, labels), 2.0 * losses)

    def test_a_reduction_that_the_unit_cannot_have(self) -> None:
        own = nn.KLDivLoss()
        wrapped = per_sample(own, unit="element")
        own.reduction = "batchmean"
        with pytest.raises(ValueError, match="got 'batchmean', which divides by the number of samples"):
            wrapped(torch.randn(4, 3), torch.rand(4, 3))


def test_a_criterion_with_another_word_for_unreduced_losses() -> None:
    """coral_pytorch takes reduction=None, and its error for 'none' spoke of a word that the user did not write."""

    class Ordinal(nn.Module):
        def __init__(self, reduction: str | None = "mean") -> None:
            super().__init__()
            self.reduction = reduction

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            losses = (outputs - targets).square()
            if self.reduction not in ("mean", None):
                raise ValueError(f"Invalid value for `reduction`, got {self.reduction}")
            return losses if self.reduction is None else losses.mean()

    outputs, targets = torch.rand(4), torch.rand(4)
    with pytest.raises(ValueError, match="Invalid value") as caught:
        per_sample(Ordinal())(outputs, targets)
    assert "reduction='none'. If it has another word for un-reduced losses" in caught.value.__notes__[0]
    made = Ordinal(reduction=None)
    found = per_sample(lambda outputs, targets: made(outputs, targets))(outputs, targets)
    torch.testing.assert_close(found.mean(), Ordinal()(outputs, targets))
