"""Operators that could end a GPU process are tried on the CPU first, and raise an error there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchtrim.engine.cpu_first import CpuFirst, _on_cpu

NAN = torch.tensor([[0.2, float("nan")]])
FAR = torch.tensor([0, 9])

CALLS: dict[str, Callable[[], Tensor]] = {
    "multinomial": lambda: NAN.multinomial(1),
    "bernoulli": lambda: NAN.bernoulli(),
    "bernoulli_": lambda: torch.zeros(1, 2).bernoulli_(NAN),
    "binary_cross_entropy": lambda: F.binary_cross_entropy(NAN, torch.ones(1, 2)),
    "embedding_bag": lambda: F.embedding_bag(torch.tensor([0, 1]), torch.ones(3, 2), FAR),
    "embedding": lambda: F.embedding(FAR, torch.ones(3, 2)),
    "index": lambda: torch.ones(3)[FAR],
    "index_select": lambda: torch.ones(3).index_select(0, FAR),
    "gather": lambda: torch.ones(3).gather(0, FAR),
    "scatter": lambda: torch.zeros(3).scatter(0, FAR, 1.0),
    "cross_entropy": lambda: F.cross_entropy(torch.zeros(2, 3), FAR),
    "assert_async": lambda: torch._assert_async(torch.tensor(False)) or NAN,  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_that_checks_its_numbers_raises_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def noted(func: object, *given: object) -> None:
        tried.append(str(func))
        _on_cpu(func, *given)  # type: ignore[arg-type]

    monkeypatch.setattr("batchtrim.engine.cpu_first._on_cpu", noted)
    with pytest.raises((RuntimeError, IndexError)), CpuFirst("cpu"):
        CALLS[name]()
    assert len(tried) == 1


def test_what_passes_runs_once_for_real_and_leaves_its_operands() -> None:
    table, weight = torch.zeros(3), torch.ones(3, requires_grad=True)
    with CpuFirst("cpu"):
        table.index_put_((torch.tensor([1]),), torch.tensor([5.0]), accumulate=True)
        weight[torch.tensor([1, 1])].sum().backward()
    assert table.tolist() == [0.0, 5.0, 0.0]
    assert weight.grad.tolist() == [0.0, 2.0, 0.0]  # type: ignore[union-attr]
