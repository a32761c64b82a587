"""Find what is compiled in a model, run it as plain Python, or compile a copy alike."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from batchtrim.errors import EngineRefused

if TYPE_CHECKING:
    from batchtrim.engine.forward import Forward

__all__ = [
    "compile_alike",
    "compiled_forward",
    "compiled_part",
    "compiler_of",
    "context_of",
    "is_compiled",
    "nothing_compiled",
    "run_uncompiled",
    "uncompiled",
    "uncompiled_calls",
]


@contextmanager
def uncompiled_calls(forward: Forward) -> Iterator[None]:
    """Run compiled models as plain Python inside the block, if the model runs so; see :func:`nothing_compiled`."""
    with nullcontext() if forward.needs_compiler else nothing_compiled():
        yield


def nothing_compiled() -> AbstractContextManager[Any]:
    """Run what is compiled as plain Python inside the block, if the torch release supports it.

    If the program has not imported torch's compiler, nothing is compiled, and it is not imported for this either.
    """
    if not hasattr(torch.compiler, "set_stance") or not _compiler_is_imported():
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def run_uncompiled(forward: Forward, run: Callable[[], Any], undo: Callable[[], None]) -> Any:
    """Call ``run`` with compiled models as plain Python, or compiled if the model does not run otherwise.

    Some of torch's operators with a body, such as ``scan``, compile themselves, and fail where that is switched off.

    Args:
        undo: called between two runs.
    """
    while True:
        imported, found = _compiler_is_imported(), None
        try:
            with uncompiled_calls(forward):
                found = run()
        except (EngineRefused, torch.OutOfMemoryError):
            raise
        except Exception:
            failed = not forward.needs_compiler
            if not failed:  # the model is at fault
                forward.needs_compiler = False
                raise
        else:
            failed = False
            if imported == _compiler_is_imported():  # before it is imported, nothing can be switched off
                return found
        del found
        undo()
        forward.needs_compiler = failed


def _compiler_is_imported() -> bool:
    return "torch._dynamo" in sys.modules


def compiled_part(model: nn.Module) -> Any:
    """Return the first part of the model that is compiled, or None: a module, its call, or its forward."""
    for module in model.modules():
        if uncompiled(module) is not module:
            return module
        if is_compiled(module):
            return module._compiled_call_impl
        if (forward := compiled_forward(module)) is not None:
            return forward
    return None


def is_compiled(module: nn.Module) -> bool:
    """True if the module itself is compiled, by ``torch.compile(module)`` or ``module.compile()``."""
    return uncompiled(module) is not module or vars(module).get("_compiled_call_impl") is not None


def compiled_forward(module: nn.Module) -> Any:
    """Return a module's forward if torch.compile returned it, for the module or for its class; else None."""
    forward = vars(module).get("forward", getattr(type(module), "forward", None))
    compiled = hasattr(forward, "_torchdynamo_orig_callable") and not hasattr(forward, "_torchdynamo_disable")
    return forward if compiled else None


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that the user gave to torch.compile. Fabric's wrapper, which has all attributes, is none."""
    held = module._modules  # a script module's has no get()
    return held["_orig_mod"] if "_orig_mod" in held else module  # type: ignore[return-value]  # noqa: SIM401


def context_of(part: Any) -> Any:
    """Return what compiled a module or a call, torch's context, or None."""
    from torch._dynamo.eval_frame import _TorchDynamoContext

    held = [cell.cell_contents for cell in getattr(part, "__closure__", None) or ()]
    contexts = (each for each in (getattr(part, "dynamo_ctx", None), *held) if isinstance(each, _TorchDynamoContext))
    return next(contexts, None)


def compiler_of(module: nn.Module) -> Callable[[Any], Any]:
    """Return torch.compile with the settings that a compiled module was compiled with."""
    return _compiler(module if uncompiled(module) is not module else module._compiled_call_impl)


def _compiler(part: Any) -> Callable[[Any], Any]:
    """Return torch.compile with the settings that a module, a call or a forward was compiled with."""
    return context_of(part) or torch.compile


def compile_alike(copied: nn.Module, model: nn.Module) -> None:
    """Compile in a deep copy what no copy keeps: a call that ``model.compile()`` compiled, and a compiled forward.

    The copy of such a forward would run the model itself.
    """
    for own, module in zip(copied.modules(), model.modules(), strict=True):
        if vars(module).get("_compiled_call_impl") is not None:
            own._compiled_call_impl = compiler_of(module)(own._call_impl)
        forward = compiled_forward(module) if "forward" in vars(module) else None
        called = None if forward is None else inspect.unwrap(forward, stop=lambda each: isinstance(each, MethodType))
        if isinstance(called, MethodType) and called.__self__ is module:
            own.forward = _compiler(forward)(MethodType(called.__func__, own))
