"""Named entities in tweets and comments (WNUT-17), chosen token by token: a task for the lab.

    batchtrim compare --task studies/entities.py:train records/2026-11-25-wnut-17/config.toml --out runs/wnut-17

A word is the sum of what is learnt of it, of its ends and of its shape; a bidirectional GRU reads the sentence; the
loss is the cross-entropy of each token, and tokens are selected (``unit="element"``). The error is 1 - F1 of whole
entities on the test set: an entity counts if its words and its kind are right. ``BATCHTRIM_DATA`` names the
folder that holds wnut_17/{train,test}-*.parquet. ENTITIES_SPLIT=validation tests on another split.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

import pyarrow.parquet
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchtrim import Losses, Trimmer
from batchtrim.lab import Run

WIDTH, BATCH, RATE = 96, 32, 4e-3
HASHED = 4096  # rows of the table of word ends and shapes
IGNORED = -100


@cache
def sentences(split: str) -> tuple[list[list[str]], list[list[int]]]:
    """Return the words and tags of a split."""
    (path,) = Path(os.environ["BATCHTRIM_DATA"], "wnut_17").glob(f"{split}-*.parquet")
    table = pyarrow.parquet.read_table(path)
    return table["tokens"].to_pylist(), table["ner_tags"].to_pylist()


@cache
def tag_names() -> tuple[str, ...]:
    """Return the names of the tags: O, and B- and I- of every kind."""
    (path,) = Path(os.environ["BATCHTRIM_DATA"], "wnut_17").glob("train-*.parquet")
    about = json.loads(pyarrow.parquet.read_schema(path).metadata[b"huggingface"])
    return tuple(about["info"]["features"]["ner_tags"]["feature"]["names"])


@cache
def vocabulary() -> dict[str, int]:
    """Return the words that the training sentences use at least twice; 0 is padding, 1 any other."""
    counts = Counter(word.lower() for words in sentences("train")[0] for word in words)
    return {word: 2 + row for row, word in enumerate(sorted(word for word, n in counts.items() if n > 1))}


def features(word: str) -> list[int]:
    """Return a word's row in the table of words, and those of its start, ends and shape in the hashed table."""
    shape = re.sub(r"(.)\1+", r"\1", re.sub(r"\d", "0", re.sub(r"[a-z]", "a", re.sub(r"[A-Z]", "A", word))))
    parts = (f"s{word[:3].lower()}", f"e{word[-2:].lower()}", f"f{word[-3:].lower()}", f"w{shape}")
    return [vocabulary().get(word.lower(), 1), *(1 + zlib.crc32(part.encode()) % (HASHED - 1) for part in parts)]


@cache
def encoded(split: str) -> tuple[Tensor, Tensor]:
    """Return features (N, T, 5) and tags (N, T) of a split; ``IGNORED`` after the end of a sentence."""
    words, tags = sentences(split)
    longest = max(map(len, words))
    x, y = torch.zeros(len(words), longest, 5, dtype=torch.int64), torch.full((len(words), longest), IGNORED)
    for row, (line, wanted) in enumerate(zip(words, tags, strict=True)):
        x[row, : len(line)] = torch.tensor([features(word) for word in line])
        y[row, : len(line)] = torch.tensor(wanted)
    return x, y


class Tagger(nn.Module):
    """(B, T, 5) rows of the two tables to (B, T, tags)."""

    def __init__(self, words: int, tags: int) -> None:
        super().__init__()
        self.words, self.hashed = nn.Embedding(words, WIDTH, padding_idx=0), nn.Embedding(HASHED, WIDTH, padding_idx=0)
        self.drop = nn.Dropout(0.4)
        self.read = nn.GRU(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, tags)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.words(x[..., 0]) + self.hashed(x[..., 1:]).sum(-2))
        return self.head(self.drop(self.read(h)[0]))


def entities(tags: list[int]) -> set[tuple[str, int, int]]:
    """Return the kind, first word and end of each entity in a sentence."""
    found, start, kind = set(), 0, ""
    for place, name in enumerate([*(tag_names()[tag] for tag in tags), "O"]):
        if kind and name != f"I-{kind}":
            found.add((kind, start, place))
            kind = ""
        if name != "O" and not kind:
            start, kind = place, name[2:]
    return found


def f1(predicted: list[list[int]], wanted: list[list[int]]) -> float:
    """Return ``2 * right / (found + there)`` over all entities; 0 if there are none."""
    right = found = there = 0
    for guess, truth in zip(predicted, wanted, strict=True):
        ours, theirs = entities(guess), entities(truth)
        right, found, there = right + len(ours & theirs), found + len(ours), there + len(theirs)
    return 2 * right / max(1, found + there)


@torch.no_grad()
def tested(model: nn.Module, split: str) -> dict[str, float]:
    """Return 1 - F1 of entities, and the error of tokens."""
    (x, y), (_, wanted) = encoded(split), sentences(split)
    model.eval()
    guess = torch.cat([model(part).argmax(-1) for part in x.split(256)])
    model.train()
    there = y != IGNORED
    predicted = [row[: len(tags)].tolist() for row, tags in zip(guess, wanted, strict=True)]
    return {"error": 1.0 - f1(predicted, wanted), "token_error": (guess != y)[there].float().mean().item()}


def train(run: Run) -> dict[str, float]:
    x, y = encoded("train")
    lengths = (y != IGNORED).sum(1)
    model = Tagger(2 + len(vocabulary()), len(tag_names()))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    steps = run.epochs * -(-len(x) // BATCH)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    trim = Trimmer(run.keep, total=run.epochs, unit="element", **run.trim_options)
    split = os.environ.get("ENTITIES_SPLIT", "test")
    for epoch in range(run.epochs):
        right = torch.zeros((), dtype=torch.int64)
        for rows in torch.randperm(len(x)).split(BATCH):
            longest = int(lengths[rows].max())
            labels = y[rows, :longest]
            logits = model(x[rows, :longest])
            right += (logits.detach().argmax(-1) == labels).sum()
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
            loss = trim(Losses(losses, labels != IGNORED))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
        found = tested(model, split)
        run.log(epoch=epoch, **found)
        trim.step(accuracy=int(right) / int(lengths.sum()))
    return found
