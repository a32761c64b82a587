"""What is done to a criterion before it is handed over, or while it is used: hooks, scripts, another forward, parts."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import batchtrim
from batchtrim import Trimmer, per_sample
from batchtrim.errors import PassUnreducedLosses

WEIGHT, VALUES = torch.arange(1.0, 6.0), torch.arange(4.0)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 5), torch.tensor([4, 0, 1, 2, 3, 4, 0, 1])


class TestHooks:
    """A criterion of torch's with a hook was taken for the criterion alone, and its value never compared."""

    def test_one_that_leaves_labels_out(self) -> None:
        criterion = nn.CrossEntropyLoss(weight=WEIGHT)
        criterion.register_forward_pre_hook(lambda _, given: (given[0], torch.where(given[1] == 4, -100, given[1])))
        with pytest.raises(ValueError, match=r"Its hooks change its losses or its targets\. Write a function"):
            per_sample(criterion)(*batch())

    def test_one_that_floods_the_mean(self) -> None:
        criterion = nn.CrossEntropyLoss()
        criterion.register_forward_hook(lambda _, __, loss: (loss - 1.5).abs() + 1.5)
        with pytest.raises(ValueError, match="Its hooks change its losses"):
            per_sample(criterion)(*batch())

    def test_one_that_scales(self) -> None:
        criterion = nn.CrossEntropyLoss(weight=WEIGHT)
        criterion.register_forward_hook(lambda _, __, loss: 2.0 * loss)
        outputs, labels = batch()
        torch.testing.assert_close(Trimmer(1.0)(per_sample(criterion)(outputs, labels)), criterion(outputs, labels))

    def test_one_that_averages(self) -> None:
        """It was said that the inputs were of one sample."""
        criterion = nn.CrossEntropyLoss()
        criterion.register_forward_hook(lambda _, __, loss: loss.mean())
        with pytest.raises(PassUnreducedLosses, match="its hooks are called with un-reduced losses"):
            per_sample(criterion)(*batch())

    def test_one_that_takes_a_number(self) -> None:
        criterion, seen = nn.CrossEntropyLoss(), []
        criterion.register_forward_hook(lambda _, __, loss: seen.append(loss.item()))
        with pytest.raises(RuntimeError) as caught:
            per_sample(criterion)(*batch())
        assert "its hooks get un-reduced losses" in caught.value.__notes__[0]


class TestAnotherForward:
    def test_of_the_instance(self) -> None:
        """It was said that the inputs were of one sample."""
        criterion = nn.CrossEntropyLoss()
        own = criterion.forward
        criterion.forward = lambda outputs, labels: own(outputs / 2, labels)  # type: ignore[method-assign]
        with pytest.raises(PassUnreducedLosses, match="Make it with reduction='none'"):
            per_sample(criterion)(*batch())
        criterion.reduction = "none"  # as the message says
        outputs, labels = batch()
        torch.testing.assert_close(
            Trimmer(1.0)(per_sample(criterion)(outputs, labels)), F.cross_entropy(outputs / 2, labels)
        )

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_its_own_compiled(self, reduction: str) -> None:
        """It is bound to the criterion's own reduction; it was said that the inputs were of one sample."""
        criterion = nn.CrossEntropyLoss(weight=WEIGHT, reduction=reduction)
        criterion.forward = torch.compile(criterion.forward, backend="eager")  # type: ignore[method-assign]
        with pytest.raises(TypeError, match=r"with a compiled one.*in place: criterion\.compile\(\)"):
            per_sample(criterion)
        del criterion.forward
        criterion.compile(backend="eager")  # as the message says
        outputs, labels = batch()
        torch.testing.assert_close(
            Trimmer(1.0)(per_sample(criterion)(outputs, labels)), F.cross_entropy(outputs, labels, weight=WEIGHT)
        )

    def test_weights_in_it_are_compared(self) -> None:
        criterion = nn.CrossEntropyLoss()

        def weighted(outputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
            return F.cross_entropy(outputs, labels, weight=WEIGHT, reduction=reduction)

        criterion.forward = weighted  # type: ignore[method-assign]
        del criterion.reduction
        with pytest.raises(ValueError, match="It uses another divisor"):
            per_sample(criterion)(*batch())

    def test_parametrized_after_it_was_wrapped(self) -> None:
        """``'Temperature' object has no attribute 't'``: parametrizing gives a module another class."""

        class Temperature(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.t, self.reduction = nn.Parameter(torch.tensor(0.5)), "mean"

            def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
                return F.cross_entropy(outputs * self.t, labels, reduction=self.reduction)

        class Positive(nn.Module):
            def forward(self, raw: Tensor) -> Tensor:
                return raw.exp()

        criterion, (outputs, labels) = Temperature(), batch()
        wrapped = per_sample(criterion)
        wrapped(outputs, labels)
        parametrize.register_parametrization(criterion, "t", Positive())
        torch.testing.assert_close(Trimmer(1.0)(wrapped(outputs, labels)), criterion(outputs, labels))


@pytest.mark.parametrize("criterion", [F.cross_entropy, nn.CrossEntropyLoss(weight=WEIGHT)])
def test_a_criterion_computes_the_same_after_pickling(criterion: Callable[..., Any]) -> None:
    outputs, labels = batch()
    again = pickle.loads(pickle.dumps(per_sample(criterion)))
    torch.testing.assert_close(again(outputs, labels).mean(), criterion(outputs, labels))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
class TestTorchScript:
    @pytest.mark.parametrize("make", [torch.jit.script, lambda one: torch.jit.trace(one, batch())])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_class_weights_that_cannot_be_read(self, make: Callable[..., Any], reduction: str) -> None:
        """With reduction "none" the weighted losses were divided by the number of samples."""
        criterion = make(nn.CrossEntropyLoss(weight=WEIGHT, reduction=reduction))
        with pytest.raises(TypeError, match=r"of TorchScript, whose class weights .*Pass nn\.CrossEntropyLoss itself"):
            per_sample(criterion)

    def test_a_function(self) -> None:
        """It was said to take no ``reduction``, and to need it bound."""
        traced = torch.jit.trace(lambda o, t: F.cross_entropy(o, t), batch())
        with pytest.raises(PassUnreducedLosses, match="it is TorchScript, in which no reduction can be set"):
            per_sample(traced)(*batch())


class Wraps(nn.Module):
    """A criterion around one of torch's, as focal losses often are."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction, self.ce = reduction, nn.CrossEntropyLoss(reduction=reduction)

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return 2.0 * self.ce(outputs, labels)


class Reduces(nn.Module):
    def __init__(self, reduce: bool = True) -> None:
        super().__init__()
        self.reduce = reduce

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs, labels, reduction="none")
        return 2.0 * (losses.mean() if self.reduce else losses)


class Called:
    """Not a module."""

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = reduction

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return 2.0 * F.cross_entropy(outputs, labels, reduction=self.reduction)


@pytest.mark.parametrize(
    ("averaging", "cure", "says"),
    [
        (Wraps(), Wraps("none"), r"`ce` inside of it averages\. Make that with reduction='none'"),
        (Reduces(), Reduces(False), r"it has no `reduction`\. If it has another option for that \(`reduce`"),
        (Called(), Called("none"), r"Make it with reduction='none'"),
    ],
    ids=["a part", "another option", "no module"],
)  # fmt: skip
def test_the_advice_for_a_criterion_that_averages_works(averaging: Any, cure: Any, says: str) -> None:
    """It was to bind ``reduction`` by functools.partial, which none of them takes."""
    outputs, labels = batch()
    with pytest.raises(PassUnreducedLosses, match=says):
        per_sample(averaging)(outputs, labels)
    torch.testing.assert_close(Trimmer(1.0)(per_sample(cure)(outputs, labels)), averaging(outputs, labels))


@pytest.mark.parametrize("momentum", [0.1, 1e-4])
def test_a_function_that_changes_its_own_state(momentum: float) -> None:
    """A running mean in a closure or an object: called once more in every batch, it moved twice, mostly unseen."""

    class Running:
        mean = 1.0

        def loss(self, outputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
            losses = F.cross_entropy(outputs, labels, reduction="none")
            self.mean += momentum * (losses.mean().item() - self.mean)
            losses = losses / self.mean
            return losses if reduction == "none" else losses.mean()

    outputs, labels = batch()
    running = Running()
    with pytest.raises(ValueError, match=r"got others from a second call.*Bind its reduction"):
        per_sample(running.loss)(outputs, labels)
    one, other = Running(), Running()
    bound = per_sample(functools.partial(one.loss, reduction="none"))  # as the message says
    for _ in range(2):
        torch.testing.assert_close(Trimmer(1.0)(bound(outputs, labels)), other.loss(outputs, labels))
    assert one.mean == other.mean


class TestLossesWithWhatIsNoTensor:
    def losses(self) -> batchtrim.Losses:
        return per_sample(nn.CrossEntropyLoss())(*batch())

    def test_weights_in_an_array(self) -> None:
        """NumPy made an array of eight `Losses`, and the advice was to call the trimmer before .numpy()."""
        losses, weights = self.losses(), torch.rand(8)
        for times in (lambda: losses * weights.numpy(), lambda: weights.numpy() * losses):
            with pytest.raises(TypeError, match=r"expected a number or a tensor to scale .*torch\.as_tensor\(array"):
                times()

    def test_a_number_added(self) -> None:
        losses = self.losses()
        for add in (lambda: losses + 0.1, lambda: 0.1 + losses, lambda: losses - 0.1, lambda: 0.1 - losses):
            with pytest.raises(PassUnreducedLosses, match=r"Add it to the trimmed loss: trim\(losses\) \+ term"):
                add()

    def test_what_tensors_have(self) -> None:
        with pytest.raises(AttributeError, match=r"got \.backward, which tensors have.*trim\(losses\)\.backward"):
            self.losses().backward()  # type: ignore[attr-defined]
        assert not hasattr(self.losses(), "nothing")

    def test_a_function_of_their_values(self) -> None:
        """The advice was losses.values alone, which leaves out which of them count."""
        outputs, labels = batch()
        labels[:3] = -100
        losses = per_sample(nn.CrossEntropyLoss())(outputs, labels)
        with pytest.raises(
            TypeError, match=r"losses\.values\. dataclasses\.replace\(losses, values=\.\.\.\) keeps its mask"
        ):
            batchtrim.focal(losses)  # type: ignore[arg-type]
        found = Trimmer(0.5)(dataclasses.replace(losses, values=batchtrim.focal(losses.values)))
        by_hand = batchtrim.focal(F.cross_entropy(outputs[3:], labels[3:], reduction="none"))
        torch.testing.assert_close(found, by_hand.topk(2).values.mean())

    @pytest.mark.filterwarnings("ignore:.*MaskedTensors is in prototype stage")
    def test_a_masked_tensor(self) -> None:
        """A traceback from deep inside: sort is not implemented."""
        values, mask = torch.rand(6), torch.tensor([True, True, False, True, True, False])
        masked = torch.masked.masked_tensor(values, mask)
        with pytest.raises(TypeError, match=r"a MaskedTensor\. Give its parts: trim\(losses\.get_data\(\), mask="):
            Trimmer(0.5)(masked)
        loss = Trimmer(0.5)(masked.get_data(), mask=masked.get_mask())
        torch.testing.assert_close(loss, values[mask].topk(2).values.mean())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Trimmer(batchtrim.hardest()), r"`keep` to be a schedule, .* got hardest\(\)\. For the paper's"),
        (lambda: Trimmer(Trimmer(0.5)), r"`keep` to be a schedule, .* got Trimmer\(.*Pass its schedule"),
        (lambda: Trimmer(lambda p, epochs: 1 - p / epochs, total=5), "a callable of progress, got <function"),
        (lambda: Trimmer(lambda epoch: 1 - 0.1 * epoch, total=5), "progress, from 0 to 1, got one of `epoch`"),
        (lambda: Trimmer(0.5, select=batchtrim.linear(1.0, 0.2)), r"`select` to be a selection rule .*got linear\("),
        (lambda: Trimmer(0.5, select=Trimmer(0.5)), r"cannot be called with \(losses, keep, generator\) as a rule is"),
        (lambda: per_sample(nn.MSELoss(), ignore_index=[0, 255]), r"got \[0, 255\]\. Leave out several values"),
    ],
    ids=[
        "a rule",
        "a trimmer",
        "two numbers",
        "a function of epochs",
        "a schedule",
        "a trimmer as a rule",
        "two labels",
    ],
)
def test_one_thing_for_another(make: Callable[[], Any], says: str) -> None:
    """`total` was asked for, or a call failed later; a function of epochs got progress, so nearly all was kept."""
    with pytest.raises(TypeError, match=says):
        make()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: Trimmer(0.5, 10),
            r"expected the arguments after `keep` of Trimmer by name, got 1 .*Did you mean total=10\?",
        ),
        (lambda: per_sample(nn.MSELoss(), "element"), r"after `criterion` of per_sample .*unit='element'"),
        (lambda: batchtrim.KeepLog(100, 10), r"after `n` of KeepLog .*classes=10"),
        (
            lambda: Trimmer(0.5)(VALUES, VALUES > 0),
            r"of Trimmer by name, .*\(4,\) and dtype torch\.bool\. .*rank_by, mask",
        ),
        (lambda: Trimmer(0.5).select(VALUES, VALUES), r"of Trimmer\.select by name, .*The names are rank_by, mask"),
        (lambda: Trimmer(batchtrim.by_accuracy()).step(1, 0.9), r"of Trimmer\.step by name, .*mean accuracy=0\.9\?"),
        (lambda: Trimmer(0.5).load_state_dict({}, "saved"), r"of Trimmer\.load_state_dict .*mean length='saved'\?"),
        (lambda: batchtrim.token_losses(VALUES, VALUES, -100, True), r"of token_losses .*ignore_index, shift"),
        (
            lambda: batchtrim.testing.check_engine(nn.Linear(1, 1), nn.MSELoss(), VALUES, VALUES),
            r"of check_engine by name, .*\. By position: model, batch, per_sample_loss\.",
        ),
        (
            lambda: batchtrim.TrimmedForward(nn.Identity(), nn.MSELoss(), Trimmer(0.5), "exact", 1),  # type: ignore[call-arg]
            r"after `engine` of TrimmedForward",
        ),
    ],
    ids=lambda given: "" if callable(given) else given.partition("of ")[2].split()[0],
)
def test_an_argument_by_position(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        make()


@pytest.mark.parametrize(
    ("name", "says"),
    [("masks", "got `masks`. Did you mean 'mask'?"), ("weight", "got `weight`. Multiply weights into the losses")],
)
def test_an_argument_of_another_name(name: str, says: str) -> None:
    with pytest.raises(TypeError, match=re.escape(says)):
        Trimmer(0.5)(VALUES, **{name: VALUES})
