"""Criteria whose un-reduced losses are as many as the samples, or the classes, but not one for each sample."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import batchtrim
from batchtrim import Trimmer, per_sample


class OfClasses(nn.Module):
    """Dice over the whole batch, an option of several segmentation libraries: one loss for each class."""

    def __init__(self, reduction: str = "mean", over: tuple[int, ...] = (0, 2, 3)) -> None:
        super().__init__()
        self.reduction, self.over = reduction, over

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        joint, both = (outputs * targets).sum(self.over), (outputs + targets).sum(self.over)
        losses = 1 - 2 * joint / both
        return losses if self.reduction == "none" else losses.mean()


class TestLossesOfClasses:
    """With everything kept the value was right; otherwise the hardest classes were kept, not samples."""

    @pytest.mark.parametrize("classes", [4, 3])
    def test_of_the_whole_batch(self, classes: int) -> None:
        outputs, targets = torch.rand(4, classes, 5, 5), torch.rand(4, classes, 5, 5)
        says = "for 3 samples, and 4 for one more" if classes == 4 else r"for each of 4 samples, got .*\(3,\).* classes"
        with pytest.raises(ValueError, match=says):
            per_sample(OfClasses())(outputs, targets)
        with pytest.raises(ValueError, match=says):
            batchtrim.TrimmedForward(nn.Identity(), OfClasses(), Trimmer(0.5), "exact")(outputs, targets)

    def test_of_each_sample(self) -> None:
        criterion = OfClasses(over=(2, 3))
        outputs, targets = torch.rand(4, 4, 5, 5), torch.rand(4, 4, 5, 5)
        expected = OfClasses("none", (2, 3))(outputs, targets).mean(1).topk(2).values.mean()
        torch.testing.assert_close(Trimmer(0.5)(per_sample(criterion)(outputs, targets)), expected)

    def test_a_function_whose_losses_are_of_the_second_dimension(self) -> None:
        by_class = functools.partial(torch.mean, dim=(0, 2))
        with pytest.raises(ValueError, match="or give the losses to the trimmer without per_sample"):
            per_sample(lambda o, t: by_class((o - t).square()))(torch.rand(5, 3, 2), torch.rand(5, 3, 2))

    def test_a_criterion_that_needs_the_whole_batch(self) -> None:
        class Paired(OfClasses):
            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                halves = outputs[: len(outputs) // 2] - outputs[len(outputs) // 2 :]
                return super().forward(outputs + torch.cat([halves, -halves]), targets)

        outputs, targets = torch.rand(4, 3, 5, 5), torch.rand(4, 3, 5, 5)
        assert per_sample(Paired(over=(2, 3)))(outputs, targets).values.shape == (4,)

    def test_inputs_in_containers(self) -> None:
        """They cannot be cut by a criterion's own rules, so as many losses as before prove nothing."""

        class OfDict(nn.Module):
            reduction = "mean"

            def forward(self, outputs: dict[str, Tensor], labels: list[int]) -> Tensor:
                losses = nn.functional.cross_entropy(outputs["logits"], torch.tensor(labels), reduction="none")
                return losses if self.reduction == "none" else losses.mean()

        assert per_sample(OfDict())({"logits": torch.randn(6, 3)}, [0, 1, 2, 0, 1, 2]).values.shape == (6,)
