"""The wrappers that place a model: DistributedDataParallel, and what ``fabric.setup`` of Lightning Fabric returns.

Their own work (gradients' exchange, the check that backward is Fabric's) is not part of the model. What computes is:
Fabric converts inputs and outputs and runs the model under autocast. A wrapper may itself be compiled: Accelerate and
Fabric do so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchtrim.engine.compilation import compiler_of, is_compiled, uncompiled
from batchtrim.errors import EngineRefused

__all__ = [
    "check_backward",
    "hooks_on_wrapper",
    "in_wrapper",
    "inside_join",
    "is_placed",
    "parallel_part",
    "runs_again",
    "sync_buffers",
    "unwrapped",
]


class _FabricModel(nn.Module):
    """Compute what Fabric's wrapper does: run the model under autocast, with inputs and outputs converted."""

    def __init__(self, wrapper: Any) -> None:
        super().__init__()
        self.module = unwrapped(wrapper._forward_module)
        self.precision = wrapper._strategy.precision
        self.training = False  # it is in no mode of its own; its parts are

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.precision.convert_input((args, kwargs))
        with self.precision.forward_context():
            outputs = self.module(*args, **kwargs)
        return self.precision.convert_output(outputs)


class _StandIn(nn.Module):
    """Take the module's place in a wrapper: the same parts, another call."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call
        self.named_modules = inner.named_modules  # parameters and buffers are listed by it
        self.modules = inner.modules

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without wrappers, for a forward that no backward follows. It is compiled if a wrapper is."""
    if not is_placed(model):
        return model
    wrapper = uncompiled(model)
    inner = _FabricModel(wrapper) if _is_fabric(wrapper) else unwrapped(wrapper.module)  # type: ignore[arg-type]
    return _compiled_as(inner, model)


def is_placed(model: nn.Module) -> bool:
    """True if the model is a wrapper around one, compiled or not."""
    wrapper = uncompiled(model)
    return isinstance(wrapper, DistributedDataParallel) or _is_fabric(wrapper)


def parallel_part(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel around the model, or None."""
    wrapper = uncompiled(model)
    if _is_fabric(wrapper):
        wrapper = uncompiled(wrapper._forward_module)  # type: ignore[arg-type]
    return wrapper if isinstance(wrapper, DistributedDataParallel) else None


def sync_buffers(model: nn.Module) -> None:
    """Send rank 0's buffers to all ranks, as DDP does at the start of its next forward, which then leaves it out.

    Call it before a pass that runs the model without its wrapper, and so with the buffers of that next forward.
    """
    wrapper = parallel_part(model)
    if wrapper is None or not wrapper._check_sync_bufs_pre_fwd():
        return
    if inside_join(model):
        raise EngineRefused(
            "a first pass needs the buffers that rank 0 sends, and inside DistributedDataParallel.join() they are sent "
            "in DDP's own forward only. Use engine='exact', without a window"
        )
    if torch.is_grad_enabled() and wrapper.reducer._rebuild_buckets():  # before the buffers, as in DDP's forward
        wrapper._has_rebuilt_buckets = True
    wrapper._sync_buffers()
    wrapper.require_forward_param_sync = False


def runs_again(model: nn.Module) -> None:
    """Have DDP's next forward repeat the last one, without the exchange of buffers, which other ranks do not repeat."""
    wrapper = parallel_part(model)
    if wrapper is not None and wrapper._check_sync_bufs_pre_fwd():
        wrapper.require_forward_param_sync = False


def inside_join(model: nn.Module) -> bool:
    """True inside ``DistributedDataParallel.join()``, where each forward of DDP's meets one of every other rank."""
    wrapper = parallel_part(model)
    return wrapper is not None and wrapper._join_config.enable


def hooks_on_wrapper(model: nn.Module) -> str | None:
    """Return why the model's wrapper cannot be passed by, or None: hooks on it see its inputs and outputs."""
    wrapper = uncompiled(model)
    compiled = [model] if wrapper is not model else []
    for each in [*compiled, wrapper] if is_placed(model) else compiled:
        if each._forward_hooks or each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks:
            return f"there are hooks on its wrapper ({type(each).__name__}). Register them on the model inside"
    return None


def check_backward(model: nn.Module, loss: Tensor) -> None:
    """Have the loss checked as Fabric checks a model's outputs: an error unless backward is ``fabric.backward``."""
    wrapper = uncompiled(model)
    if _is_fabric(wrapper):
        wrapper._register_backward_hook(loss)  # type: ignore[operator]


@contextmanager
def in_wrapper(model: nn.Module, call: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yield a function to call in place of the model: its wrapper does its own work around ``call``."""
    wrapper = parallel_part(model)
    if wrapper is None:
        yield call
        return
    inner: Any = wrapper._modules["module"]

    def called(*args: Any) -> Any:
        wrapper._modules["module"] = inner
        return call(*args)

    wrapper._modules["module"] = _StandIn(inner, called)
    try:
        yield wrapper._call_impl  # not compiled: what is called inside compiles the model itself
    finally:
        wrapper._modules["module"] = inner


def _compiled_as(model: nn.Module, like: nn.Module) -> nn.Module:
    """Return a model compiled with the settings that another one is compiled with; unchanged if there is no need."""
    return model if is_compiled(model) or not is_compiled(like) else compiler_of(like)(model)


def _is_fabric(model: nn.Module) -> bool:
    """True if ``fabric.setup`` returned the model; Lightning is not imported to find out."""
    if type(model).__name__ != "_FabricModule":
        return False
    names = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")
    return any(isinstance(model, sys.modules[name]._FabricModule) for name in names if name in sys.modules)
