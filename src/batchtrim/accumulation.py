"""Gradient accumulation: trim a window of micro-batches as one batch, or each on its own, with the right scale.

Legend: M micro-batches in a window (one optimizer step), n_m samples in micro-batch m, N their sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from batchtrim._checks import check_choice, check_has_values, describe
from batchtrim.distributed import check_same_count, sum_over_ranks
from batchtrim.engine import TrimmedForward
from batchtrim.engine.generators import GeneratorStates
from batchtrim.engine.model_facts import device_of
from batchtrim.engine.rows import batch_size, copied, restore_values, tensors_of
from batchtrim.engine.state import ModelState, Snapshot, without_graph
from batchtrim.engine.wrappers import parallel_part, sync_buffers
from batchtrim.engine.writes import known_to_write, writes_undone
from batchtrim.losses import Losses
from batchtrim.reduction import kept_divisor
from batchtrim.selection import Selection
from batchtrim.selection.base import asks_for_all
from batchtrim.trimmer import Trimmer
from batchtrim.unreduced import counted, sum_of

__all__ = ["OVER", "accumulate", "first_pass", "join_losses", "select_window", "split", "waits_in_forward"]

OVER = ("window", "micro")
Batch = TypeVar("Batch")
Outcome = TypeVar("Outcome")


def accumulate(step: TrimmedForward, batches: Sequence[tuple[Any, Any]], over: str = "window") -> Iterator[Tensor]:
    """Yield the losses of one optimizer step's micro-batches; call backward on each in turn.

    ::

        for loss in batchtrim.accumulate(step, [(x1, y1), (x2, y2)]):
            loss.backward()
        optimizer.step()

    window: ``L = (1/k) * sum of the k largest of all N losses``, k = keep_count(keep, N). This is what one large batch
            would give. A first pass without a graph computes all losses, then one choice is made from them.
    micro:  ``L = sum_m (n_m / N) * L_m``, each micro-batch trimmed by itself. With equal sizes: the mean of L_m.

    The losses add up to L; do not divide them by M. In a trainer that divides (Accelerate, Lightning), set accumulation
    to 1. In DistributedDataParallel gradients are exchanged with the last micro-batch only.

    Args:
        step: the model, its per-sample loss, the trimmer and the engine.
        batches: (x, y) of each micro-batch, of any sizes.
        over: "window" or "micro".

    Yields:
        0-d losses with a graph, one per micro-batch.

    Raises:
        ValueError: no micro-batch.
        EngineRefused: the forward begins to write into parameters after its first window, the model holds an iterator
            (with "window"), or engine "two_pass" cannot train the window.
        RanksDisagree: with ``scope="global"``, see :mod:`batchtrim.distributed`; and if M differs but must not.

    Notes:
        "window" costs one more forward than "micro", without a graph. Engine "two_pass" then trains on the kept rows
        alone, with fresh dropout; "exact" and "shared" repeat the forward with the same dropout, so a window gives the
        gradient of one large batch (up to BatchNorm, which normalises micro-batches). Buffers and generators end up as
        after plain accumulation, and so do parameters that the forward itself writes into (a momentum encoder), which
        "two_pass" refuses. With ``scope="global"`` windows of all ranks are joined, whatever their M; "micro" needs the
        same M on every rank, and so does a model whose own forward waits for the other ranks (FSDP, SyncBatchNorm,
        tensor parallel); there M is compared first. A rank that has run out of data passes empty
        micro-batches. After "window", ``step.trim.last`` is the choice from all samples of the window, in order.
    """
    if not isinstance(step, TrimmedForward):
        raise TypeError(f"expected `step` to be a batchtrim.TrimmedForward, got {describe(step)}.")
    _check_batches(batches)
    check_choice("over", over, OVER)
    if over == "micro" and getattr(step.forward.per_sample_loss, "reduction", "mean") == "sum":
        raise ValueError(
            "expected a criterion of reduction 'mean' with over='micro', got 'sum'. Micro-batches are weighted by "
            "their samples: choose from the window (over='window'), or call the step on each, whose sums add up as "
            "they are."
        )
    if not batches:
        raise ValueError("expected `batches` to hold at least one micro-batch, got none. Leave out the empty window.")
    _check_undivided(step.trim)
    model = step.forward.model
    parallel = parallel_part(model)
    check_same_count(len(batches), "number of micro-batches", device_of(step.forward.inner), waits_in_forward(model))
    if over == "window":
        sync_buffers(model)
        selections, states, first = step.untraced(_choose, step, batches)
    else:
        shares = _shares(step, batches)
    for m, (x, y) in enumerate(batches):
        last = m == len(batches) - 1
        with nullcontext() if parallel is None or last else parallel.no_sync():
            if over == "micro":
                yield step(x, y) * shares[m]
            else:
                scored = first[m] if first and not step.engine.repeats_forward else None
                yield step.untraced(_train, step, (x, y), selections[m], states[m], scored)


def _train(
    step: TrimmedForward,
    batch: tuple[Any, Any],
    selection: Selection,
    state: GeneratorStates,
    scored: tuple[Snapshot, Tensor] | None,
) -> Tensor:
    """Return the loss of one micro-batch of a window; ``scored``: what the two-pass engine trains from."""
    if scored is not None:
        return step.engine.train_on_kept(*batch, selection.rising(), scored)
    state.restore()
    return step.engine(*batch, selection.rising()).loss


def _check_undivided(trim: Trimmer) -> None:
    """Warn if the trainer that the trimmer is registered with divides each loss by a number of micro-batches."""
    divisor = trim.divided_by
    if divisor > 1:
        warnings.warn(
            "expected an Accelerator with gradient_accumulation_steps=1 beside batchtrim.accumulate, whose losses add "
            f"up as they are, got {divisor}: accelerator.backward divides each of them by it. Leave it at 1.",
            stacklevel=3,
        )


def _check_batches(batches: Any) -> None:
    """Check that a window is a list of pairs: it is read twice, and a tensor of two rows would unpack as a pair."""
    if not isinstance(batches, Sequence) or isinstance(batches, str):
        raise TypeError(
            f"expected `batches` to be a list of (x, y), one per micro-batch, got {describe(batches)}. "
            "Make a list of a generator; a whole data loader is not one optimizer step."
        )
    for each in batches:
        if not isinstance(each, (tuple, list)) or len(each) != 2:
            raise TypeError(f"expected each of `batches` to be a pair (x, y), got {describe(each)}.")


def first_pass(
    model: nn.Module, batches: Sequence[Batch], forward: Callable[[Batch], Outcome], *, undo_buffers: bool = True
) -> tuple[list[Outcome], list[GeneratorStates]]:
    """Return ``forward(batch)`` of each micro-batch, without a graph, and the generators' state before it.

    Parameters that the forward writes into are restored.

    Args:
        undo_buffers: restore the model's buffers and plain attributes, for a whole second pass over
            the same batches.

    Raises:
        ValueError: a second pass follows, and the forward changes its batch in place, so the second would differ.
        EngineRefused: the forward writes into a parameter that it did not change in earlier windows.
    """
    before = ModelState(model) if undo_buffers else None
    device = device_of(model)
    found, states = [], []
    with without_graph(), writes_undone(model):
        for batch in batches:
            states.append(GeneratorStates(device))
            versions = _versions(batch)
            found.append(forward(batch))
            if undo_buffers and _versions(batch) != versions:
                raise ValueError(
                    "expected the model and its loss to leave inputs and targets alone, got one changed in place. "
                    "A window is run twice, and the second run would get it changed: change a copy, or trim each "
                    "micro-batch by itself (over='micro') with engine='exact'."
                )
    if before is not None:
        before.restore()
    return found, states


def _choose(
    step: TrimmedForward, batches: Sequence[tuple[Any, Any]]
) -> tuple[list[Selection], list[GeneratorStates], list[tuple[Snapshot, Tensor]]]:
    """Return each micro-batch's selection, the generators before it, and what the two-pass engine trains from."""
    forward, trim = step.forward, step.trim
    whole = asks_for_all(trim.rule, trim.keep)
    once = not step.engine.repeats_forward and not whole  # its second pass leaves the buffers as they are
    first: list[tuple[Snapshot, Tensor]] = []

    def score(batch: tuple[Any, Any]) -> tuple[Losses, Losses | None]:
        snapshot = Snapshot(forward, *batch) if once else None
        x, y = batch if once else copied(batch)  # a model may change its batch in place, but only once, as in one step
        losses, outputs = forward(x, y, model=forward.inner)
        if snapshot is not None:
            first.append((snapshot, losses.values))
        return losses, forward.scores(losses.detach(), outputs, y)

    before = ModelState(forward.inner, forward.per_sample_loss, forward.rank_by)
    found, states = first_pass(forward.inner, batches, score, undo_buffers=False)
    if first and known_to_write(forward.inner):  # the kept rows alone would write other values: repeat all
        for batch, (snapshot, _) in zip(batches, first, strict=True):
            restore_values(batch, (snapshot.x, snapshot.y))
        once, first = False, []
    if not once:
        before.restore()
    return select_window(trim, [losses for losses, _ in found], [scores for _, scores in found]), states, first


def _versions(batch: Any) -> list[int]:
    """Return each tensor's version, which every in-place change increments."""
    return [tensor._version for tensor in tensors_of(batch) if not tensor.is_inference()]


def waits_in_forward(model: nn.Module) -> list[dist.ProcessGroup | None]:
    """Return the process groups that the model's own forward waits for; not DDP's, whose ranks meet in backward."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    found: dict[int, dist.ProcessGroup | None] = {}
    for module in model.modules():  # SyncBatchNorm, FSDP
        if "process_group" in vars(module) and not isinstance(module, DistributedDataParallel):
            group: Any = module.process_group
            found[id(group)] = group
    for parameter in model.parameters():  # fully_shard, tensor parallel
        mesh = getattr(parameter, "device_mesh", None)
        for group in () if mesh is None else mesh.get_all_groups():
            found[id(group)] = group
    return list(found.values())


def select_window(trim: Trimmer, parts: list[Losses], scores: Sequence[Losses | None] = ()) -> list[Selection]:
    """Choose from the losses of all micro-batches together; return one selection for each, with joint divisors."""
    window = join_losses(parts)
    check_has_values("losses", window.values, "a window")
    ranked = [score for score in scores if score is not None]
    selection = trim.select(window, rank_by=join_losses(ranked) if ranked else None)
    sizes = [len(part.values) for part in parts]
    terms = [split(each, sizes) for each in selection.terms]
    found = split(selection, sizes, window.weights)
    return [replace(each, terms=tuple(term[m] for term in terms)) for m, each in enumerate(found)]


def join_losses(parts: Sequence[Losses]) -> Losses:
    """Concatenate losses. If only some parts have a mask, weights or counts, the others count as True, 1 or all."""
    if any(part.terms for part in parts):
        number = [len(part.terms) or 1 for part in parts]
        if len(set(number)) > 1:
            raise ValueError(
                f"expected the losses of all micro-batches to be a sum of as many terms, got {number}. Add the same "
                "ones up in each, with a mask in every micro-batch or in none."
            )
        return sum_of([join_losses(each) for each in zip(*(part.terms for part in parts), strict=True)], parts[0].unit)
    if any(part.counts is not None or part.entries != parts[0].entries for part in parts):
        parts = [counted(part) for part in parts]
    joined: dict[str, Any] = {"values": torch.cat([part.values.detach() for part in parts])}
    for name in ("mask", "weights", "counts"):
        found = [getattr(part, name) for part in parts]
        given = next((each for each in found if each is not None), None)
        if given is not None:
            pairs = zip(found, parts, strict=True)
            joined[name] = torch.cat(
                [torch.ones_like(p.values, dtype=given.dtype) if f is None else f for f, p in pairs]
            )
    return replace(parts[0], **joined)


def split(selection: Selection, sizes: Sequence[int], weights: Tensor | None = None) -> list[Selection]:
    """Split a selection from a joined vector into selections from its parts, each with the divisor of the whole.

    Example:
        >>> whole = Selection(torch.tensor([4, 0]), size=5, candidates=5)
        >>> [(part.indices.tolist(), part.normalizer) for part in split(whole, [2, 3])]
        [([0], 2), ([2], 2)]
    """
    normalizer = kept_divisor(selection, weights)
    batch_normalizer = selection.candidates if selection.batch_normalizer is None else float(selection.batch_normalizer)
    parts, start = [], 0
    for size in sizes:
        own = (selection.indices >= start) & (selection.indices < start + size)
        chosen = None if selection.weights is None else selection.weights[own]
        part = Selection(selection.indices[own] - start, size, size, chosen)
        parts.append(replace(part, normalizer=normalizer, batch_normalizer=batch_normalizer))
        start += size
    return parts


def _shares(step: TrimmedForward, batches: Sequence[tuple[Any, Any]]) -> list[float]:
    """Return n_m / N; with scope "global" of all ranks' samples."""
    found = [_samples(x, step.forward.batch_dim) for x, _ in batches]
    sizes = torch.tensor(found, dtype=torch.int64, device="cpu")
    trim = step.trim
    if trim.scope == "global":
        parameter = next(step.forward.inner.parameters(), sizes)
        sizes = sum_over_ranks(sizes.to(parameter.device), "number of micro-batches", trim.process_group)
    return (sizes.double() / sizes.sum().clamp(min=1)).tolist()


def _samples(x: Any, batch_dim: int) -> int:
    size = batch_size(x, batch_dim)
    if size is None:
        raise ValueError(f"expected `x` to hold a tensor with a dimension {batch_dim}, its batch, got {describe(x)}.")
    return size
