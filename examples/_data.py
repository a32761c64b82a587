"""Shared by the examples: small real data (handwritten digits, and questions to classify if BATCHTRIM_DATA has them),
and their arguments on the command line."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

VOCABULARY = 2000


def digits(train: bool = True, rows: int | None = None) -> TensorDataset:
    """Return 1,797 images of 8 x 8 pixels as float vectors of 64, and their class; every fifth is for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 16.0
    y = torch.tensor(found.target, dtype=torch.int64)
    chosen = (torch.arange(len(y)) % 5 == 0) != train
    return TensorDataset(x[chosen][:rows], y[chosen][:rows])


def questions(train: bool = True, rows: int | None = None, length: int = 16) -> list[dict[str, Tensor]]:
    """Return TREC's questions and their kind (6), or, without TREC, digits (10) as sequences of 16 tokens.

    They come as from a Hugging Face data set: ``input_ids``, ``attention_mask``, ``labels``.
    """
    root = os.environ.get("BATCHTRIM_DATA")
    folder = Path(root or "") / "trec"
    if root and folder.is_dir():
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(next(folder.glob("train-*" if train else "test-*"))).slice(0, rows)
        words = [text.lower().split()[:length] for text in table["text"].to_pylist()]
        found = [[2 + zlib.crc32(word.encode()) % (VOCABULARY - 2) for word in line] for line in words]
        labels = table["coarse_label"].to_pylist()
    else:
        if root and train:
            print(f"BATCHTRIM_DATA={root} has no trec: digits in place of questions", file=sys.stderr)
        x, y = digits(train, rows).tensors
        found = (2 + (x.view(-1, 16, 4).mean(2) * 100).long()).tolist()
        labels = y.tolist()
    return [
        {
            "input_ids": torch.tensor(ids + [0] * (length - len(ids))),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * (length - len(ids))),
            "labels": torch.tensor(label),
        }
        for ids, label in zip(found, labels, strict=True)
    ]


def command_line(main: Callable[..., Any]) -> None:
    """Call ``main`` with the options typed: ``--NAME VALUE`` for each of its parameters that has a default."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules["__main__"]))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, parameter in inspect.signature(main).parameters.items():
        default = parameter.default
        if default is parameter.empty:
            parser.add_argument(name, type=_folder, metavar=name.upper())
        elif isinstance(default, (int, float, str)):
            parser.add_argument(
                f"--{name}", type=_count if isinstance(default, int) else type(default), default=default
            )
    main(**vars(parser.parse_args()))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}.")
    return int(text)


def _folder(text: str) -> Path:
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r}.")
    return Path(text)
