"""How far apart two tensors are, of whatever kind."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from batchtrim.engine.contents import relative_difference

_ONE = torch.eye(3)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    "pair",
    [
        lambda: (_ONE.to_sparse(), (2 * _ONE).to_sparse()),
        lambda: (_ONE.to_sparse(), _ONE.flip(0).to_sparse()),
        lambda: (_ONE.to_sparse(), _ONE),
        lambda: (_ONE.to_sparse_csr(), (2 * _ONE).to_sparse_csr()),
        lambda: (torch.nested.as_nested_tensor([_ONE[0]]), torch.nested.as_nested_tensor([_ONE[1]])),
        lambda: (torch.complex(_ONE, _ONE), torch.complex(_ONE, 2 * _ONE)),
        lambda: (torch.tensor(10**7), torch.tensor(10**7 + 1)),
    ],
)
def test_a_difference_of_tensors_is_seen(pair: Callable[[], tuple[Tensor, Tensor]]) -> None:
    one, other = pair()
    assert relative_difference(one, one.clone()) == 0
    assert relative_difference(one, other) > 0.1


def test_what_is_not_finite_in_the_same_places_is_the_same() -> None:
    """A buffer of missing values; models that hold one train with every engine."""
    one = torch.tensor([math.nan, math.inf, -math.inf, 3.0, 4.0])
    assert relative_difference(one, one.clone()) == 0
    assert relative_difference(one, torch.tensor([math.nan, math.inf, -math.inf, 3.0, 4.5])) == pytest.approx(0.1)
    for at in range(5):
        assert not relative_difference(one, one.index_fill(0, torch.tensor(at), 1.0)) <= 0.1
        assert not relative_difference(one.index_fill(0, torch.tensor(at), 1.0), one) <= 0.1
