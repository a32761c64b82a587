"""Side effects of a forward: seen, undone, and not repeated; and what is running meanwhile.

The model's Python runs twice in a step that drops samples. A :class:`Guard` sees to it that the second run starts from
the same buffers and generators as the first, that both end up as the first run left them (running statistics,
counters), and that a forward can be taken back altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim.engine.state import GeneratorStates, device_of, without_graph

__all__ = ["BufferValues", "GeneratorStates", "Guard", "device_of", "module_names", "storage_of", "without_graph"]


def storage_of(tensor: Tensor) -> int:
    """A key that tensors sharing memory share, valid while one of them lives."""
    return tensor.untyped_storage()._cdata


@contextmanager
def module_names(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Within it, the function given tells the name of the module whose forward is running."""
    names = {id(module): name for name, module in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(f"{names.get(id(module)) or 'model'} ({type(module).__name__})")

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        stack.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield lambda: stack[-1] if stack else ""
    finally:
        for handle in handles:
            handle.remove()


class BufferValues:
    """What a model's buffers hold now."""

    def __init__(self, model: nn.Module) -> None:
        self._values = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def restore(self) -> None:
        for module, name, buffer, value in self._values:
            buffer.data.copy_(value)  # past autograd, which may have saved the buffer but not for its value
            module._buffers[name] = buffer  # a forward may assign a new tensor to its buffer


class Guard:
    """Watches one model. :meth:`begin` starts a step; :meth:`rollback` takes it back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # tensors of the model that the first pass changed, what they were, and whether the second pass reads them
        self._log: list[tuple[Tensor, Tensor, bool]] = []
        self._logged: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        """Look up the model's parameters and buffers anew."""
        self.modules = list(self.model.modules())
        self._buffers = [
            (module, name, buffer)
            for module in self.modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        tensors = [buffer for _, _, buffer in self._buffers] + list(self.model.parameters())
        self._storages = {storage_of(tensor) for tensor in tensors}
        self.device = device_of(self.model)

    def begin(self) -> None:
        """Note the state before the first pass."""
        if any(module._buffers.get(name) is not buffer for module, name, buffer in self._buffers):
            self.refresh()
        self._log.clear()
        self._logged.clear()
        self._after_values: list[tuple[Tensor, Tensor]] = []
        self.before = GeneratorStates(self.device)

    def protects(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer of the model, or a view of one."""
        return storage_of(tensor) in self._storages

    def before_write(self, tensor: Tensor, read_again: bool = True) -> None:
        """Called before the first pass changes a tensor in place: keep what it was, once."""
        if self.protects(tensor) and id(tensor) not in self._logged:
            self._logged.add(id(tensor))
            self._log.append((tensor, tensor.detach().clone(), read_again))

    def between(self) -> None:
        """Called after the first pass: the second one is to find what the first one found."""
        self.after = GeneratorStates(self.device)
        self._after_buffers = [module._buffers.get(name) for module, name, _ in self._buffers]
        self._after_values = [(tensor, tensor.detach().clone()) for tensor, _, again in self._log if again]
        # through .data, since autograd need not know: the values that count are put back by end()
        for tensor, old, again in reversed(self._log):
            if again:
                tensor.data.copy_(old)
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        self.before.restore_outside_torch()

    def end(self) -> bool:
        """Called after the second pass. Returns whether it left torch's generators where the first pass did."""
        same = GeneratorStates(self.device).same_torch_state(self.after)
        self._restore_after()
        self._log.clear()
        return same

    def _restore_after(self) -> None:
        self.after.restore()
        for tensor, value in self._after_values:
            tensor.data.copy_(value)
        for (module, name, _), buffer in zip(self._buffers, self._after_buffers, strict=True):
            module._buffers[name] = buffer  # a forward may assign a new tensor to its buffer
        self._after_values = []

    def rollback(self) -> None:
        """Everything back to how it was at :meth:`begin`."""
        with torch.no_grad():
            for tensor, old, _ in reversed(self._log):
                tensor.copy_(old)
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        self._log.clear()
        self._logged.clear()
        self.before.restore()
