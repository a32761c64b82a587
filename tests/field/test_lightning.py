"""Lightning as its users write it: each test names the public report it comes from."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("lightning")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from lightning_cases import BATCH, QUIET, SAMPLES, Module, Plain, data, loader, trainer
from torch.utils.data import DataLoader, TensorDataset

import batchtrim
from batchtrim.errors import ChooseLength
from batchtrim.integrations._lightning_checks import check_used
from batchtrim.integrations._recorder import NotFound
from batchtrim.integrations.lightning import TrimmingCallback

pytestmark = [pytest.mark.usefixtures("settled"), *QUIET]


class AsDict(Plain):
    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        return {"loss": nn.CrossEntropyLoss()(self.model(x), y), "other": 1}


class Sum(Plain):
    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        out = self.model(x)
        return F.cross_entropy(out, y) + 0.4 * F.cross_entropy(out.flip(1), y)


class Regularised(Plain):
    def training_step(self, batch: Any, index: int) -> Any:
        return super().training_step(batch, index) + 0.1 * self.model[0].weight.square().sum()


class Manual(Plain):
    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.keeps.append(round(self.trim.keep, 6))
        optimizers = self.optimizers()
        loss = self.trim(F.cross_entropy(self.model(x), y, reduction="none"))
        self.manual_backward(loss)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        first, last = self.model[0], self.model[2]
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (first, last)]


def trained(module: Module, callback: TrimmingCallback, folder: Path, **options: Any) -> Module:
    trainer(folder, callback, **{"max_epochs": 2, **options}).fit(module, loader())
    return module


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], rtol=1e-5, atol=1e-6)


class Trimming(Module):
    """The same in the module's own words."""

    terms = staticmethod(lambda out, y: F.cross_entropy(out, y, reduction="none"))

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return self.trim(self.terms(self.model(x), y))


@pytest.mark.parametrize("module", [Plain, AsDict])
def test_a_module_that_never_trims_raises_a_warning(module: type[Module], tmp_path: Path) -> None:
    """Lightning's callbacks are added to modules as they are: nothing was trimmed, without a word."""
    with pytest.warns(UserWarning, match="has not called self.trim in a whole epoch: it trains on everything") as told:
        trained(module(), TrimmingCallback(0.5), tmp_path, max_epochs=3)
    assert len([each for each in told if "has not called" in str(each.message)]) == 1


def test_a_step_that_leaves_no_choice_behind_has_called_its_trimmer() -> None:
    trim = batchtrim.Trimmer(0.5)
    torch.vmap(trim)(torch.rand(2, 8))
    with warnings.catch_warnings(action="error"):
        check_used(Module(), "trim", trim, None)


@pytest.mark.slow
def test_a_compiled_module_that_trims_raises_no_warning(tmp_path: Path) -> None:
    """A compiled step leaves no choice behind, so the warning came although it had called self.trim."""
    module, plain = Trimming(), Trimming()
    module.training_step = torch.compile(module.training_step, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trained(module, TrimmingCallback(0.5), tmp_path)
    assert not [each for each in told if "has not called" in str(each.message)]
    assert_same(module.model, trained(plain, TrimmingCallback(0.5), tmp_path).model)


@pytest.mark.parametrize("module", [Plain, AsDict])
def test_an_unchanged_module_is_trimmed(module: type[Module], tmp_path: Path) -> None:
    mine = trained(module(), TrimmingCallback(0.5, intercept=True), tmp_path)
    assert_same(mine.model, trained(Trimming(), TrimmingCallback(0.5), tmp_path).model)
    assert "training_step" not in vars(mine), "and left as it was"


def test_a_sum_of_losses_in_an_unchanged_module(tmp_path: Path) -> None:
    class Both(Trimming):
        terms = staticmethod(
            lambda out, y: (
                F.cross_entropy(out, y, reduction="none") + 0.4 * F.cross_entropy(out.flip(1), y, reduction="none")
            )
        )

    mine = trained(Sum(), TrimmingCallback(0.5, intercept=True), tmp_path)
    assert_same(mine.model, trained(Both(), TrimmingCallback(0.5), tmp_path).model)


def test_keeping_everything_in_an_unchanged_module(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = trained(Plain(), TrimmingCallback(1.0), tmp_path)
    assert_same(trained(Plain(), TrimmingCallback(1.0, intercept=True), tmp_path).model, plain.model)


def test_what_interception_cannot_do_is_refused(tmp_path: Path) -> None:
    class Own(Plain):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return (self.model(batch[0]) ** 2).mean()

    for module, reason in ((Regularised(), "it has a further term"), (Own(), "no call of a loss function")):
        with pytest.raises(NotFound, match=reason):
            trained(module, TrimmingCallback(0.5, intercept=True), tmp_path)
        assert "training_step" not in vars(module)
    with pytest.raises(ValueError, match="expected automatic optimization with `intercept`"):
        trained(Manual(), TrimmingCallback(0.5, intercept=True), tmp_path)
    with pytest.raises(ValueError, match="expected no `scope` 'global' with `intercept`"):
        TrimmingCallback(intercept=True, scope="global")


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({"max_epochs": 2}, [1.0, 0.885714, 0.771429, 0.657143, 0.542857, 0.428571, 0.314286, 0.2]),
        ({"max_epochs": 1}, [1.0, 0.733333, 0.466667, 0.2]),
        ({"max_epochs": -1, "max_steps": 6}, [1.0, 0.6, 0.2]),  # two optimizers: max_steps ends it after 3 batches
        ({"max_epochs": 1, "max_steps": 100}, [1.0, 0.733333, 0.466667, 0.2]),  # the epoch ends it
    ],
)
def test_two_optimizers_by_hand(options: dict[str, Any], keeps: list[float], tmp_path: Path) -> None:
    """Lightning#17958: global_step counts every optimizer's steps, so a schedule was over at half time."""
    module = trained(Manual(), TrimmingCallback(clock="step"), tmp_path, **options)
    assert module.keeps == pytest.approx(keeps, abs=1e-5)


class WithNorm(Trimming):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.keeps.append(round(self.trim.keep, 6))
        return super().training_step(batch, index)


@pytest.mark.parametrize("clock", ["epoch", "step"])
def test_averaging_weights_does_not_lengthen_the_schedule(clock: str, tmp_path: Path) -> None:
    """StochasticWeightAveraging adds an epoch for BatchNorm: the last one that trains is still the schedule's last."""
    module = WithNorm()
    callback = TrimmingCallback(clock=clock)
    fit = trainer(tmp_path, callback, max_epochs=3)
    fit.callbacks.append(StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1))  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning|torch")
        fit.fit(module, loader())
    assert module.keeps[0] == 1.0
    assert module.keeps[11] == pytest.approx(0.2), "the third epoch's last batch"


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({"limit_train_batches": 2}, [1.0, 1.0, 0.2, 0.2]),
        ({"overfit_batches": 2}, [1.0, 1.0, 0.2, 0.2]),
        ({"max_epochs": 1, "max_steps": 2}, [1.0, 0.2]),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, [1.0] * 4 + [0.2] * 4),
    ],
)
def test_keep_follows_epochs_or_steps(options: dict[str, Any], keeps: list[float], tmp_path: Path) -> None:
    module = Module()
    trained(module, TrimmingCallback(), tmp_path, **options)
    assert module.keeps == keeps


def test_stopping_early(tmp_path: Path) -> None:
    class Stops(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            self.log("still", 1.0)
            return super().training_step(batch, index)

    module = Stops()
    fit = trainer(tmp_path, TrimmingCallback(), max_epochs=5)
    fit.callbacks.append(EarlyStopping("still", patience=1, mode="min", check_on_train_epoch_end=True))  # type: ignore[attr-defined]
    fit.fit(module, loader())
    assert module.keeps == [1.0] * 4 + [0.8] * 4, "the schedule is that of max_epochs"


class Tuned(Module):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.01, 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(), self.batch_size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("find", ["lr_find", "scale_batch_size"])
def test_tuners_keep_everything(find: str, tmp_path: Path) -> None:
    """Lightning#17992: a tuner trains without the callbacks, and self.trim was not there."""
    module = Tuned()
    callback = TrimmingCallback(0.3)
    fit = trainer(tmp_path, callback, max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = Tuner(fit)
        if find == "lr_find":
            tuner.lr_find(module, num_training=8, update_attr=False)
        else:
            tuner.scale_batch_size(module, max_trials=2, steps_per_trial=2)
        assert set(module.keeps) == {1.0}
        fit.fit(module)
    assert module.keeps[-1] == 0.3


def test_the_sanity_check_may_trim(tmp_path: Path) -> None:
    class Validates(Module):
        def validation_step(self, batch: Any, index: int) -> None:
            self.trim(F.cross_entropy(self.model(batch[0]), batch[1], reduction="none"))

    trainer(tmp_path, TrimmingCallback(0.5), max_epochs=1).fit(Validates(), loader(), loader())


class Recording(Module):
    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y, ids = batch
        loss = self.trim(F.cross_entropy(self.model(x), y, reduction="none"))
        self.keep_log.record(self.trim.last, ids=ids)
        return loss


def test_a_keep_log_sees_every_sample_once_an_epoch(tmp_path: Path) -> None:
    rows = TensorDataset(*data().tensors, torch.arange(SAMPLES))
    log = batchtrim.KeepLog(SAMPLES)
    trainer(tmp_path, TrimmingCallback(0.5, keep_log=log), max_epochs=2).fit(Recording(), DataLoader(rows, BATCH))
    assert log.table()["seen"].tolist() == [2] * SAMPLES
    assert log.table()["kept"].sum() == SAMPLES
    assert len(log.history) == 2


def test_a_keep_log_in_which_nothing_is_recorded(tmp_path: Path) -> None:
    log = batchtrim.KeepLog(SAMPLES)
    with pytest.raises(ValueError, match=r"expected Module\.training_step to record in the `keep_log`, got none"):
        trained(Module(), TrimmingCallback(0.5, keep_log=log), tmp_path)
    with pytest.raises(TypeError, match="expected `log` to be a bool"):
        TrimmingCallback(log=log)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected `log` to be a bool and `keep_log` to be a batchtrim\.KeepLog"):
        TrimmingCallback(keep_log=SAMPLES)  # type: ignore[arg-type]


@pytest.mark.parametrize(("length", "keeps"), [("stretch", [0.7333333, 0.4666667]), ("saved", [0.2, 0.2]), (None, [])])
def test_resuming_with_more_epochs(length: str | None, keeps: list[float], tmp_path: Path) -> None:
    """transformers#7198 and its like: more epochs than the checkpoint's training had."""
    first = trainer(tmp_path, TrimmingCallback(), max_epochs=2)
    first.fit(Module(), loader())
    first.save_checkpoint(tmp_path / "two.ckpt")
    module = Module()
    fit = trainer(tmp_path, TrimmingCallback(resume_length=length), max_epochs=4)
    if length is None:
        with pytest.raises(ChooseLength, match=r"TrimmingCallback\(resume_length='stretch'\)"):
            fit.fit(module, loader(), ckpt_path=tmp_path / "two.ckpt")
    else:
        fit.fit(module, loader(), ckpt_path=tmp_path / "two.ckpt")
        assert [module.keeps[0], module.keeps[4]] == pytest.approx([0.4666667, 0.2] if length == "stretch" else keeps)


def test_resuming_with_more_epochs_at_a_constant_keep(tmp_path: Path) -> None:
    first = trainer(tmp_path, TrimmingCallback(0.5), max_epochs=2)
    first.fit(Module(), loader())
    first.save_checkpoint(tmp_path / "two.ckpt")
    module = Module()
    trainer(tmp_path, TrimmingCallback(0.5), max_epochs=3).fit(module, loader(), ckpt_path=tmp_path / "two.ckpt")
    assert module.keeps == [0.5] * 4


def test_accumulation_that_changes_from_epoch_to_epoch(tmp_path: Path) -> None:
    """Lightning's estimate of the steps is that of the first epoch's: the schedule ended half way."""
    changing = GradientAccumulationScheduler({1: 4, 2: 2})
    fit = trainer(tmp_path, TrimmingCallback(clock="step"), max_epochs=3)
    fit.callbacks.append(changing)  # type: ignore[attr-defined]
    module = Module()
    fit.fit(module, loader())
    assert fit.global_step == 4 + 1 + 2
    assert module.trim.total == 7
    assert (module.keeps[0], module.keeps[-1]) == (1.0, 0.2)


def test_two_callbacks_with_a_trimmer_each(tmp_path: Path) -> None:
    class TwoHeads(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            losses = F.cross_entropy(self.model(batch[0]), batch[1], reduction="none")
            return self.trim(losses) + self.other(losses)

    def fit(resume: Path | None) -> Any:
        found = trainer(tmp_path, TrimmingCallback(0.5), max_epochs=1 if resume is None else 2)
        found.callbacks.append(TrimmingCallback(0.25, attribute="other"))
        found.fit(TwoHeads(), loader(), ckpt_path=resume)
        return found

    first = fit(None)
    assert {"trim/keep": 0.5, "other/keep": 0.25}.items() <= {
        k: float(v) for k, v in first.callback_metrics.items()
    }.items()
    first.save_checkpoint(tmp_path / "one.ckpt")
    assert fit(tmp_path / "one.ckpt").lightning_module.other.steps == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resume_length": "strech"}, "expected `resume_length` to be one of 'stretch', 'saved', got 'strech'"),
        ({"attribute": "my trim"}, "expected `attribute` to be the name of an attribute, got 'my trim'"),
        (
            {"total": 3},
            "expected options of the trimmer besides `keep` and `total`, got 'total'.*knows the length",
        ),
    ],
)
def test_arguments_are_checked_when_it_is_made(options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        TrimmingCallback(**options)


def test_a_number_of_epochs_by_position() -> None:
    with pytest.raises(TypeError, match=r"after `keep` of TrimmingCallback by name, .*: 4\. The names are clock, log,"):
        TrimmingCallback(0.5, 4)  # type: ignore[misc]


def test_the_attribute_is_not_taken_from_the_module(tmp_path: Path) -> None:
    for name in ("model", "forward"):
        with pytest.raises(ValueError, match=f"expected `attribute` to be free on Module, got '{name}'"):
            trained(Module(), TrimmingCallback(0.5, attribute=name), tmp_path)


class WithItsOwn(Module):
    def __init__(self, keep: Any, total: int | None = None) -> None:
        super().__init__()
        self.trim = batchtrim.Trimmer(keep, total=total)


def test_a_trimmer_of_the_modules_own(tmp_path: Path) -> None:
    """The callback put its own in its place, and the module's schedule was dropped."""
    for own in (WithItsOwn(0.3), WithItsOwn(batchtrim.linear(1.0, 0.5), total=2)):
        with pytest.raises(ValueError, match="a Trimmer of the module's own, which the callback's would replace"):
            trainer(tmp_path, TrimmingCallback(0.5), max_epochs=1).fit(own, loader())
    keeping_all = WithItsOwn(1.0)  # a stand-in for training without the callback
    for _ in range(2):  # the second fit finds the first callback's
        trainer(tmp_path, TrimmingCallback(0.5), max_epochs=1).fit(keeping_all, loader())
        assert keeping_all.trim.keep == 0.5
        keeping_all = copy.deepcopy(keeping_all)


def test_intercepted_losses_that_are_nan(tmp_path: Path) -> None:
    """It was said that no loss function had been seen."""

    class Vector(Plain):
        def training_step(self, batch: Any, index: int) -> Any:
            x, y = batch
            return F.cross_entropy(self.model(x), y, reduction="none")

    with pytest.raises(NotFound, match=r"it is no single number, but has shape \("):
        trainer(tmp_path, TrimmingCallback(0.5, intercept=True), max_epochs=1).fit(Vector(), loader())
