"""Copy a model, its loss and a batch for a comparison, and find what is not copied: what functions hold."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim.engine.compilation import compile_alike, compiled_part
from batchtrim.engine.reachable import Reachable
from batchtrim.engine.rows import copied, map_tensors, tensors_of

__all__ = ["fresh", "held_by_both", "in_float64", "not_copied", "twins"]


def twins(model: nn.Module, loss: Any) -> tuple[nn.Module, Any]:
    """Return copies of a model and its loss, compiled where they are."""
    memo: dict[int, Any] = {}
    copies = copy.deepcopy((model, loss), memo)  # together: a loss may hold a part of the model
    for part in [each for each in (model, loss) if isinstance(each, nn.Module)]:
        for parameter in [each for each in part.parameters() if id(each) in memo]:  # torch copies no attributes of it
            vars(memo[id(parameter)]).update(copy.deepcopy(vars(parameter), memo))
    for given, own in zip((model, loss), copies, strict=True):
        if isinstance(given, nn.Module) and compiled_part(given) is not None:
            compile_alike(own, given)
    return copies


def not_copied(what: str) -> ValueError:
    """Return the error for a tensor of which there is no copy."""
    return ValueError(
        f"expected a model and a loss that can be copied, got one whose copy still uses {what}: a function holds it "
        "(a forward or a hook with a closure, a loss that names the model or a layer), and functions are not copied. "
        "Make that function a method of a module, and the module a part of the model or the loss."
    )


def held_by_both(ours: tuple[nn.Module, Any], theirs: tuple[nn.Module, Any]) -> list[tuple[str, Tensor]]:
    """Return what requires a gradient and is held by two models with their losses, each with a description."""
    found, others = _leaves(*ours), _leaves(*theirs)
    return [found[at] for at in found if at in others]


def _leaves(*roots: Any) -> dict[int, tuple[str, Tensor]]:
    held = Reachable(*roots)
    named = [(f"{type(m).__name__}'s {name}", p) for m in held.modules for name, p in m._parameters.items()]
    named += [("a tensor that requires a gradient", each) for each in (*held.watched, *held.of_tensors)]
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in named:
        if tensor is not None and tensor.requires_grad and tensor.is_leaf:
            found.setdefault(id(tensor), (name, tensor))
    return found


def in_float64(model: nn.Module, loss: Any, batches: list[tuple[Any, Any]]) -> tuple[Any, Any, list[Any]]:
    """Return copies of a model, its loss and batches in which float32 is float64."""

    def doubled(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.dtype == torch.float32 else tensor

    copies = [each.double() if isinstance(each, nn.Module) else each for each in twins(model, loss)]
    wide = [map_tensors(lambda each: doubled(each.detach()).requires_grad_(each.requires_grad), b) for b in batches]
    return copies[0], copies[1], wide


def fresh(batch: Any) -> Any:
    """Return a copy of a batch without its graph; tensors that require a gradient do so in the copy."""
    with torch.no_grad():
        copy_of_it = copied(batch)
    for tensor, own in zip(tensors_of(batch), tensors_of(copy_of_it), strict=True):
        own.requires_grad_(tensor.requires_grad)
    return copy_of_it
