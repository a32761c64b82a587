"""What an error says about a criterion that gives no un-reduced losses, or whose mean is not that of its losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchtrim._checks import describe

__all__ = [
    "WAY_OUT",
    "changes_when_called",
    "hooked",
    "joins_samples",
    "not_its_own",
    "not_of_samples",
    "of_compiled_forward",
    "of_torchscript",
    "why_reduced",
]

WAY_OUT = (
    "Make it with reduction='none', whose losses are averaged, or write a function that returns them as they should "
    "count: batchtrim.Losses(values, mask, weights)."
)


def hooked(criterion: Any) -> bool:
    """True if hooks may change what a criterion module takes or returns."""
    return isinstance(criterion, nn.Module) and bool(criterion._forward_hooks or criterion._forward_pre_hooks)


def why_reduced(criterion: Any, torchs: bool, takes_reduction: bool) -> str:
    """Say why the un-reduced losses of a criterion are one number, and what to do.

    Args:
        torchs: it is one of torch's, and nothing was put around it.
        takes_reduction: it has a reduction, which was set to 'none'.
    """
    if torchs:
        return "Its inputs are of one sample: give them a batch dimension of 1, as in outputs[None]."
    if isinstance(criterion, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        why = "it is TorchScript, in which no reduction can be set. Pass the criterion as it was before that."
    elif hooked(criterion):
        why = "its hooks are called with un-reduced losses. Let them return one loss per sample, or leave them out."
    elif parts := _averaging_parts(criterion):
        why = f"{parts} inside of it averages. Make that with reduction='none'."
    elif hasattr(criterion, "reduction"):
        why = "it averages in spite of reduction='none', set on it after it was made. Make it with reduction='none'."
    elif isinstance(criterion, nn.Module) and not takes_reduction:
        why = "it has no `reduction`. If it has another option for that (`reduce`, `size_average`), make it so."
    else:
        takes = "averages in spite of reduction='none'" if takes_reduction else "takes no `reduction` by name"
        why = (
            f"it {takes}. If it can be told otherwise, bind that: "
            "per_sample(functools.partial(criterion, reduction='none'))."
        )
    return (
        f"It averages by itself: {why} If it is a mean over samples, call it for each: per_sample(lambda outputs, "
        "targets: torch.stack([criterion(o[None], t[None]) for o, t in zip(outputs, targets)])). Otherwise give a "
        "criterion that can return un-reduced losses."
    )


def not_its_own(criterion: Any, own: Tensor, ours: Tensor) -> ValueError:
    """Return the error for a criterion whose own value is not the mean of its un-reduced losses."""
    why = f"It uses another divisor. {WAY_OUT}"
    if hooked(criterion):
        why = (
            "Its hooks change its losses or its targets. Write a function that does what they do, and returns the "
            "losses as they should count: batchtrim.Losses(values, mask, weights)."
        )
    return ValueError(
        f"expected {describe(criterion)} to give the mean of its un-reduced losses, {float(ours):.6g}, got "
        f"{float(own):.6g}. {why}"
    )


def not_of_samples(samples: int, values: Tensor, second: bool) -> ValueError:
    """Return the error for losses that are not one for each sample. ``second``: one for each entry of dimension 1."""
    cure = "Keep the batch dimension first in what the criterion returns, or choose among elements: unit='element'."
    if second:
        cure = (
            "They are as many as dimension 1 has entries. If these are classes, let the criterion keep the samples "
            "apart; if they are the samples, put the batch first, or give the losses to the trimmer without per_sample."
        )
    return ValueError(f"expected one loss for each of {samples} samples, got {describe(values)}. {cure}")


def joins_samples(name: str, samples: int, fewer: Tensor) -> ValueError:
    """Return the error for a criterion that gives as many losses as there are samples, but not one for each."""
    return ValueError(
        f"expected one loss for each sample from {name}, got {describe(fewer)} for {samples - 1} samples, and "
        f"{samples} for one more. Does it give one for each class, over the whole batch (an option such as `batch`)? "
        "Let it keep the samples apart."
    )


def changes_when_called(name: str) -> ValueError:
    """Return the error for a function whose result depends on its earlier calls."""
    return ValueError(
        f"expected {name} to return the same losses for the same batch, got others from a second call. It changes a "
        "state (a running mean) or its inputs when it is called, or draws random numbers that are not torch's, and to "
        "compare its own value calls it once more. Bind its reduction, which is then not compared: "
        "per_sample(functools.partial(criterion, reduction='none')); or keep the state in a module, of which a copy is "
        "called."
    )


def of_torchscript(name: str) -> TypeError:
    """Return the error for one of torch's criteria that was scripted or traced."""
    return TypeError(
        f"expected `criterion` in Python, got {name} of TorchScript, whose class weights and ignored labels cannot be "
        f"read. Pass nn.{name} itself."
    )


def of_compiled_forward(name: str) -> TypeError:
    """Return the error for a criterion whose ``forward`` was replaced by its compiled one."""
    return TypeError(
        f"expected `criterion` with a forward of its own, got {name} with a compiled one, whose settings cannot be "
        "changed. Leave it as it is, or compile in place: criterion.compile(). Here it runs uncompiled."
    )


def _averaging_parts(criterion: Any) -> str:
    """Return the names of the criteria inside a module that have a reduction."""
    if not isinstance(criterion, nn.Module):
        return ""
    named = ((name, getattr(each, "reduction", "none")) for name, each in criterion.named_modules() if name)
    return " and ".join(f"`{name}`" for name, reduction in named if reduction in ("mean", "sum", "batchmean"))
