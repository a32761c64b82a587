"""Criteria of every form, torch's and others': their signatures, their divisors, and sums of several."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim import Losses, Trimmer, per_sample
from batchtrim.errors import PassUnreducedLosses
from loss_cases import WEIGHT, pixels, token_losses_by_sample


class Normalised(nn.Module):
    """A stand-in for criteria that divide in a way of their own: by positives, or by ignored pixels too."""

    def __init__(self, reduction: str = "mean", ignore_index: int = 255, own: bool = True) -> None:
        super().__init__()
        self.reduction, self.ignore_index, self.own = reduction, ignore_index, own

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs, targets, reduction="none", ignore_index=self.ignore_index)
        if self.reduction == "none":
            return losses
        return losses.mean() if self.own else losses.sum() / (targets != self.ignore_index).sum()


class TestCriteriaOfOthers:
    def test_a_criterion_with_its_own_divisor(self) -> None:
        """mmsegmentation's avg_non_ignore=False: ignored pixels are in the divisor."""
        logits, labels = pixels()
        criterion = per_sample(Normalised())
        criterion(logits, labels.clamp(max=2))  # nothing ignored: the same
        with pytest.raises(ValueError, match=r"It uses another divisor\. Make it with reduction='none'"):
            criterion(logits, labels)
        plain = per_sample(Normalised("none"))(logits, labels)
        torch.testing.assert_close(plain.mean(), F.cross_entropy(logits, labels, ignore_index=255))

    def test_a_criterion_that_divides_as_torch_does(self) -> None:
        logits, labels = pixels()
        criterion = Normalised(own=False)
        torch.testing.assert_close(per_sample(criterion)(logits, labels).mean(), criterion(logits, labels))

    @pytest.mark.parametrize("in_place", [True, False])
    def test_a_compiled_criterion(self, in_place: bool) -> None:
        """``criterion.compile()`` keeps a compiled call of the criterion as it is, with its reduction."""
        logits, labels = pixels()
        criterion = nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=255)
        expected = criterion(logits, labels)
        if in_place:
            criterion.compile(backend="eager")
        losses = per_sample(criterion if in_place else torch.compile(criterion, backend="eager"))(logits, labels)
        torch.testing.assert_close(Trimmer(1.0)(losses), expected)
        torch.testing.assert_close(criterion(logits, labels), expected)

    @pytest.mark.parametrize("outside", [True, False])
    def test_a_compiled_function_of_torchs(self, outside: bool) -> None:
        """Its class weights and ignored labels are known, whether the arguments are bound before or after."""
        logits, labels = pixels()
        bound = {"weight": WEIGHT, "ignore_index": 255}
        function = functools.partial(F.cross_entropy, **bound)
        given = functools.partial(torch.compile(F.cross_entropy, backend="eager"), **bound)
        losses = per_sample(given if outside else torch.compile(function, backend="eager"))(logits, labels)
        torch.testing.assert_close(Trimmer(1.0)(losses), function(logits, labels))
        asked = per_sample(torch.compile(F.cross_entropy, backend="eager"), ignore_index=255)(logits, labels)
        torch.testing.assert_close(asked.mean(), F.cross_entropy(logits, labels, ignore_index=255))

    def test_a_focal_loss_divided_by_its_positives(self) -> None:
        """RetinaNet's: a function with a reduction of its own."""

        def focal(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
            losses = batchtrim.focal(F.binary_cross_entropy_with_logits(outputs, targets, reduction="none"))
            return losses if reduction == "none" else losses.sum() / targets.sum()

        outputs, targets = torch.randn(6, 4), (torch.rand(6, 4) > 0.8).float()
        with pytest.raises(ValueError, match="It uses another divisor"):
            per_sample(focal)(outputs, targets)
        assert per_sample(functools.partial(focal, reduction="none"))(outputs, targets).values.shape == (6,)

    def test_state_and_generator_of_the_criterion_stay(self) -> None:
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.reduction = "mean"
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                self.calls += 1
                losses = (outputs - targets).square() * torch.rand(len(outputs), 1)
                return losses if self.reduction == "none" else losses.mean()

        criterion = Counting()
        wrapped = per_sample(criterion)
        torch.manual_seed(3)
        first = wrapped(torch.ones(5, 2), torch.zeros(5, 2)).values
        torch.manual_seed(3)
        assert torch.equal(wrapped(torch.ones(5, 2), torch.zeros(5, 2)).values, first)
        assert int(criterion.calls) == 2

    @pytest.mark.parametrize(
        "criterion",
        [lambda o, t: F.cross_entropy(o, t), lambda o, t: torch.sum(-t * F.log_softmax(o, -1), -1).mean()],
        ids=["LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy"],
    )
    def test_averaging_losses_and_their_recipe(self, criterion: Callable[..., Tensor]) -> None:
        """timm's LabelSmoothingCrossEntropy and SoftTargetCrossEntropy average by themselves."""
        outputs = torch.randn(5, 3)
        targets = torch.rand(5, 3).softmax(1)
        with pytest.raises(PassUnreducedLosses, match=r"averages by itself.*torch\.stack\(\[criterion\(o\[None\]"):
            per_sample(criterion)(outputs, targets)

        def each(outputs: Tensor, targets: Tensor) -> Tensor:  # as the message says
            return torch.stack([criterion(o[None], t[None]) for o, t in zip(outputs, targets, strict=True)])

        torch.testing.assert_close(Trimmer(1.0)(per_sample(each)(outputs, targets)), criterion(outputs, targets))

    def test_more_than_losses_returned(self) -> None:
        with pytest.raises(TypeError, match=r"expected .* to return a tensor.*Take the losses out of it"):
            per_sample(lambda o, t: ((o - t).abs().mean(1), {"l1": 0.0}))(torch.rand(3, 2), torch.rand(3, 2))


SIGNATURES = {
    "ctc": (
        nn.CTCLoss(),
        (
            torch.randn(12, 3, 5).log_softmax(2),
            torch.randint(1, 5, (3, 4)),
            torch.full((3,), 12),
            torch.tensor([4, 2, 3]),
        ),
    ),
    "ctc function": (
        F.ctc_loss,
        (torch.randn(12, 3, 5).log_softmax(2), torch.randint(1, 5, (9,)), (12, 12, 10), (4, 2, 3)),
    ),
    "triplet": (nn.TripletMarginLoss(), tuple(torch.randn(3, 5, 4))),
    "triplet with distance": (nn.TripletMarginWithDistanceLoss(), tuple(torch.randn(3, 5, 4))),
    "gaussian": (nn.GaussianNLLLoss(), (torch.randn(5, 2), torch.randn(5, 2), torch.rand(5, 2) + 0.1)),
    "gaussian, one variance": (nn.GaussianNLLLoss(), (torch.randn(5, 2), torch.randn(5, 2), torch.rand(5, 1) + 0.1)),
    "cosine": (nn.CosineEmbeddingLoss(), (torch.randn(5, 4), torch.randn(5, 4), torch.tensor([1, -1, 1, 1, -1]))),
    "ranking": (nn.MarginRankingLoss(0.3), (torch.randn(5), torch.randn(5), torch.tensor([1, -1, 1, 1, -1]))),
    "multi margin": (nn.MultiMarginLoss(weight=WEIGHT), (torch.randn(5, 3), torch.randint(0, 3, (5,)))),
    "multi-label margin": (nn.MultiLabelMarginLoss(), (torch.randn(5, 3), torch.tensor([[0, 2, -1]] * 5))),
    "multi-label soft margin": (nn.MultiLabelSoftMarginLoss(weight=WEIGHT), (torch.randn(5, 3), torch.ones(5, 3))),
    "pos_weight": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT, weight=WEIGHT), (torch.randn(5, 3), torch.rand(5, 3))),
    "bce": (nn.BCELoss(), (torch.rand(5, 3), torch.rand(5, 3))),
}


class TestSignatures:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("name", SIGNATURES)
    def test_criteria_of_other_arguments(self, name: str, reduction: str) -> None:
        criterion, inputs = SIGNATURES[name]
        if isinstance(criterion, nn.Module):
            criterion.reduction = reduction
        else:
            criterion = functools.partial(criterion, reduction=reduction)
        losses = per_sample(criterion)(*inputs)
        torch.testing.assert_close(Trimmer(1.0)(losses), criterion(*inputs))
        assert Trimmer(0.4).select(losses).k == max(1, round(0.4 * len(losses.values)))

    def test_adaptive_softmax(self) -> None:
        criterion = nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4, 8], div_value=2.0)
        inputs, targets = torch.randn(6, 8), torch.randint(0, 12, (6,))
        torch.testing.assert_close(per_sample(criterion)(inputs, targets).mean(), criterion(inputs, targets).loss)

    @pytest.mark.parametrize("name", ["ctc", "triplet", "gaussian", "cosine", "ranking"])
    def test_too_few_arguments_name_the_recipe(self, name: str) -> None:
        criterion, inputs = SIGNATURES[name]
        with pytest.raises(TypeError, match=r"expected the arguments of .*, got 2\..*lambda outputs, targets"):
            per_sample(criterion)(*inputs[:2])

    def test_the_recipe_trains(self) -> None:
        criterion = per_sample(nn.GaussianNLLLoss())
        model = nn.Linear(3, 4)
        step = batchtrim.TrimmedForward(
            model, lambda o, t: criterion(o[:, :2], t, o[:, 2:].exp()), Trimmer(0.5), engine="exact"
        )
        step(torch.randn(8, 3), torch.randn(8, 2)).backward()
        assert model.weight.grad is not None

    def test_weights_by_position(self) -> None:
        with pytest.raises(TypeError, match=r"Bind the others by name.*functools\.partial"):
            per_sample(F.cross_entropy)(torch.randn(4, 3), torch.randint(0, 3, (4,)), WEIGHT)


def dice(outputs: Tensor, targets: Tensor) -> Tensor:
    """One minus the overlap of the first class, one number an image."""
    chance, true = outputs.softmax(1)[:, 0].flatten(1), (targets == 0).flatten(1).float()
    return 1 - 2 * (chance * true).sum(1) / (chance.sum(1) + true.sum(1) + 1)


class TestSums:
    def test_a_main_and_an_auxiliary_loss(self) -> None:
        """torchvision's reference training of segmentation: ``ce(out) + 0.4 * ce(aux)``."""
        (main, labels), (aux, _) = pixels(), pixels()
        plain = nn.CrossEntropyLoss(ignore_index=255, weight=WEIGHT)
        for unit in ("sample", "element"):
            ce = per_sample(plain, unit=unit)
            losses = ce(main, labels) + 0.4 * ce(aux, labels)
            right = plain(main, labels) + 0.4 * plain(aux, labels)
            torch.testing.assert_close(losses.mean(), right)
            torch.testing.assert_close(Trimmer(1.0, unit=unit)(losses), right)
            values = ce(main, labels).values + 0.4 * ce(aux, labels).values
            alike = replace(ce(main, labels), values=values)
            torch.testing.assert_close(Trimmer(0.5, unit=unit)(losses), Trimmer(0.5, unit=unit)(alike))

    @pytest.mark.parametrize("scale", ["kept", "batch"])
    @pytest.mark.parametrize("weight", [None, WEIGHT])
    def test_cross_entropy_and_dice(self, weight: Tensor | None, scale: str) -> None:
        """smp and MONAI: terms of which only one has class weights and ignored pixels."""
        logits, labels = pixels()
        plain = nn.CrossEntropyLoss(ignore_index=255, weight=weight)
        right = plain(logits, labels) + dice(logits, labels).mean()
        for losses in (
            per_sample(plain)(logits, labels) + per_sample(dice)(logits, labels),
            per_sample(plain)(logits, labels) + dice(logits, labels),
            dice(logits, labels) + per_sample(plain)(logits, labels),
        ):
            torch.testing.assert_close(losses.mean(), right)
            torch.testing.assert_close(Trimmer(1.0, scale=scale)(losses), right)
        trim = Trimmer(0.5)
        loss = trim(losses)
        kept = trim.last.selection.indices
        torch.testing.assert_close(loss, plain(logits[kept], labels[kept]) + dice(logits[kept], labels[kept]).mean())
        selection = trim.select(losses)
        torch.testing.assert_close(batchtrim.reduce(losses, selection), loss)
        with pytest.raises(ValueError, match=r"a sum of 2 terms .* Pass them whole: reduce\(losses, selection\)"):
            batchtrim.reduce(losses.values, selection)

    def test_losses_add_up_and_scale(self) -> None:
        one, two = Losses(torch.tensor([1.0, 2.0])), Losses(torch.tensor([3.0, 5.0]))
        assert (one + two).values.tolist() == [4.0, 7.0]
        assert (two - one).values.tolist() == [2.0, 3.0]
        assert (-one / 2).values.tolist() == (one / torch.tensor(-2.0)).values.tolist() == [-0.5, -1.0]
        assert (torch.tensor(2.0) * one).values.tolist() == [2.0, 4.0]
        assert sum([one, two, two]).values.tolist() == [7.0, 12.0]  # type: ignore[union-attr]
        assert (one + two.values).values.tolist() == [4.0, 7.0]
        assert (one.detach() * torch.tensor([2.0, 0.0])).values.tolist() == [2.0, 0.0]
        values, mask, weights = one
        assert (values.tolist(), mask, weights) == ([1.0, 2.0], None, None)

    def test_what_does_not_add(self) -> None:
        ce = per_sample(nn.CrossEntropyLoss())(torch.randn(4, 3), torch.randint(0, 3, (4,)))
        with pytest.raises(PassUnreducedLosses, match=r"trim\(losses\) \+ term"):
            ce + torch.tensor(1.0)
        with pytest.raises(ValueError, match=r"expected a term of shape \(4,\)"):
            ce + torch.rand(4, 3)
        with pytest.raises(ValueError, match="expected two terms of one unit"):
            ce + per_sample(nn.MSELoss(), unit="element")(torch.rand(4), torch.rand(4))
        with pytest.raises(PassUnreducedLosses, match=r"got 1\.0\. Add it to the trimmed loss"):
            ce + 1.0
        with pytest.raises(TypeError):
            ce * "2"
        with pytest.raises(TypeError, match="read by name"):
            _, _, _ = token_losses_by_sample()


class TestDivisorsOfTorchs:
    """Divide a mean as the criterion itself does, however it is given."""

    @pytest.mark.filterwarnings("ignore:.*NLLLoss2d.*:FutureWarning")
    def test_a_torch_class_that_inherits_its_forward(self) -> None:
        logits, labels = pixels()
        weight = torch.tensor([0.2, 1.0, 3.0])[: logits.shape[1]]
        criterion = nn.NLLLoss2d(weight=weight, ignore_index=255)
        found = per_sample(criterion)(logits.log_softmax(1), labels)
        torch.testing.assert_close(found.mean(), criterion(logits.log_softmax(1), labels))

    @pytest.mark.skipif("weight" not in inspect.signature(F.mse_loss).parameters, reason="newer torch has it")
    @pytest.mark.parametrize("unit", ["sample", "element"])
    @pytest.mark.parametrize("function", [F.mse_loss, F.l1_loss, F.huber_loss])
    def test_weights_of_entries(self, function: Callable[..., Tensor], unit: str) -> None:
        """mse_loss and l1_loss divide by the sum of their weights, huber_loss by the number of entries."""
        outputs, targets, weight = torch.randn(6, 4), torch.randn(6, 4), torch.rand(6, 4)
        weighted = functools.partial(function, weight=weight)
        found = Trimmer(1.0, unit=unit)(per_sample(weighted, unit=unit)(outputs, targets))
        torch.testing.assert_close(found, weighted(outputs, targets))
        kept = Trimmer(0.25, unit="element")(per_sample(weighted, unit="element")(outputs, targets))
        losses = function(outputs, targets, weight=weight, reduction="none").flatten()
        rows = losses.topk(6).indices
        divisor = 6 if function is F.huber_loss else weight.flatten()[rows].sum()
        torch.testing.assert_close(kept, losses[rows].sum() / divisor)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_a_compiled_criterion(self, reduction: str) -> None:
        """Setting its reduction set that of the module inside: the caller's own criterion averaged no more."""
        logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, -100, 1])
        own = nn.CrossEntropyLoss(weight=WEIGHT[:3], reduction=reduction)
        value = own(logits, labels)
        compiled = torch.compile(own, backend="eager")
        torch.testing.assert_close(Trimmer(1.0)(per_sample(compiled)(logits, labels)), value)
        assert own.reduction == reduction
        torch.testing.assert_close(compiled(logits, labels), value)

    @pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
    @pytest.mark.parametrize(
        "legacy", [{"size_average": False}, {"reduce": True}, {"reduce": False}, {"size_average": True}]
    )
    def test_arguments_that_came_before_reduction(self, legacy: dict[str, bool]) -> None:
        outputs, targets = torch.randn(6, 4), torch.randn(6, 4)
        criterion = functools.partial(F.mse_loss, **legacy)
        torch.testing.assert_close(
            Trimmer(1.0)(per_sample(criterion)(outputs, targets)), criterion(outputs, targets).mean()
        )

    def test_a_forward_that_takes_the_reduction(self) -> None:
        class Focal(nn.Module):
            def forward(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
                losses = batchtrim.focal(F.cross_entropy(outputs, targets, reduction="none"))
                return losses if reduction == "none" else getattr(losses, reduction)()

        outputs, targets = torch.randn(6, 4), torch.randint(0, 4, (6,))
        torch.testing.assert_close(per_sample(Focal())(outputs, targets).mean(), Focal()(outputs, targets))
        bound = functools.partial(nn.CrossEntropyLoss())
        torch.testing.assert_close(per_sample(bound)(outputs, targets).mean(), bound(outputs, targets))

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
    def test_a_scripted_criterion_is_refused_with_the_way_out(self) -> None:
        with pytest.raises(TypeError, match="expected `criterion` in Python, got one of TorchScript"):
            per_sample(torch.jit.script(nn.MSELoss()))
        outputs = torch.randn(3, 2)
        plain = per_sample(torch.jit.script(nn.MSELoss(reduction="none")))
        torch.testing.assert_close(plain(outputs, -outputs).mean(), F.mse_loss(outputs, -outputs))

    def test_a_dict_of_losses_names_the_way_out(self) -> None:
        with pytest.raises(TypeError, match=r"criterion\(outputs, targets\)\['ce'\]"):
            per_sample(lambda outputs, targets: {"ce": F.cross_entropy(outputs, targets)})(
                torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)
            )


class TestShapesBeyondTheFirstTwo:
    @pytest.mark.parametrize(
        ("criterion", "shapes"),
        [
            (nn.MarginRankingLoss(0.3), [(5, 1), (5, 1), (1, 5)]),
            (lambda a, b, y: (a - b).abs() * y, [(5, 1), (5, 1), (5,)]),
            (lambda a, b, y: (a - b).abs() * y, [(5,), (5,), (5, 1)]),
        ],
        ids=["ranking", "a column", "a column last"],
    )
    def test_samples_against_other_samples_are_refused(self, criterion: Any, shapes: Any) -> None:
        """The mean is torch's, but every loss is of two samples: half of them is no half of the batch."""
        with pytest.raises(ValueError, match=r"broadcast to \(5, 5\)"):
            per_sample(criterion)(*(torch.rand(shape) for shape in shapes))

    @pytest.mark.parametrize(
        ("criterion", "shapes"),
        [
            (nn.MarginRankingLoss(0.3), [(5, 1), (1, 5), (5, 5)]),  # RankNet: a target for every pair
            (nn.MarginRankingLoss(0.3), [(5,), (5,), (1,)]),
            (nn.CosineEmbeddingLoss(), [(5, 4), (5, 4), (1,)]),
            (lambda a, b, w: (a - b).abs() * w, [(5, 3), (5, 3), (3,)]),  # a weight for each class
            (lambda a, b, w: (a - b[:, None]).abs() * w, [(5, 3), (5,), (3,)]),
            (nn.BCEWithLogitsLoss(weight=torch.rand(5, 1), pos_weight=torch.rand(3)), [(5, 3), (5, 3)]),
        ],
        ids=["pairs", "one target", "one label", "class weight", "labels", "weight"],
    )
    def test_intended_broadcasting_works(self, criterion: Any, shapes: Any) -> None:
        inputs = [torch.rand(shape) for shape in shapes]
        losses = per_sample(criterion)(*inputs)
        torch.testing.assert_close(Trimmer(1.0)(losses), criterion(*inputs).mean())

    @pytest.mark.slow
    def test_the_recipe_for_an_engine_can_be_traced(self) -> None:
        """A per_sample made in every call cannot: the shared engine refused what the message advised."""
        criterion = nn.CosineEmbeddingLoss()
        y, x = torch.tensor([1, -1, 1, 1, -1, 1]), (torch.randn(6, 4), torch.randn(6, 4))

        class Towers(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tower = nn.Linear(4, 3)

            def forward(self, a: Tensor, b: Tensor) -> Any:
                return self.tower(a), self.tower(b)

        with pytest.raises(
            TypeError, match=r"loss = per_sample\(criterion\), and then lambda outputs, targets: loss\("
        ):
            batchtrim.TrimmedForward(Towers(), criterion, Trimmer(0.5), "exact")(x, y)
        loss, towers = per_sample(criterion), Towers()
        step = batchtrim.TrimmedForward(
            towers, lambda outputs, targets: loss(*outputs, targets), Trimmer(0.5), "shared"
        )
        one, other = towers(*x)
        each = F.cosine_embedding_loss(one, other, y, reduction="none")
        torch.testing.assert_close(step(x, y), each.topk(3).values.mean())
