"""Selection over all ranks: the samples one process would keep of the joined batch.

With ``scope="local"`` each rank trims its own part. DDP averages gradients over ranks, so that equals trimming the
joined batch only where each rank's hardest samples happen to be the joint ones. With ``scope="global"`` every rank
sends its detached losses to every other, all choose from the same joined vector, and rank r steps on

    ``L_r = R * sum(kept losses on r) / (kept samples on all ranks)``

whose mean over the R ranks, and so the gradient DDP and FSDP make of it, is that of the joined batch. A rank that keeps
nothing, or has no samples, gives an attached 0. Joined means in the order of ranks and then of rows: of equal losses
the lower (rank, row) is kept. Losses travel as float64, so no bit is lost; indices do not travel at all.

Two collectives a call, entered by every rank whatever it holds: a header of fixed size, then losses padded to the
longest rank. Settings that differ show in the header, and every rank raises. A rank that never comes ends the wait at
the time limit of the process group, ``init_process_group(timeout=...)``.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import zlib
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch._compile import _disable_dynamo

from batchtrim.errors import RanksDisagree
from batchtrim.reduction import kept_divisor
from batchtrim.selection import Rule, Selection

__all__ = ["Joined", "select_over_ranks", "sum_over_ranks", "world_size"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What must be the same on every rank, in the order of the header; the number of losses follows.
_HEADER = (
    "settings (rule, schedule, total, scale, unit)",
    "number of steps so far",
    "keep fraction",
    "generator state",
    "dtype of the losses",
    "presence of class weights",
)


@dataclasses.dataclass(frozen=True)
class Joined:
    """What was chosen from all ranks' losses.

    Attributes:
        selection: this rank's part: rows of its own losses, and divisors that make the mean over ranks right.
        chosen: the same choice as rows of ``values``.
        values: (N,), all ranks' losses that count, detached.
    """

    selection: Selection
    chosen: Selection
    values: Tensor


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """How many ranks choose together; 1 where no process group was set up."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


@_disable_dynamo  # torch.compiler.disable, but without importing the compiler for those who do not compile
def select_over_ranks(
    rule: Rule,
    values: Tensor,
    scores: Tensor,
    keep: float,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    settings: tuple[Any, ...] = (),
    steps: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Joined:
    """Apply ``rule`` to the joined losses of every rank of ``group``. Every rank must call it.

    Args:
        rule: the selection rule, the same on every rank.
        values: (B,), losses; B may differ between ranks and be 0. ``scores``: (B,), what to rank by.
        keep: keep fraction in (0, 1]. ``mask``: bool (B,), False where an entry does not count.
        weights: (B,), class weights already in ``values``.
        generator: for rules that draw; in the same state on every rank, so that all draw the same.
        settings, steps: what else must agree between ranks.
        group: the ranks that average their gradients; all of them by default.

    Returns:
        This rank's selection and the joined one.

    Raises:
        RanksDisagree: on every rank where settings differ, and where a rank does not come before the time limit.

    Notes:
        Syncs the device: how much to gather has to be known. In a compiled function it is a graph break.
    """
    ranks = world_size(group)
    valid = None if mask is None else mask.nonzero().squeeze(1)
    rows = [scores, values.detach()] + ([] if weights is None else [weights.detach()])
    if valid is not None:
        rows = [row[valid] for row in rows]
    own = rows[0].shape[0]
    header = [
        _fingerprint(rule, *settings),
        steps,
        *struct.unpack("<q", struct.pack("<d", keep)),
        0 if generator is None else zlib.crc32(bytes(generator.get_state().numpy())),
        _DTYPES.index(values.dtype),
        int(weights is not None),
        own,
    ]
    headers = _gather(torch.tensor(header, device=values.device), ranks, group).tolist()
    _check_agreement(headers)
    sizes = [each[-1] for each in headers]
    longest, total = max(sizes), sum(sizes)
    if total == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=values.device)
        empty = Selection(nothing, values.shape[0], 0)
        return Joined(empty, Selection(nothing, 0, 0), values.detach()[:0])
    padded = torch.zeros(len(rows), longest, dtype=torch.float64, device=values.device)
    padded[:, :own] = torch.stack([row.double() for row in rows])
    gathered = _gather(padded, ranks, group)
    joined = torch.cat([part[:, :size] for part, size in zip(gathered, sizes, strict=True)], dim=1)
    chosen = rule(joined[0].to(scores.dtype), keep, generator)

    start = sum(sizes[: dist.get_rank(group)])
    mine = (chosen.indices >= start) & (chosen.indices < start + own)
    indices = chosen.indices[mine] - start
    selection = Selection(
        indices if valid is None else valid[indices],
        values.shape[0],
        own,
        None if chosen.weights is None else chosen.weights[mine],
        # with weights the rule's own normalizer, which counts samples, does not hold
        (
            kept_divisor(chosen)
            if weights is None
            else kept_divisor(dataclasses.replace(chosen, normalizer=None), joined[2])
        )
        / ranks,
        (total if weights is None else float(joined[2].sum())) / ranks,
    )
    return Joined(selection, chosen, joined[1].to(values.dtype))


def sum_over_ranks(numbers: Tensor, what: str, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of a vector over the ranks, which must all hold one of the same length.

    Args:
        numbers: (M,), int64. what: what M is, for the message.

    Raises:
        RanksDisagree: on every rank where M differs, and where a rank does not come before the time limit.
    """
    ranks = world_size(group)
    if ranks == 1:
        return numbers
    lengths = _gather(torch.tensor([numbers.shape[0]], device=numbers.device), ranks, group).flatten().tolist()
    _check_same(what, lengths, lengths, "Give every rank as many; one that has run out of data gives empty ones.")
    return _gather(numbers, ranks, group).sum(0)


def _gather(tensor: Tensor, ranks: int, group: dist.ProcessGroup | None) -> Tensor:
    """(R, ...): every rank's tensor of the same shape."""
    parts = [torch.empty_like(tensor) for _ in range(ranks)]
    try:
        dist.all_gather(parts, tensor, group=group)
    except RuntimeError as error:  # a time limit, a closed connection, or another collective on the other side
        raise RanksDisagree(
            f"expected all {ranks} ranks to choose together, got no fitting answer ({str(error).splitlines()[0]}). "
            "Either a rank has stopped, or it does not call its trimmer as often as this one, or not with "
            "scope='global'. A rank without samples calls it too, with losses of shape (0,)."
        ) from error
    return torch.stack(parts)


def _check_agreement(headers: list[list[int]]) -> None:
    for position, name in enumerate(_HEADER):
        found = [header[position] for header in headers]
        cure = "Make the trimmer with the same arguments and step it as often everywhere."
        _check_same(name, found, _readable(name, found), cure)


def _check_same(what: str, found: list[int], readable: object, cure: str) -> None:
    if len(set(found)) > 1:
        raise RanksDisagree(
            f"expected the same {what} on every rank, got {readable} for ranks 0 to {len(found) - 1}. {cure}"
        )


def _readable(name: str, found: list[int]) -> str:
    if name == "keep fraction":
        return str([struct.unpack("<d", struct.pack("<q", bits))[0] for bits in found])
    if name == "dtype of the losses":
        return str([str(_DTYPES[index]) for index in found])
    if name.startswith(("settings", "generator")):
        return str([f"fingerprint {number:08x}" for number in found])
    return str(found)


def _fingerprint(*settings: Any) -> int:
    return zlib.crc32(re.sub(r" at 0x[0-9a-f]+", "", repr(settings)).encode())  # addresses differ between processes
