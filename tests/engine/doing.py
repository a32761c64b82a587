"""A model whose forward does something beside its work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Doing(nn.Module):
    def __init__(self, do: Callable[[], Any]) -> None:
        super().__init__()
        self.layer, self.do = nn.Linear(6, 5), do

    def forward(self, x: Tensor) -> Tensor:
        self.do()
        return self.layer(x)
