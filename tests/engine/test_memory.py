"""Parts of a batch that share memory: a forward that writes into one is computed right, or refused for that reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchtrim
from batchtrim.engine.rows import copied, restore_values
from batchtrim.errors import EngineRefused
from batchtrim.testing import check_engine

Batch = tuple[Any, ...]


class Reads(nn.Module):
    """Reads all that it gets, behind a head that is zero, so that no loss shows it."""

    held: Tensor

    def __init__(self, write: Callable[..., None]) -> None:
        super().__init__()
        self.layer, self.head, self.write = nn.Linear(6, 5), nn.Linear(6, 5), write
        self.register_buffer("held", torch.ones(12, 6))
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        first = x * 1
        self.write(self, x, *others)
        others_sum = sum(_of_rows(torch.as_tensor(each), len(x)) for each in others)
        return self.layer(first) + self.head(x + others_sum + self.held[0])


def _of_rows(part: Tensor, rows: int) -> Tensor:
    return part[:, :3].sum(1, keepdim=True) if part.shape[:1] == (rows,) and part.ndim == 2 else part.flatten()[:6]


def _expanded(_: Reads, x: Tensor) -> Batch:
    return x, torch.ones(1, 6).expand(12, 6)


def _unfolded(_: Reads, x: Tensor) -> Batch:
    return x, torch.arange(17.0).unfold(0, 6, 1)


def _with_array(_: Reads, x: Tensor) -> Batch:
    counts = np.ones((3, 6), dtype=np.float32)
    return x, torch.from_numpy(counts), counts


def _first(_: Reads, x: Tensor, *others: Any) -> None:
    x.mul_(2)


def _second(_: Reads, x: Tensor, *others: Any) -> None:
    others[0][0] *= 2


def _held(model: Reads, x: Tensor, *others: Any) -> None:
    model.held *= 2


MAKE: dict[str, tuple[Callable[[Reads, Tensor], Batch], Callable[..., None], str]] = {
    "a part": (lambda _, x: (x, x[:, :3]), _first, r"`x\[0\]`, which shares memory with `x\[1\]`"),
    "the whole of a part": (lambda _, x: (x[:, :6], x), _second, r"`x\[0\]`, which shares memory with `x\[1\]`"),
    "transposed": (lambda _, x: (x, x.T), _first, r"`x\[0\]`, which shares memory with `x\[1\]`"),
    "another type": (lambda _, x: (x, x.view(torch.int32)), _first, r"`x\[0\]`, which shares memory"),
    "expanded": (_expanded, _second, r"`x\[1\]`, whose elements share memory"),
    "unfolded": (_unfolded, _second, r"`x\[1\]`, whose elements share memory"),
    "an array": (_with_array, _second, r"`x\[1\]`, which shares memory with `x\[2\]`"),
    "a buffer": (lambda m, x: (x, m.held[:, :3]), _held, r"`x\[1\]`, which shares memory with a tensor that the model"),
    "a weight": (lambda m, x: (x, m.layer.weight.data[0]), _second, r"`x\[1\]`, which shares memory with a tensor"),
}  # fmt: skip


def _values(model: nn.Module, batch: Batch) -> list[Any]:
    return [each.tolist() for each in (*model.state_dict().values(), *batch)]


@pytest.mark.parametrize("name", MAKE)
def test_a_write_into_shared_memory_is_refused(name: str) -> None:
    make, write, reason = MAKE[name]
    torch.manual_seed(0)
    model = Reads(write)
    batch = make(model, torch.randn(12, 6))
    before = _values(model, batch)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "two_pass")
    with pytest.raises(EngineRefused, match=f"its forward writes into {reason}"):
        step(batch, torch.arange(12) % 5)
    assert _values(model, batch) == before


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (lambda x: (x, x[:, :3]), lambda *_: None),
        (lambda x: (x, x), _first),
        (lambda x: (x[:, :6].clone(), torch.ones(6), torch.ones(1).expand(6)), lambda *_: None),
        (lambda x: torch.cat([x, x], 1).split(6, 1), _first),  # two columns of one tensor, with no element in common
        (lambda x: (x, *[torch.ones(2, 6)] * 2), _second),
    ],
)
def test_what_is_only_read_or_stays_apart_or_together_is_right(make: Any, write: Any) -> None:
    gradients = []
    for engine in ("exact", "two_pass"):
        torch.manual_seed(0)
        model = Reads(write)
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine)
        step(make(torch.randn(12, 6)), torch.arange(12) % 5).backward()
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters()]))  # type: ignore[union-attr]
    torch.testing.assert_close(*gradients)


def test_copies_share_what_the_originals_share() -> None:
    x, line = torch.randn(4, 6), torch.arange(9.0)
    given = [x, x.T, x[:, 2:].view(torch.int32), line.unfold(0, 6, 1), torch.ones(1).expand(3), x.clone()]
    copies = copied(given)
    for own, copy in zip(given, copies, strict=True):
        assert torch.equal(own, copy)
        assert own.stride() == copy.stride()
    copies[0].zero_()
    copies[3][1, 0] = 5.0
    assert not copies[1].any() and not copies[2].any() and copies[5].all()  # noqa: PT018
    assert copies[3][0, 1] == 5.0
    assert x.all()
    assert line[1] == 1.0


def test_an_expanded_tensor_gets_its_values_back() -> None:
    x, buffer = torch.ones(1, 3).expand(2, 3), torch.ones(1).expand(3)
    was = copied(x)
    x[0].mul_(2)
    restore_values(x, was)
    assert x.tolist() == [[1.0] * 3] * 2
    model = Reads(lambda model, *_: model.get_buffer("table")[0].mul_(2))
    model.register_buffer("table", buffer)
    batch = torch.randn(12, 6), torch.arange(12) % 5
    report = check_engine(model, batch, nn.CrossEntropyLoss(), engine="two_pass", verbose=False)
    assert report.verdict == "right", report


@pytest.mark.parametrize("engine", ["exact", "two_pass"])
def test_a_window_is_scored_with_what_the_write_changes(engine: str) -> None:
    def write_first(_: Any, x: Tensor, part: Tensor) -> None:
        x.mul_(3)

    torch.manual_seed(0)
    model = Reads(write_first)
    nn.init.normal_(model.head.weight)
    batches = [((x := torch.randn(12, 6), x[:1]), torch.arange(12) % 5) for _ in range(2)]
    expected = [nn.functional.cross_entropy(model(*copied(x)), y, reduction="none") for x, y in batches]
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine)
    if engine == "two_pass":
        with pytest.raises(EngineRefused, match="which shares memory with"):
            list(batchtrim.accumulate(step, batches))
        return
    found = sum(float(part.detach()) for part in batchtrim.accumulate(step, batches))
    assert found == pytest.approx(float(torch.cat(expected).detach().topk(12).values.mean()), rel=1e-5)
