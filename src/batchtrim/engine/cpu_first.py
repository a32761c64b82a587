"""Try on the CPU what would end a GPU process, which cannot continue after a kernel rejects a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from batchtrim.engine.graphs import name_of
from batchtrim.engine.operator_mode import OperatorMode

__all__ = ["CpuFirst"]

# Operators whose kernels check values on the GPU: probabilities, and indices into a table.
_CHECKING = frozenset({
    "multinomial", "bernoulli", "poisson", "binomial", "binary_cross_entropy", "_assert_async",
    "_embedding_bag", "_embedding_bag_forward_only", "embedding", "embedding_renorm",
    "index", "index_put", "_index_put_impl", "index_select", "index_add", "index_copy", "index_fill", "index_reduce",
    "gather", "scatter", "scatter_add", "scatter_reduce", "take", "put",
    "nll_loss_forward", "nll_loss2d_forward", "multi_margin_loss", "multilabel_margin_loss_forward",
    "repeat_interleave",
})  # fmt: skip


class CpuFirst(OperatorMode):
    """First run each operator that checks its values on the CPU, where it raises an error instead.

    A context manager. ``device`` is the type of device whose tensors are tried.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if name_of(func).rstrip("_") in _CHECKING:
            tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            if any(each.device.type == self.device for each in tensors):
                _on_cpu(func, args, kwargs)
        return func(*args, **kwargs)


def _on_cpu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True)
        return None if isinstance(value, torch.Generator) else value  # a GPU generator cannot draw there

    args, kwargs = pytree.tree_map(copied, (args, kwargs))
    func(*args, **kwargs)
