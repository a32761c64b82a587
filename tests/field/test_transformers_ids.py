"""Row numbers reach the keep log however a Trainer makes its batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

from hf_cases import arguments, data, new_model
from transformers import default_data_collator

import batchtrim
from batchtrim.integrations.transformers import TrimmedTrainer

pytestmark = pytest.mark.usefixtures("settled")
ROWS = 23


def rows() -> list[dict[str, Any]]:
    return [{**row, "text": "not for the model", "number": n} for n, row in enumerate(data("sequence", ROWS))]


def hub_rows(columns: bool) -> Any:
    datasets = pytest.importorskip("datasets")
    plain = [{name: v.tolist() if torch.is_tensor(v) else v for name, v in row.items()} for row in rows()]
    found = datasets.Dataset.from_list(plain)
    if not columns:
        found = found.remove_columns(["text", "number"])
    return found.shuffle(seed=0)  # its rows are numbered as they now lie


def logged(dataset: Any, folder: Path, **options: Any) -> batchtrim.KeepLog:
    log = batchtrim.KeepLog(ROWS)
    args = arguments(str(folder), max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4, **options)
    model = new_model("sequence")
    TrimmedTrainer(
        model=model, args=args, train_dataset=dataset, keep=0.5, keep_log=log, data_collator=default_data_collator
    ).train()
    return log


def check(log: batchtrim.KeepLog, dataset: Any) -> None:
    """Each row's last loss is that of the row with this number: nothing was learned."""
    table, model = log.table(), new_model("sequence").eval()
    assert table["seen"].tolist() == [2] * ROWS
    for number in range(ROWS):
        row = dataset[number]
        one = {name: torch.as_tensor(row[name])[None] for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            assert table["last"][number] == pytest.approx(model(**one).loss.item(), rel=1e-4)


@pytest.mark.parametrize("filtered", [True, False])
def test_a_dataset_of_datasets(filtered: bool, tmp_path: Path) -> None:
    """With `remove_unused_columns`, and without columns to remove."""
    dataset = hub_rows(columns=filtered)
    check(logged(dataset, tmp_path, remove_unused_columns=filtered), dataset)


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_grouped_by_length(kind: str, tmp_path: Path) -> None:
    """The sampler reads the lengths of the rows."""
    dataset = rows() if kind == "list" else hub_rows(columns=True)
    check(logged(dataset, tmp_path, train_sampling_strategy="group_by_length"), dataset)


def test_batches_dispatched_by_accelerate(tmp_path: Path) -> None:
    """One process reads and hands the batches out."""
    dataset = rows()
    config = {"dispatch_batches": True, "split_batches": False}
    check(logged(dataset, tmp_path, accelerator_config=config), dataset)


class OutOfMemory(TrimmedTrainer):
    """Fails in its third step, once."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.done = getattr(self, "done", 0) + 1
        if self.done == 3:
            raise RuntimeError("CUDA out of memory.")
        return loss


def test_batches_of_an_aborted_training_are_not_counted(tmp_path: Path) -> None:
    """`auto_find_batch_size` trains anew with a smaller batch."""
    log = batchtrim.KeepLog(ROWS)
    args = arguments(str(tmp_path), max_steps=-1, num_train_epochs=2, auto_find_batch_size=True)
    OutOfMemory(model=new_model("sequence"), args=args, train_dataset=rows(), keep=0.5, keep_log=log,
                data_collator=default_data_collator).train()  # fmt: skip
    assert log.table()["seen"].tolist() == [2] * ROWS
    assert len(log.history) == 2


def test_each_new_model_begins_the_log_anew(tmp_path: Path) -> None:
    """A search makes one for each trial; without `model_init`, a second training goes on with the first model."""
    args = arguments(str(tmp_path), max_steps=-1, num_train_epochs=1, per_device_train_batch_size=4)
    seen = {}
    for name in ("model", "model_init"):
        log = batchtrim.KeepLog(ROWS)
        made = new_model("sequence") if name == "model" else lambda: new_model("sequence")
        trainer = TrimmedTrainer(**{name: made}, args=args, train_dataset=rows(), keep=0.5, keep_log=log,
                                 data_collator=default_data_collator)  # fmt: skip
        trainer.train()
        trainer.train()
        seen[name] = set(log.table()["seen"].tolist())
    assert seen == {"model": {2}, "model_init": {1}}
