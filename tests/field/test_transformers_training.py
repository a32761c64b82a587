"""Hugging Face's Trainer over a whole training: resuming, keep logs, engines, arguments it does not take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

from hf_cases import arguments, data, new_model

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


def test_compute_loss_func_names_per_sample_loss(tmp_path: Path) -> None:
    """It came as "got multiple values for keyword argument"."""
    with pytest.raises(ValueError, match=r"expected `per_sample_loss` in place of `compute_loss_func`, got .*function"):
        TrimmedTrainer(
            model=new_model("sequence"), args=arguments(str(tmp_path)), compute_loss_func=lambda *_: torch.ones(())
        )


def test_a_compute_loss_of_ones_own_is_told(tmp_path: Path) -> None:
    class Mine(TrimmedTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            outputs = model(**{name: value for name, value in inputs.items() if name != "batchtrim_ids"})
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    args = arguments(str(tmp_path))
    with pytest.raises(TypeError, match="expected Mine to leave `compute_loss` alone, got one that trims nothing"):
        Mine(model=new_model("sequence"), args=args, train_dataset=data("sequence", 5)).train()


@pytest.mark.parametrize("options", [{}, {"over": "window"}, {"engine": "two_pass"}, {"engine": "exact"}])
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


def test_a_keep_log_survives_a_checkpoint(tmp_path: Path) -> None:
    def run(epochs: int, log: batchtrim.KeepLog, resume: bool) -> None:
        args = arguments(str(tmp_path), max_steps=-1, num_train_epochs=epochs, save_strategy="epoch")
        TrimmedTrainer(
            model=new_model("sequence"), args=args, train_dataset=data("sequence", 10), keep=0.6, keep_log=log
        ).train(resume_from_checkpoint=resume or None)

    run(1, batchtrim.KeepLog(10), False)
    log = batchtrim.KeepLog(10)
    run(3, log, True)
    assert log.table()["seen"].tolist() == [3] * 10


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
