"""Carry row numbers along with a Trainer's batches, past its column filter and collator, but not to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Dataset

__all__ = ["IDS", "numbered_rows"]

IDS = "batchtrim_ids"


class _Row(dict[str, Any]):
    """A row of the data set that knows its number. It adds no key: a sampler that groups by length reads rows too."""

    number: int


class _Numbered(Dataset[_Row]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> _Row:
        row = _Row(self.data[number])
        row.number = int(number)
        return row


class _Collator:
    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[_Row]) -> dict[str, Any]:
        batch = dict(self.collate([dict(row) for row in rows]))
        batch[IDS] = torch.tensor([row.number for row in rows], device="cpu")
        return batch


@contextmanager
def numbered_rows(trainer: Any) -> Iterator[None]:
    """Make the Trainer build its training loader from numbered rows inside the block.

    Raises:
        ValueError: the data set has no length, or its rows are not mappings.
    """
    data, collate, filtered = trainer.train_dataset, trainer.data_collator, trainer.args.remove_unused_columns
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise ValueError(
            f"expected `train_dataset` to have rows by number with a `keep_log`, got {type(data).__name__}. "
            "A stream has no row numbers: leave the log out."
        )
    own = trainer._get_collator_with_removed_columns(collate, description="training") if filtered else collate
    trainer.train_dataset, trainer.data_collator = _Numbered(data), _Collator(own)
    trainer.args.remove_unused_columns = False
    try:
        yield
    finally:
        trainer.train_dataset, trainer.data_collator = data, collate
        trainer.args.remove_unused_columns = filtered
