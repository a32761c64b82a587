"""Hugging Face's Trainer over a whole training: resuming, keep logs, engines, arguments that it refuses."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

from hf_cases import arguments, data, new_model
from transformers import BertForQuestionAnswering, Trainer

import batchtrim
from batchtrim.errors import ChooseLength
from batchtrim.integrations.transformers import TrimmedTrainer
from tiers import few

pytestmark = pytest.mark.usefixtures("settled")


@pytest.mark.parametrize("length", [None, "stretch", "saved"])
def test_resuming_with_more_epochs(length: str | None, tmp_path: Path) -> None:
    """transformers#7198, flair#1824, composer#56."""

    def run(epochs: int, keep: Any, resume: bool, **extra: Any) -> TrimmedTrainer:
        args = arguments(str(tmp_path), max_steps=-1, num_train_epochs=epochs, save_strategy="epoch")
        trainer = TrimmedTrainer(
            model=new_model("sequence"), args=args, train_dataset=data("sequence", 10), keep=keep, **extra
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    run(2, batchtrim.linear(1.0, 0.2), False)
    if length is None:
        with pytest.raises(ChooseLength, match=r"TrimmedTrainer\(resume_length='stretch'\) stretches"):
            run(4, batchtrim.linear(1.0, 0.2), True)
        return
    trainer = run(4, batchtrim.linear(1.0, 0.2), True, resume_length=length)
    keeps = [line["trim/keep"] for line in trainer.state.log_history if "trim/keep" in line][4:]
    expected = [1 - 0.8 * 2 / 3] * 2 + [0.2] * 2 if length == "stretch" else [0.2] * 4
    assert keeps == pytest.approx(expected)


def test_resuming_with_more_epochs_at_a_constant_keep(tmp_path: Path) -> None:
    for epochs in (1, 3):
        args = arguments(str(tmp_path), max_steps=-1, num_train_epochs=epochs, save_strategy="epoch")
        trainer = TrimmedTrainer(
            model=new_model("sequence"), args=args, train_dataset=data("sequence", 10), keep=0.6
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=epochs > 1 or None)
    assert trainer.state.global_step == 6


def test_no_epochs_are_no_steps(tmp_path: Path) -> None:
    """It was said that the data set had no length."""
    args = arguments(str(tmp_path), max_steps=-1, num_train_epochs=0)
    trainer = TrimmedTrainer(model=new_model("sequence"), args=args, train_dataset=data("sequence", 10))
    assert trainer.train().global_step == 0


def test_compute_loss_func_names_per_sample_loss(tmp_path: Path) -> None:
    """It came as "got multiple values for keyword argument"."""
    with pytest.raises(ValueError, match=r"expected `per_sample_loss` in place of `compute_loss_func`, got .*function"):
        TrimmedTrainer(
            model=new_model("sequence"), args=arguments(str(tmp_path)), compute_loss_func=lambda *_: torch.ones(())
        )


def test_a_custom_compute_loss_is_reported(tmp_path: Path) -> None:
    class Mine(TrimmedTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            outputs = model(**{name: value for name, value in inputs.items() if name != "batchtrim_ids"})
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    args = arguments(str(tmp_path))
    with pytest.raises(TypeError, match="expected Mine to leave `compute_loss` alone, got one that trims nothing"):
        Mine(model=new_model("sequence"), args=args, train_dataset=data("sequence", 5)).train()


class Halves(Trainer):
    """A trainer with a loss of its own, as TRL's are."""

    def compute_loss(self, *args: Any, **named: Any) -> Any:
        return super().compute_loss(*args, **named) / 2


class TrimmedHalves(TrimmedTrainer, Halves):
    pass


class HalvesTrimmed(Halves, TrimmedTrainer):
    pass


def test_another_trainer_with_a_loss_of_its_own(tmp_path: Path) -> None:
    """TRL's SFTTrainer(loss_type="dft"): its loss was silently the model's own."""
    given = {"model": new_model("sequence"), "args": arguments(str(tmp_path)), "train_dataset": data("sequence", 5)}
    with pytest.raises(TypeError, match="expected `per_sample_loss` beside Halves, which computes its loss itself"):
        TrimmedHalves(**given)
    TrimmedHalves(**given, per_sample_loss=lambda outputs, labels: outputs.logits.mean(1))
    HalvesTrimmed(**given).train()


def test_a_compute_loss_that_trims_by_itself(tmp_path: Path) -> None:
    """As in Lightning: it was said to trim nothing."""

    class Mine(TrimmedTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            outputs = model(**inputs)
            return self.trim(F.cross_entropy(outputs.logits, inputs["labels"], reduction="none"))

    with pytest.raises(TypeError, match=r"alone, got one that calls self\.trim, whose loss is not divided over"):
        Mine(model=new_model("sequence"), args=arguments(str(tmp_path)), train_dataset=data("sequence", 5)).train()


def test_labels_of_another_name(tmp_path: Path) -> None:
    """A function of one's own got None for them: `label_names`, or those of an answer in a text."""

    def of_answers(outputs: Any, labels: tuple[Tensor, Tensor]) -> Tensor:
        pairs = zip((outputs.start_logits, outputs.end_logits), labels, strict=True)
        start, end = (F.cross_entropy(logits, label, reduction="none") for logits, label in pairs)
        return (start + end) / 2

    rows = data("sequence", 8)
    for number, row in enumerate(rows):
        label = row.pop("labels")
        row.update(start_positions=label, end_positions=label + number % 3)
    config = new_model("sequence").config
    config.num_labels = 2
    model = BertForQuestionAnswering(config)
    found = []
    for own in ({}, {"per_sample_loss": of_answers}, {"per_sample_loss": of_answers, "engine": "exact"}):
        args = arguments(str(tmp_path), learning_rate=0.1, optim="sgd", max_steps=2)
        trainer = TrimmedTrainer(model=copy.deepcopy(model), args=args, train_dataset=rows, keep=0.4, **own)
        trainer.train()
        found.append(trainer.model.state_dict())
    for each in found[1:]:
        torch.testing.assert_close(each, found[0])


def test_a_note_says_what_a_function_gets(tmp_path: Path) -> None:
    args = arguments(str(tmp_path))
    with pytest.raises(TypeError, match="must be Tensor, not SequenceClassifierOutput") as caught:
        TrimmedTrainer(
            model=new_model("sequence"), args=args, train_dataset=data("sequence", 5),
            per_sample_loss=torch.nn.CrossEntropyLoss(reduction="none"),
        ).train()  # fmt: skip
    assert "per_sample_loss(outputs, labels) with what the model returns" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "options", few([{}, {"over": "window"}, {"engine": "two_pass"}, {"engine": "exact"}], [{}, {"over": "window"}])
)
def test_a_keep_log_gets_ids_with_every_batch(options: dict[str, Any], tmp_path: Path) -> None:
    """Ids travel with the batch: past the filter of columns, the collator, a sampler by length, accumulation."""
    rows = [{**row, "text": "not for the model"} for row in data("sequence", 24)]
    log = batchtrim.KeepLog(24)
    args = arguments(
        str(tmp_path), max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    trainer = TrimmedTrainer(
        model=new_model("sequence"), args=args, train_dataset=rows, keep=0.5, keep_log=log, **options
    )  # fmt: skip
    trainer.train()
    table = log.table()
    assert table["seen"].tolist() == [2] * 24
    assert table["kept"].sum() == 24
    assert len(log.history) == 2
    with torch.no_grad():  # nothing was learned: each row's loss is its own
        for number, row in enumerate(rows):
            one = {name: row[name][None] for name in ("input_ids", "attention_mask", "labels")}
            assert table["last"][number] == pytest.approx(trainer.model.eval()(**one).loss.item(), rel=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_a_keep_log_survives_a_checkpoint(strategy: str, tmp_path: Path) -> None:
    """By steps, the checkpoint is saved after the epoch's last step, before the log ends its epoch."""

    def run(epochs: int, log: batchtrim.KeepLog, resume: bool) -> None:
        args = arguments(str(tmp_path), max_steps=-1, num_train_epochs=epochs, save_strategy=strategy, save_steps=1)
        TrimmedTrainer(
            model=new_model("sequence"), args=args, train_dataset=data("sequence", 10), keep=0.6, keep_log=log
        ).train(resume_from_checkpoint=resume or None)

    run(1, batchtrim.KeepLog(10), False)
    log = batchtrim.KeepLog(10)
    run(3, log, True)
    assert log.table()["seen"].tolist() == [3] * 10
    assert len(log.history) == 3


def test_a_keep_log_of_a_stream_is_refused(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            yield from data("sequence", 5)

    trainer = TrimmedTrainer(
        model=new_model("sequence"), args=arguments(str(tmp_path)), train_dataset=Stream(), keep=0.5,
        keep_log=batchtrim.KeepLog(5),
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected `train_dataset` to have rows by number with a `keep_log`"):
        trainer.train()


@pytest.mark.filterwarnings("ignore::batchtrim.errors.EngineFallback")
@pytest.mark.parametrize("engine", few(["exact", "two_pass", "shared", "auto"], ["exact", "two_pass"]))
@pytest.mark.parametrize("task", ["sequence", "causal"])
def test_an_engine_trains_as_the_plain_graph(task: str, engine: str, tmp_path: Path) -> None:
    trained = []
    for each in (None, engine):
        torch.manual_seed(0)
        args = arguments(
            str(tmp_path), learning_rate=0.1, max_steps=3, optim="sgd", gradient_accumulation_steps=2
        )  # fmt: skip
        model = new_model(task)
        TrimmedTrainer(model=model, args=args, train_dataset=data(task, 30), keep=0.4, engine=each).train()
        trained.append(model.state_dict())
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-6)


class Twice(TrimmedTrainer):
    """Two forwards of a micro-batch, as R-Drop takes their mean."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **extra: Any) -> Any:
        return (super().compute_loss(model, dict(inputs)) + super().compute_loss(model, dict(inputs))) / 2


def weights(kind: type[TrimmedTrainer], rows: list[Any], folder: Path, **extra: Any) -> Tensor:
    """The model's parameters after two steps of up to three micro-batches of four rows."""
    args = arguments(
        str(folder), max_steps=2, gradient_accumulation_steps=3, per_device_train_batch_size=4, learning_rate=0.5,
        optim="sgd", lr_scheduler_type="constant", train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = kind(model=new_model("causal"), args=args, train_dataset=rows, **extra)
    trainer.train()
    return torch.cat([each.detach().flatten() for each in trainer.model.parameters()])


def by_hand(rows: list[Any], of_samples: bool = False) -> Tensor:
    """The same with everything kept: the mean over all tokens of a step, or over its samples' own means."""
    model = new_model("causal").train()
    for window in (rows[:12], rows[12:]):
        batch = {name: torch.stack([row[name] for row in window]) for name in window[0]}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), labels)
        if of_samples:
            loss = torch.stack([F.cross_entropy(*each) for each in zip(logits, labels, strict=True)]).mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for each in model.parameters():
                each -= 0.5 * each.grad  # type: ignore[operator]
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def next_tokens(outputs: Any, labels: Tensor) -> batchtrim.Losses:
    return batchtrim.token_losses(outputs.logits, labels, shift=True)


@pytest.mark.parametrize("first", ["as they are", "ignored", "all the same"])
@pytest.mark.parametrize("own", [None, next_tokens])
def test_micro_batches_count_by_their_tokens(own: Any, first: str, tmp_path: Path) -> None:
    """A first batch that does not show that labels are shifted decided for all; one's own losses counted samples."""
    rows = [
        {**row, "labels": torch.where(row["attention_mask"] == 1, row["labels"], -100)} for row in data("causal", 20)
    ]
    rows[17] = {**rows[17], "labels": torch.full((9,), -100)}
    for row in rows[:4]:
        if first == "ignored":
            row["labels"] = torch.full((9,), -100)
        elif first == "all the same":
            row.update({name: torch.ones(9, dtype=torch.int64) for name in row})
    found = weights(TrimmedTrainer, rows, tmp_path, keep=1.0, per_sample_loss=own)
    torch.testing.assert_close(found, by_hand(rows), rtol=1e-4, atol=1e-6)


def means_of_samples(outputs: Any, labels: Tensor) -> Tensor:
    losses = next_tokens(outputs, labels)
    return (losses.values * losses.mask).sum(1) / losses.mask.sum(1)  # type: ignore[union-attr]


def test_micro_batches_of_samples_means_count_by_their_samples(tmp_path: Path) -> None:
    rows = data("causal", 20)
    for place, row in enumerate(rows):
        row["labels"] = torch.where(torch.arange(9) < 3 + place // 4, row["labels"], -100)
    found = weights(TrimmedTrainer, rows, tmp_path, keep=1.0, per_sample_loss=means_of_samples)
    torch.testing.assert_close(found, by_hand(rows, of_samples=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("over", ["micro", "window"])
def test_a_loss_computed_twice_for_a_micro_batch(over: str, tmp_path: Path) -> None:
    """The second loss was given the next micro-batch's weight, and its part of the window's choice."""
    rows = data("causal", 20)
    expected = weights(TrimmedTrainer, rows, tmp_path, keep=0.5, over=over)
    torch.testing.assert_close(weights(Twice, rows, tmp_path, keep=0.5, over=over), expected, rtol=1e-4, atol=1e-6)


class OwnStep(TrimmedTrainer):
    losses_a_step = 1

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        losses = [self.compute_loss(model.train(), dict(inputs)) for _ in range(self.losses_a_step)]
        loss = torch.stack(losses).mean() / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class OwnStepTwice(OwnStep):
    losses_a_step = 2


def test_a_custom_training_step(tmp_path: Path) -> None:
    rows = data("causal", 24)
    expected = weights(TrimmedTrainer, rows, tmp_path, keep=0.5)
    torch.testing.assert_close(weights(OwnStep, rows, tmp_path, keep=0.5), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(TypeError, match=r"OwnStepTwice\.training_step to compute one loss for each micro-batch"):
        weights(OwnStepTwice, rows, tmp_path, keep=0.5)
    with pytest.raises(TypeError, match=r"to call super\(\)\.training_step\(\.\.\.\) with over='window'"):
        weights(OwnStep, rows, tmp_path, keep=0.5, over="window")


def test_a_loss_computed_after_training_has_no_share(tmp_path: Path) -> None:
    rows = data("sequence", 10)
    args = arguments(str(tmp_path), max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=5)
    trainer = TrimmedTrainer(model=new_model("sequence"), args=args, train_dataset=rows[:7], keep=1.0)
    trainer.train()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    found = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(found, trainer.model(**batch).loss)


def test_a_function_that_averages(tmp_path: Path) -> None:
    """It came as an IndexError of torch's."""
    with pytest.raises(
        batchtrim.errors.PassUnreducedLosses, match=r"`per_sample_loss\(outputs, labels\)` to have shape"
    ):
        weights(TrimmedTrainer, data("causal", 4), tmp_path, per_sample_loss=lambda outputs, _: outputs.logits.mean())


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(data("sequence", 10))


def test_epochs_of_a_stream(tmp_path: Path) -> None:
    """The advice was to pass ``total`` and to call step(), which a trainer does by itself."""
    trainer = TrimmedTrainer(
        model=new_model("sequence"), args=arguments(str(tmp_path)), train_dataset=Stream(), clock="epoch"
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"expected `total`, the length of training, to be known .* \(clock='step'\)"):
        trainer.train()
