"""A window of micro-batches of which some have padding and others have none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim


@pytest.mark.parametrize("lengths", [(5, 5, 3), (2, 5, 3)], ids=["padded", "padded-and-shorter"])
@pytest.mark.parametrize("unit", ["sample", "element"])
def test_micro_batches_without_padding_count_all_their_entries(lengths: tuple[int, ...], unit: str) -> None:
    def squares(outputs: Tensor, y: Tensor) -> batchtrim.Losses:
        mask = y != 0
        return batchtrim.Losses((outputs.squeeze(2) - y) ** 2, None if mask.all() else mask)

    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    batches = [(torch.randn(4, t, 3), torch.rand(4, t) + 1) for t in lengths]
    for sample in range(4):
        batches[1][1][sample, sample + 1 :] = 0
    step = batchtrim.TrimmedForward(model, squares, batchtrim.Trimmer(0.5, unit=unit), "exact")
    got = 0.0
    for loss in batchtrim.accumulate(step, batches):
        loss.backward()
        got += loss.item()
    whole = [torch.cat([F.pad(part, (0,) * (2 * part.ndim - 3) + (5 - part.shape[1],)) for part in parts])
             for parts in zip(*batches, strict=True)]  # fmt: skip
    expected = batchtrim.Trimmer(0.5, unit=unit)(squares(model(whole[0]), whole[1]))
    assert got == pytest.approx(expected.item(), rel=1e-6)
    mine = model.weight.grad
    model.weight.grad = None
    expected.backward()
    torch.testing.assert_close(mine, model.weight.grad)


def test_the_order_of_two_terms_does_not_count() -> None:
    entry, sample = batchtrim.per_sample(nn.MSELoss()), batchtrim.per_sample(nn.MSELoss())
    batches = [(torch.arange(4.0 * t).reshape(4, t), torch.ones(4, t)) for t in (2, 5)]
    found = []
    for turned in (False, True):

        def both(outputs: Tensor, y: Tensor, turned: bool = turned) -> batchtrim.Losses:
            terms = entry(outputs, y), sample(outputs.mean(1), y[:, 0])
            return terms[turned] + terms[not turned]

        step = batchtrim.TrimmedForward(nn.Identity(), both, batchtrim.Trimmer(0.5), "exact")
        found.append(sum(loss.item() for loss in batchtrim.accumulate(step, batches)))
    assert found[0] == found[1]


@pytest.mark.parametrize("over", ["micro", "window"])
def test_empty_micro_batches_alone_and_beside_others(over: str) -> None:
    """A rank whose data have run out, in a window in which every rank's may have."""
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.arange(4) % 2
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5, scope="global"), "exact")
    assert [loss.item() for loss in batchtrim.accumulate(step, [(x[:0], y[:0])], over)] == [0.0]
    right = F.cross_entropy(model(x), y, reduction="none").topk(2).values.mean()
    torch.testing.assert_close(sum(batchtrim.accumulate(step, [(x[:0], y[:0]), (x, y)], over)), right)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_mean_over_samples_whose_lengths_differ(keep: float) -> None:
    """Distillation: with "batchmean" a longer sample counts as much as a shorter one."""
    model = nn.Sequential(nn.PReLU(), nn.LogSoftmax(-1))
    batches = [(torch.randn(4, t), torch.rand(4, t).softmax(-1)) for t in (3, 5)]
    losses = torch.cat([F.kl_div(model(x), y, reduction="none").sum(1) for x, y in batches])
    step = batchtrim.TrimmedForward(model, nn.KLDivLoss(reduction="batchmean"), batchtrim.Trimmer(keep), "exact")
    torch.testing.assert_close(sum(batchtrim.accumulate(step, batches)), losses.topk(int(8 * keep)).values.mean())
