"""A module's own training_step, intercepted: losses that are computed differently from batch to batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("lightning")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

from lightning.pytorch import Callback
from lightning_cases import QUIET, Plain, loader, trainer

import batchtrim
from batchtrim.integrations._loss_finder import LossFinder
from batchtrim.integrations._recorder import NotFound
from batchtrim.integrations.lightning import TrimmingCallback

pytestmark = QUIET


class Flooded(Plain):
    """arXiv 2002.08709, which keeps the loss from falling below b: its gradient turns round there."""

    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        return loss if self.global_step < 3 else (loss - 5.0).abs() + 5.0


def test_a_loss_that_is_computed_differently_in_a_later_batch(tmp_path: Path) -> None:
    """The first batch proved it: from the fourth on the easiest were kept, and the loss was negative."""
    with pytest.raises(NotFound, match="the sum of the losses found is -"):
        trainer(tmp_path, TrimmingCallback(0.5, intercept=True), max_epochs=2).fit(Flooded(), loader())


def test_a_loss_that_is_not_finite_passes() -> None:
    """A gradient scaler skips such a step. It read "is inf where the loss is inf"; and it proves nothing."""
    outputs, targets = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    finder = LossFinder()

    def run() -> Tensor:
        return F.cross_entropy(outputs + torch.tensor([-torch.inf, 0.0, 0.0]), targets)

    found = finder(run, lambda output: output, 4, [targets])
    assert found.loss.isinf()
    assert found.losses.mean().isinf()
    assert not finder._proven


class Quiet(Callback):
    """Nothing."""


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_step_that_leaves_a_batch_out(tmp_path: Path) -> None:
    """Lightning skips a batch where ``training_step`` returns None."""

    class Skips(Plain):
        def training_step(self, batch: Any, index: int) -> Any:
            return None if index % 2 else super().training_step(batch, index)

    modules = []
    for callback in (TrimmingCallback(1.0, intercept=True), Quiet()):
        modules.append(Skips())
        trainer(tmp_path, callback, max_epochs=2).fit(modules[-1], loader())  # type: ignore[arg-type]
    torch.testing.assert_close(modules[0].model.state_dict(), modules[1].model.state_dict())


class Summed(Plain):
    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y, reduction="sum")


@pytest.mark.parametrize(("scale", "times"), [("kept", 2.0), ("batch", 1.0)])
def test_a_loss_that_is_a_sum(scale: str, times: float) -> None:
    module, trim = Summed(), batchtrim.Trimmer(0.5, scale=scale)
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    found = LossFinder()(lambda: module.training_step((x, y), 0), lambda loss: loss, 8, [x, y])
    kept = F.cross_entropy(module.model(x), y, reduction="none").topk(4).values.sum()
    torch.testing.assert_close(trim(found.losses, rank_by=found.scores), times * kept)


MEANS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "of the samples' means": lambda losses, mask, weights: ((losses * mask).sum(1) / mask.sum(1)).mean(),
    "with a factor": lambda losses, mask, weights: 0.3 * ((losses * mask).sum(1) / mask.sum(1)).mean(),
    "weighted": lambda losses, mask, weights: (losses * mask * weights).sum() / (mask * weights).sum(),
}


@pytest.mark.parametrize("mean", MEANS.values(), ids=MEANS)
def test_a_weighted_mean_taken_by_the_step(mean: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """A mean of the samples' means kept the shortest, and was larger than any of them."""
    logits, labels = torch.randn(6, 4, 3, requires_grad=True), torch.randint(0, 3, (6, 4))
    mask = torch.arange(4) < torch.tensor([1, 4, 2, 3, 4, 1])[:, None]
    weights = torch.rand(6, 4) + 0.5

    def step(rows: Tensor) -> Tensor:
        losses = F.cross_entropy(logits[rows].transpose(1, 2), labels[rows], reduction="none")
        return mean(losses, mask[rows], weights[rows])

    every = torch.arange(6)
    found = LossFinder()(lambda: step(every), lambda loss: loss, 6, [labels])
    hardest = torch.stack([step(row[None]) for row in every]).topk(3).indices
    torch.testing.assert_close(batchtrim.Trimmer(0.5)(found.losses, rank_by=found.scores), step(hardest))
