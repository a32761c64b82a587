"""Batches are mapped, copied and cut by one traversal, which keeps types and refuses what it cannot cut."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batchtrim.engine.rows import RowCutter, copied, map_tensors, restore_values, tensors_of
from batchtrim.errors import EngineRefused

Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass(frozen=True)
class Frozen:
    left: Tensor
    made: Tensor = dataclasses.field(init=False, default_factory=lambda: torch.ones(3))


ROWS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    "value",
    [
        Pair(torch.ones(3), None),
        OrderedDict(b=torch.ones(3), a=1),
        defaultdict(list, a=[torch.ones(3)]),
        Frozen(torch.ones(3)),
        [torch.ones(3), (torch.ones(3), "a")],
        {"x": {"y": torch.ones(3)}},
        torch.Size([3]),
        torch.ones(2, 3).max(1),
    ],
)
def test_types_are_kept(value: Any) -> None:
    doubled = map_tensors(lambda tensor: tensor * 2, value)
    assert type(doubled) is type(value)
    assert [each.tolist() for each in tensors_of(doubled)] == [(each * 2).tolist() for each in tensors_of(value)]


def test_a_model_output_stays_one() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.SequenceClassifierOutput(
        logits=torch.ones(3, 2, requires_grad=True), hidden_states=(torch.ones(3),)
    )
    detached = map_tensors(Tensor.detach, value)
    assert type(detached) is type(value)
    assert not detached.logits.requires_grad
    assert detached["logits"] is detached.logits
    assert detached.loss is None


def test_copies_keep_what_is_one_tensor_one() -> None:
    x = torch.randn(3, 2)
    (a, b), c = copied(((x, x), x))
    assert a is b is c is not x
    a.mul_(2)
    restore_values(x, a)
    assert torch.equal(x, a)


def test_cut_rows_are_copies_and_constants_too() -> None:
    x, constant = torch.randn(4, 2), torch.ones(2)
    (kept, whole), _ = RowCutter()((x, constant), None, ROWS, 4)
    assert torch.equal(kept, x[ROWS])
    whole.mul_(2)
    assert constant.tolist() == [1, 1]
    kept, same = RowCutter()(x, x, ROWS, 4)
    assert kept is same


def test_a_constant_stays_whole_in_a_batch_as_long_as_it() -> None:
    cutter = RowCutter()
    weights = torch.rand(5)
    for batch in (8, 5):
        x, y = torch.randn(batch, 3), (torch.arange(batch), weights)
        kept, (labels, whole) = cutter(x, y, ROWS, batch)
        assert kept.shape == (2, 3)
        assert labels.tolist() == [0, 2]
        assert whole.shape == (5,)


def test_time_major_inputs_and_poisoned_rows() -> None:
    x = torch.randn(3, 4, 2)
    kept, y = RowCutter(batch_dim=1)(x, torch.arange(4), ROWS, 4, poisoned=torch.tensor([False, True]))
    assert kept.shape == (3, 2, 2)
    assert kept.isnan().any(2).tolist() == [[False, True]] * 3
    assert y.tolist() == [0, 2]


def test_cut_rows_lie_in_memory_as_the_batch_does() -> None:
    last = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    major = torch.randn(6, 4, 2).transpose(0, 1)
    (images, steps, one), _ = RowCutter()((last, major, torch.randn(1, 2).expand(4, 2)), None, ROWS, 4)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert steps.transpose(0, 1).is_contiguous()
    assert torch.equal(images, last[ROWS])
    assert torch.equal(steps, major[ROWS])
    assert one.shape == (2, 2)


def _masked() -> torch.Tensor:
    x = torch.randn(4, 2)
    x.mask = x > 0  # type: ignore[attr-defined]
    return x


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (
            _masked(),
            torch.arange(4),
            "in `x`, it is a tensor with an attribute \\(`mask`\\), which its rows would lack",
        ),
        (torch.randn(4, 2), [0, 1, 2, 3], "in `y`, it is a list of 4 entries, one per sample. Pass a tensor"),
        (torch.randn(4, 2), {"a": ("b", "c", "d", "e")}, r"in `y\['a'\]`, it is a tuple of 4 entries"),
        (torch.randn(4, 2), np.arange(4), r"in `y`, it is a NumPy array of shape \(4,\). Pass a tensor"),
        (torch.randn(4, 2), object(), "in `y`, it is an object of type object, whose rows cannot be taken"),
        (torch.randn(5, 2), torch.arange(4), "in `x`, no tensor has the 4 rows of the losses along dimension 0"),
        (torch.randn(4, 2).to_sparse(), torch.arange(4), "layout torch.sparse_coo"),
        (
            torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)]),
            torch.arange(2),
            "a PackedSequence, whose rows lie interleaved",
        ),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged), torch.arange(2), "layout"),
    ],
)
def test_what_cannot_be_cut_is_refused(x: Any, y: Any, message: str) -> None:
    with pytest.raises(EngineRefused, match=f"^the batch cannot be cut to the kept rows: .*{message}"):
        RowCutter()(x, y, torch.tensor([0]), 4 if len(tensors_of(y)) == 0 else len(y))
