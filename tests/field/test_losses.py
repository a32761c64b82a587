"""Losses, masks and weights, as people use them: each test names the public report it comes from.

The right value is written out in plain torch beside the call.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim import Losses, Trimmer, per_sample, token_losses
from batchtrim.errors import NothingToChoose
from loss_cases import WEIGHT, pixels
from tiers import few


class TestArithmetic:
    """segmentation_models.pytorch#463: sums and counts beyond what half precision holds."""

    @pytest.mark.parametrize("scale", ["kept", "batch"])
    @pytest.mark.parametrize("unit", ["sample", "element"])
    @pytest.mark.parametrize("factor", [0.04, 3.0])
    def test_more_than_65504_entries(self, scale: str, unit: str, factor: float) -> None:
        losses = (torch.rand(4, 256, 256) * factor).half().requires_grad_()
        loss = Trimmer(1.0, scale=scale, unit=unit)(losses, mask=torch.ones_like(losses, dtype=torch.bool))
        loss.backward()
        assert loss.dtype == torch.float16
        assert float(loss.detach()) == pytest.approx(factor / 2, rel=5e-3)
        assert float(losses.grad.float().sum()) == pytest.approx(1.0, rel=0.06)  # 1/N is a subnormal number of fp16

    @pytest.mark.parametrize("scale", ["kept", "batch"])
    @pytest.mark.parametrize("rule", [batchtrim.hardest(), batchtrim.superquantile(), batchtrim.between(0.1)])
    def test_a_sum_that_overflows(self, rule: Any, scale: str) -> None:
        losses = torch.full((40_000,), 5.0, dtype=torch.float16)
        assert float(Trimmer(0.5, select=rule, scale=scale)(losses)) == (5.0 if scale == "kept" else 2.5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_weights_that_add_up_beyond_it(self, dtype: torch.dtype) -> None:
        labels = torch.zeros(70_000, dtype=torch.int64)
        criterion = nn.CrossEntropyLoss(weight=torch.tensor([2.0, 1.0], dtype=dtype))
        losses = per_sample(criterion)(torch.zeros(70_000, 2, dtype=dtype), labels)
        for scale in ("kept", "batch"):
            assert float(Trimmer(1.0, scale=scale)(losses)) == pytest.approx(0.6931, rel=1e-2)

    @pytest.mark.slow
    @pytest.mark.parametrize("scale", ["kept", "batch"])
    def test_compiled(self, scale: str) -> None:
        torch._dynamo.reset()
        losses = (torch.rand(70_000) * 3).half()
        mask = torch.ones_like(losses, dtype=torch.bool)
        trim = Trimmer(1.0, scale=scale)
        compiled = torch.compile(lambda x, m: trim(x, mask=m), backend="eager", fullgraph=True)
        assert float(compiled(losses, mask)) == pytest.approx(1.5, rel=5e-3)

    def test_a_superquantile_of_weighted_losses(self) -> None:
        """The rule's own divisor counts samples; class weights are divided by as well."""
        labels, logits = torch.tensor([0, 1, 0, 1, 1]), torch.randn(5, 2)
        losses = per_sample(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 4.0])))(logits, labels)
        selection = batchtrim.superquantile()(losses.values, 0.5)
        taken = selection.weights
        right = (losses.values[selection.indices] * taken).sum() / (losses.weights[selection.indices] * taken).sum()
        torch.testing.assert_close(Trimmer(0.5, select=batchtrim.superquantile())(losses), right)


class TestWhatWasAskedFor:
    def test_ignored_targets_of_a_binary_loss(self) -> None:
        """smp#852, mmsegmentation PR 1527: 255 in floating-point targets."""
        outputs, targets = torch.randn(3, 4, 4), (torch.rand(3, 4, 4) > 0.5).float()
        targets[:, 0] = 255
        counted = targets != 255
        raw = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        for unit in ("sample", "element"):
            losses = per_sample(nn.BCEWithLogitsLoss(), unit=unit, ignore_index=255)(outputs, targets)
            torch.testing.assert_close(Trimmer(1.0, unit=unit)(losses), raw[counted].mean())

    def test_ignored_targets_beside_a_channel_of_one(self) -> None:
        """The same: a criterion that returns (B, 1, H, W) for targets (B, H, W)."""
        outputs, targets = torch.randn(2, 1, 8, 8), (torch.rand(2, 8, 8) > 0.5).float()
        targets[0, 0, :2] = 255

        def criterion(o: Tensor, t: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(o, t.unsqueeze(1), reduction="none")

        trim = Trimmer(0.5, unit="element")
        loss = trim(per_sample(criterion, unit="element", ignore_index=255)(outputs, targets))
        raw = criterion(outputs, targets).squeeze(1)[targets != 255]
        assert (trim.last.selection.candidates, trim.last.selection.k) == (126, 63)
        torch.testing.assert_close(loss, raw.topk(63).values.mean())

    @pytest.mark.parametrize(
        ("criterion", "inputs"),
        [
            (nn.MultiLabelSoftMarginLoss(), (torch.randn(4, 3), torch.ones(4, 3))),
            (nn.CosineEmbeddingLoss(), (torch.randn(4, 3), torch.randn(4, 3), torch.ones(4))),
            (lambda o, t: (o - t).abs().mean(1), (torch.randn(4, 3), torch.randn(4, 3))),
        ],
        ids=["a loss for all labels", "no targets", "averaged"],
    )
    def test_an_ignore_index_that_cannot_be_applied(self, criterion: Any, inputs: Any) -> None:
        with pytest.raises(ValueError, match=r"a target for each loss.*ignore_index=255.*Mask the losses yourself"):
            per_sample(criterion, ignore_index=255)(*inputs)

    def test_an_ignore_index_that_equals_nothing(self) -> None:
        with pytest.raises(ValueError, match="a number other than nan, got nan"):
            per_sample(nn.MSELoss(), ignore_index=float("nan"))  # type: ignore[arg-type]

    def test_an_ignore_index_of_a_function_or_besides_the_criterions_own(self) -> None:
        outputs, labels = torch.randn(6, 3), torch.tensor([0, -100, 2, 1, -100, 0])
        torch.testing.assert_close(
            per_sample(F.cross_entropy)(outputs, labels).mean(), F.cross_entropy(outputs, labels)
        )
        labels = labels.clamp(min=2)
        own = F.cross_entropy(outputs, labels, ignore_index=2)
        torch.testing.assert_close(
            per_sample(nn.CrossEntropyLoss(), ignore_index=2)(outputs, labels).mean(), own.nan_to_num()
        )

    def test_plain_losses_rank_weighted_ones(self) -> None:
        """mmseg#507: the ranking that docs/caveats.md advises was divided by weights it never had."""
        for seed in range(20):
            torch.manual_seed(seed)
            logits, labels = torch.randn(8, 3, 4, 4), torch.randint(0, 3, (8, 4, 4))
            plain = F.cross_entropy(logits, labels, reduction="none")
            weighted = F.cross_entropy(logits, labels, reduction="none", weight=WEIGHT)
            trim = Trimmer(0.25)
            trim(Losses(weighted, None, WEIGHT[labels]), rank_by=plain)
            assert (
                trim.last.selection.rising().indices.tolist()
                == plain.mean((1, 2)).topk(2).indices.sort().values.tolist()
            )
            by_criterion = Trimmer(0.25)
            losses = per_sample(nn.CrossEntropyLoss(weight=WEIGHT))(logits, labels)
            by_criterion(losses, rank_by=per_sample(nn.CrossEntropyLoss())(logits, labels))
            assert torch.equal(by_criterion.last.selection.mask(), trim.last.selection.mask())

    def test_weighted_losses_with_a_mask(self) -> None:
        """mmseg#166: the mask was passed over."""
        logits, labels = torch.randn(4, 3, 6, 6), torch.randint(0, 3, (4, 6, 6))
        weighted = F.cross_entropy(logits, labels, reduction="none", weight=WEIGHT)
        weights, mask = WEIGHT[labels], torch.rand(4, 6, 6) > 0.5
        right = weighted[mask].sum() / weights[mask].sum()
        for unit in ("sample", "element"):
            torch.testing.assert_close(Trimmer(1.0, unit=unit)(Losses(weighted, None, weights), mask=mask), right)

    @pytest.mark.parametrize(
        "form", [nn.KLDivLoss(reduction="batchmean"), functools.partial(F.kl_div, reduction="batchmean")]
    )
    def test_batchmean(self, form: Any) -> None:
        """Teacher-free-KD#41: a tenth of the value, the mean over classes in place of the sum."""
        outputs, chances = torch.randn(6, 10).log_softmax(1).requires_grad_(), torch.rand(6, 10).softmax(1)
        loss = Trimmer(1.0)(per_sample(form)(outputs, chances))
        torch.testing.assert_close(loss, F.kl_div(outputs, chances, reduction="batchmean"))
        half = Trimmer(0.5)(per_sample(form)(outputs, chances))
        each = F.kl_div(outputs, chances, reduction="none").sum(1)
        torch.testing.assert_close(half, each.topk(3).values.mean())

    @pytest.mark.parametrize("scale", ["kept", "batch"])
    @pytest.mark.parametrize("criterion", [nn.MSELoss(reduction="sum"), nn.L1Loss(reduction="sum")])
    def test_a_sum_stays_a_sum(self, criterion: Any, scale: str) -> None:
        outputs, targets = torch.randn(6, 5), torch.randn(6, 5)
        losses = per_sample(criterion)(outputs, targets)
        torch.testing.assert_close(Trimmer(1.0, scale=scale)(losses), criterion(outputs, targets))
        trim = Trimmer(0.5, scale=scale)
        loss = trim(losses)
        kept = trim.last.selection.indices
        torch.testing.assert_close(loss, criterion(outputs[kept], targets[kept]))

    def test_a_reduction_nobody_knows(self) -> None:
        criterion = nn.MSELoss()
        criterion.reduction = "mean_batch"
        with pytest.raises(ValueError, match="'mean', 'sum', 'batchmean' or 'none', got 'mean_batch'"):
            per_sample(criterion)

    @pytest.mark.slow
    @pytest.mark.parametrize("unit", ["sample", "element"])
    def test_compiled_with_every_label_ignored(self, unit: str) -> None:
        """pytorch#70348: NaN under torch.compile, 0 without."""
        torch._dynamo.reset()
        criterion = per_sample(nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=255), unit=unit)
        trim = Trimmer(0.5, unit=unit)
        compiled = torch.compile(lambda o, y: trim(criterion(o, y)), backend="eager", fullgraph=True)
        logits, labels = pixels()
        torch.testing.assert_close(compiled(logits, labels), trim(criterion(logits, labels)))
        assert float(compiled(logits, torch.full_like(labels, 255)).detach()) == 0.0
        assert float(trim(criterion(logits, torch.full_like(labels, 255))).detach()) == 0.0

    @pytest.mark.parametrize("unit", ["sample", "element"])
    @pytest.mark.parametrize("scale", ["kept", "batch"])
    def test_keeping_everything_equals_the_weighted_mean_of_images(self, unit: str, scale: str) -> None:
        """The sentence in the documents, for (B, H, W): it held for unit "element" alone."""
        logits, labels = pixels()
        for smoothing in (0.0, 0.1):
            criterion = nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=255, label_smoothing=smoothing)
            loss = Trimmer(1.0, unit=unit, scale=scale)(per_sample(criterion, unit=unit)(logits, labels))
            torch.testing.assert_close(loss, criterion(logits, labels))

    def test_padded_tokens_are_the_mean_over_tokens(self) -> None:
        """Sentences of unequal length: ranked by their mean, averaged as the criterion averages."""
        logits, labels = torch.randn(4, 6, 5), torch.randint(0, 5, (4, 6))
        labels[0, 1:] = labels[1, 4:] = -100
        own = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(Trimmer(1.0)(token_losses(logits, labels)), own)
        trim = Trimmer(0.5)
        loss = trim(token_losses(logits, labels))
        raw, counted = token_losses(logits, labels).values, labels != -100
        means = torch.where(counted, raw, 0.0).sum(1) / counted.sum(1)
        kept = means.topk(2).indices
        assert sorted(kept.tolist()) == trim.last.selection.rising().indices.tolist()
        torch.testing.assert_close(loss, raw[kept][counted[kept]].mean())

    def test_labels_in_bytes(self) -> None:
        """Labels read from an image file are uint8, by which a tensor is indexed as by a mask."""
        logits, labels = torch.randn(9, 3), torch.randint(0, 3, (9,), dtype=torch.uint8)
        criterion = nn.CrossEntropyLoss(weight=WEIGHT)
        losses = per_sample(functools.partial(F.nll_loss, weight=WEIGHT))(logits.log_softmax(1), labels)
        torch.testing.assert_close(losses.mean(), criterion(logits, labels.long()))

    def test_a_subclass_counts_as_its_parent(self) -> None:
        class Mine(nn.CrossEntropyLoss):
            pass

        logits, labels = torch.randn(9, 3), torch.randint(0, 3, (9,))
        criterion = Mine(weight=WEIGHT)
        torch.testing.assert_close(per_sample(criterion)(logits, labels).mean(), criterion(logits, labels))


class TestShapes:
    @pytest.mark.parametrize(
        "criterion",
        [nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(), nn.SmoothL1Loss(), nn.PoissonNLLLoss(), nn.BCEWithLogitsLoss(),
         nn.SoftMarginLoss(), nn.HingeEmbeddingLoss(), nn.KLDivLoss(), F.mse_loss, F.poisson_nll_loss,
         lambda o, t: (o - t) ** 2],
    )  # fmt: skip
    @pytest.mark.parametrize(
        ("outputs", "targets"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 3), (3,)), ((4, 1, 5, 5), (4, 5, 5))]
    )
    def test_outputs_broadcast_against_targets(self, criterion: Any, outputs: Any, targets: Any) -> None:
        """A model's (B, 1) against a data set's (B,): B x B losses, of which B (B - 1) are of no pair."""
        for unit in ("sample", "element"):
            with pytest.raises(ValueError, match="expected outputs and targets of one shape"):
                per_sample(criterion, unit=unit)(torch.rand(outputs), torch.ones(targets))

    def test_a_channel_too_many(self) -> None:
        with pytest.raises(ValueError, match=r"\(4, 3, 5, 5\) and \(4, 1, 5, 5\)"):
            per_sample(nn.MSELoss())(torch.rand(4, 3, 5, 5), torch.rand(4, 1, 5, 5))

    def test_a_single_sample_does_not_raise(self) -> None:
        with pytest.raises(ValueError, match="of one shape"):
            per_sample(nn.MSELoss())(torch.rand(1, 1), torch.rand(1))

    def test_flattened_tokens_are_not_samples(self) -> None:
        logits, labels = torch.randn(4, 10, 7), torch.randint(0, 7, (4, 10))

        def flat(o: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(o.flatten(0, 1), t.flatten(), reduction="none")

        with pytest.raises(ValueError, match=r"expected one loss for each of 4 samples, got a tensor of shape \(40,\)"):
            per_sample(flat)(logits, labels)
        assert per_sample(flat, unit="element")(logits, labels).values.shape == (40,)

    @pytest.mark.parametrize(("made", "trimmed"), [("sample", "element"), ("element", "sample")])
    @pytest.mark.parametrize("shape", [(), (3, 3)])
    def test_units_that_differ(self, made: str, trimmed: str, shape: tuple[int, ...]) -> None:
        losses = per_sample(nn.CrossEntropyLoss(), unit=made)(
            torch.randn(4, 3, *shape), torch.randint(0, 3, (4, *shape))
        )
        for call in (Trimmer(0.5, unit=trimmed), Trimmer(0.5, unit=trimmed).select):
            with pytest.raises(ValueError, match=f"expected `losses` of unit '{trimmed}'.*got unit '{made}'"):
                call(losses)


class TestSingleRows:
    def test_a_padding_free_collator(self) -> None:
        """The whole batch in one row: whatever is kept of one is all of it."""
        trim = Trimmer(0.5)

        def train() -> None:
            for _ in range(8):
                trim(torch.rand(1, 300))

        with pytest.warns(NothingToChoose, match="unit='element'.*batchtrim.accumulate") as told:
            train()
        assert len(told) == 1

    def test_micro_batches_of_one(self) -> None:
        trim = Trimmer(0.5)
        with pytest.warns(NothingToChoose):
            [trim.select(torch.rand(1)) for _ in range(4)]

    def test_a_last_batch_of_one_is_none_of_it(self) -> None:
        trim, full = Trimmer(0.5), Trimmer(1.0)
        for _ in range(5):
            trim(torch.rand(8))
            trim(torch.rand(1))
            full(torch.rand(1))


def test_ids_without_a_log() -> None:
    """Lightning's callback and plain loops: nothing was recorded, and nothing said."""
    for given in ({"ids": torch.arange(3)}, {"outputs": torch.rand(3, 2)}, {"labels": torch.arange(3)}):
        for call in (Trimmer(0.5), Trimmer(0.5).select):
            with pytest.raises(ValueError, match="without a log"):
                call(torch.rand(3), **given)


class TestEngines:
    """An engine, a window and several ranks divide as a plain call does."""

    @pytest.mark.parametrize("engine", ["exact", "two_pass"])
    @pytest.mark.parametrize("scale", ["kept", "batch"])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("keep", [1.0, 0.5])
    def test_images_with_weights_and_ignored_pixels(self, engine: str, scale: str, reduction: str, keep: float) -> None:
        criterion = nn.CrossEntropyLoss(ignore_index=255, weight=WEIGHT, reduction=reduction)
        model = nn.Conv2d(2, 3, 3, padding=1)
        inputs, labels = torch.randn(4, 2, 6, 6), pixels()[1]
        right = Trimmer(keep, scale=scale)(per_sample(criterion)(model(inputs), labels))
        expected = torch.autograd.grad(right, list(model.parameters()))
        step = batchtrim.TrimmedForward(model, criterion, Trimmer(keep, scale=scale), engine)
        loss = step(inputs, labels)
        torch.testing.assert_close(loss, right)
        for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        parts = list(zip(inputs.split(2), labels.split(2), strict=True))
        window = [part.detach() for part in batchtrim.accumulate(step, parts)]
        torch.testing.assert_close(torch.stack(window).sum(), right.detach())

    def test_a_sum_over_micro_batches_is_refused(self) -> None:
        step = batchtrim.TrimmedForward(nn.Linear(3, 2), nn.MSELoss(reduction="sum"), Trimmer(0.5), "exact")
        with pytest.raises(ValueError, match="expected a criterion of reduction 'mean' with over='micro', got 'sum'"):
            next(batchtrim.accumulate(step, [(torch.randn(4, 3), torch.randn(4, 2))] * 2, over="micro"))


LOSSES = torch.arange(3.0)


class TestForms:
    @pytest.mark.parametrize("scale", few(["kept", "batch"], ["batch"]))
    def test_so_many_losses_that_a_running_sum_rounds(self, scale: str) -> None:
        """A dot product of 4 million float32 losses was off by 3e-4."""
        losses = torch.full((1 << 22,), 0.1)
        wanted = torch.tensor(0.1 if scale == "kept" else 0.05)
        torch.testing.assert_close(Trimmer(0.5, scale=scale)(losses), wanted, rtol=1e-6, atol=0.0)

    @pytest.mark.parametrize("form", ["sparse", "nested"])
    def test_what_is_not_dense_is_refused(self, form: str) -> None:
        losses = (
            torch.rand(4).to_sparse()
            if form == "sparse"
            else torch.nested.nested_tensor([LOSSES, LOSSES], layout=torch.jagged)
        )
        with pytest.raises(TypeError, match="expected `losses` to be dense, got "):
            Trimmer(0.5)(losses)
