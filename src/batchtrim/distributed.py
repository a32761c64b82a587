"""Selection over all ranks: keep the samples that one process would keep from the joined batch.

With ``scope="local"`` each rank trims its own part. DDP averages gradients over ranks, so this equals trimming the
joined batch only where each rank's hardest samples happen to be the joint ones. With ``scope="global"`` every rank
sends its detached losses to every other, all choose from the same joined vector, and rank r steps on

    ``L_r = R * sum(kept losses on r) / (kept samples on all ranks)``

whose mean over the R ranks is that of the joined batch, and so is the gradient under DDP and FSDP. A rank that keeps
nothing, or has no samples, returns a 0 with a graph. The joined batch is ordered by ranks, then rows: of equal losses
the lower (rank, row) is kept. Losses are sent as float64, so no bit is lost; indices are not sent at all.

Each call makes three collectives, which every rank enters whatever it holds:

1. a header of fixed size: it shows settings that differ, and every rank then raises before anything else is sent;
2. the losses, padded to the longest rank;
3. a checksum of the result, four numbers of rows, divisor and weights. Whatever differs between ranks and did not
   show in the header (a rule without a ``repr``, a lambda, the state of a rule) shows here, before a loss is returned.

The third costs one more round trip of 32 bytes per rank. If a rank never arrives, the others wait for the timeout of
the process group, ``init_process_group(timeout=...)``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch._compile import _disable_dynamo

from batchtrim._checks import first_line
from batchtrim.errors import RanksDisagree
from batchtrim.reduction import kept_divisor
from batchtrim.selection import Rule, Selection
from batchtrim.selection.base import choose

__all__ = ["Joined", "check_same_count", "gather", "meet", "select_over_ranks", "sum_over_ranks", "world_size"]

P = ParamSpec("P")
R = TypeVar("R")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What ranks meet for. Every meeting begins with a header of one size: gloo aborts the process if sizes differ.
_MEETINGS = ("choice of samples", "number of micro-batches", "number of totals", "keep log")
_HEADER_SIZE = 13
# The header of a choice: what must agree on every rank; what must agree on every rank with samples; their number.
_SAME = (
    "settings (rule, schedule, total, scale, unit)",
    "number of steps so far",
    "keep fraction",
    "generator state",
)
_SAME_WITH_SAMPLES = (
    "dtype of the losses",
    "presence of class weights",
    "presence of `rank_by`",
    "dtype of what is ranked by",
    "reduction",
    "number of terms",
    "reduction of the terms",
)
_CURE = "Make the trimmer with the same arguments on every rank, and call it and its step() equally often."
# Sums in another order differ in their last digits; any real disagreement is larger.
_CLOSE = 1e-6

NOT_PICKLED = (
    "expected a trimmer without `process_group` to pickle, got one with it. A group belongs to its process: save the "
    "trimmer's state_dict(), and load it into a trimmer made with the group of the new process."
)


@dataclasses.dataclass(frozen=True)
class Joined:
    """The choice from all ranks' losses.

    Attributes:
        selection: this rank's part: rows of its own losses, and divisors that make the mean over ranks right.
        chosen: the same choice as rows of ``values``.
        values: (N,), all ranks' losses that count, detached.
        terms: of a sum of terms, the divisors of each at scales "kept" and "batch".
    """

    selection: Selection
    chosen: Selection
    values: Tensor
    terms: tuple[tuple[float, float], ...] = ()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return how many ranks choose together; 1 if no process group was set up.

    Raises:
        ValueError: this rank is not part of ``group``.
    """
    ready = dist.is_available() and dist.is_initialized()
    size = dist.get_world_size(group) if ready else 1
    if size < 1 or (group is not None and not ready):
        got = "one without it" if ready else "one, but none was set up"
        raise ValueError(
            f"expected `process_group` to hold this rank, got {got}. Give each rank the group it averages gradients "
            "with; only ranks of a group may choose in it."
        )
    return size


def _untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Break the graph in a compiled function.

    ``torch.compiler.disable`` does so too, but imports the compiler at its first call: seconds, even if none is used.
    """
    disabled = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (disabled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call


@_untraced
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
    summed: bool = False,
    terms: Sequence[Tensor | None] = (),
    group: dist.ProcessGroup | None = None,
) -> Joined:
    """Apply ``rule`` to the joined losses of every rank of ``group``. Every rank must call it.

    Args:
        rule: the selection rule, the same on every rank.
        values: (B,), losses; B may differ between ranks and be 0.
        scores: (B,), what to rank by.
        keep: keep fraction in (0, 1].
        mask: bool (B,), False where an entry does not count.
        weights: (B,), class weights already in ``values``.
        generator: for rules that draw; in the same state on every rank, so that all draw the same.
        settings, steps, summed: what else must agree between ranks. ``summed``, whether the kept losses are added up,
            must agree only between ranks that have something to choose from.
        terms: what each loss adds to the divisor of each term of a sum, (B,); None for a term of reduction "sum".
        group: the ranks that average their gradients; all of them by default.

    Returns:
        This rank's selection and the joined one.

    Raises:
        RanksDisagree: on every rank, if settings or results differ or the rule fails on one; and if a rank does not
            arrive before the time limit.

    Notes:
        A rank with nothing to choose from may differ in dtype, weights and ``rank_by``.
        Syncs the device, to know how much to gather. In a compiled function it is a graph break.
    """
    if hasattr(values, "to_local") or hasattr(scores, "to_local"):
        raise TypeError(
            "expected each rank's own losses with scope='global', got a DTensor. Pass those of this rank, "
            "losses.to_local(); or choose from the whole one with scope='local'."
        )
    ranks = world_size(group)
    valid = None if mask is None else mask.nonzero().squeeze(1)
    rows = [scores, values.detach()] + ([] if weights is None else [weights.detach()])
    rows += [torch.zeros_like(values) if each is None else each for each in terms]
    if valid is not None:
        rows = [row[valid] for row in rows]
    own = rows[0].shape[0]
    drawn = 0 if generator is None else zlib.crc32(bytes(generator.get_state().numpy()))
    common = [_fingerprint(rule, *settings), steps, *struct.unpack("<q", struct.pack("<d", keep)), drawn]
    ranked = not scores.is_set_to(values)
    sampled = [_DTYPES.index(values.dtype), int(weights is not None), int(ranked), _DTYPES.index(scores.dtype)]
    sampled += [int(summed), len(terms), sum(1 << at for at, each in enumerate(terms) if each is None)]
    headers = meet("choice of samples", [*common, *sampled, own], values.device, group)
    sizes = [header[-1] for header in headers]
    holders = [rank for rank, size in enumerate(sizes) if size]
    _check_header(headers, holders)
    if not holders:
        nothing = torch.zeros(0, dtype=torch.int64, device=values.device)
        empty = Selection(nothing, values.shape[0], 0)
        return Joined(empty, Selection(nothing, 0, 0), values.detach()[:0])

    of_values, weighted, _, of_scores, _, count, sums = headers[holders[0]][len(_SAME) : -1]
    joined = _joined(rows, 2 + weighted + count, sizes, group)
    joined_weights = joined[2] if weighted else None
    scored = joined[0].to(_DTYPES[of_scores])
    chosen, divisor = _choose_alike(
        lambda: choose(rule, scored, keep, generator), joined_weights, values.device, ranks, group
    )
    before = sum(sizes[: dist.get_rank(group)])
    selection = dataclasses.replace(
        _part(chosen, before, own, valid, values.shape[0]),
        normalizer=divisor / ranks,
        batch_normalizer=(sum(sizes) if joined_weights is None else float(joined_weights.sum())) / ranks,
    )
    pairs = [
        (1.0, 1.0) if sums >> at & 1 else _divisors(chosen, each) for at, each in enumerate(joined[2 + weighted :])
    ]
    divided = tuple((kept / ranks, everything / ranks) for kept, everything in pairs)
    return Joined(selection, chosen, joined[1].to(_DTYPES[of_values]), divided)


def _divisors(chosen: Selection, term: Tensor) -> tuple[float, float]:
    """Return a term's divisors at scales "kept" and "batch"; ``term`` holds what each loss adds to them, (N,)."""
    return kept_divisor(dataclasses.replace(chosen, normalizer=None), term) or 1.0, float(term.sum()) or 1.0


def _joined(rows: list[Tensor], count: int, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Return ``count`` rows of every rank end to end, as float64; this rank holds ``rows``, or has no samples."""
    own = rows[0].shape[0]
    padded = torch.zeros(count, max(sizes), dtype=torch.float64, device=rows[0].device)
    if own:
        padded[:, :own] = torch.stack([row.double() for row in rows])
    gathered = gather(padded, len(sizes), group)
    return torch.cat([part[:, :size] for part, size in zip(gathered, sizes, strict=True)], dim=1)


def _part(chosen: Selection, before: int, own: int, valid: Tensor | None, size: int) -> Selection:
    """Return this rank's part of a joint choice, as rows of its own batch of ``size``.

    It holds ``own`` of the joined losses, from position ``before`` on: those of the rows ``valid``, or of all.
    """
    mine = (chosen.indices >= before) & (chosen.indices < before + own)
    indices = chosen.indices[mine] - before
    weights = None if chosen.weights is None else chosen.weights[mine]
    return Selection(indices if valid is None else valid[indices], size, own, weights)


def sum_over_ranks(numbers: Tensor, what: str, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of a vector over the ranks, which must all pass the same length.

    Args:
        numbers: (M,), int64.
        what: what M is, for the message.

    Raises:
        RanksDisagree: on every rank, if M differs; and if a rank does not arrive before the time limit.
    """
    ranks = world_size(group)
    if ranks == 1:
        return numbers
    lengths = [header[0] for header in meet(what, [numbers.shape[0]], numbers.device, group)]
    check_same(what, lengths, lengths, "Give every rank the same number; a rank out of data gives empty ones.")
    return gather(numbers, ranks, group).sum(0)


def check_same_count(count: int, what: str, device: torch.device, groups: Sequence[dist.ProcessGroup | None]) -> None:
    """Raise RanksDisagree on every rank of the groups, which may share ranks, unless all have the same count."""
    low = high = count
    for group in groups:
        if world_size(group) > 1:
            found = meet(what, [low, high], device, group)
            low, high = min(lows for lows, _ in found), max(highs for _, highs in found)
    if low != high:
        raise RanksDisagree(
            f"expected the same {what} on every rank, got {low} to {high}, here {count}. The model's own forward waits "
            "for the other ranks (FSDP, SyncBatchNorm): give every rank the same number, empty ones once its data has "
            "run out."
        )


def meet(
    what: str, numbers: Sequence[int], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[list[int]]:
    """Gather every rank's ``numbers`` over ``group``.

    Every meeting sends the same size, whatever it is for, so a rank at another meeting causes an error on all of them.

    Raises:
        RanksDisagree: ranks came for something else, or one did not arrive before the time limit.
    """
    ranks = world_size(group)
    header = [_MEETINGS.index(what), *numbers]
    header += [0] * (_HEADER_SIZE - len(header))
    headers = gather(torch.tensor(header, device=device), ranks, group).tolist()
    met = [each[0] for each in headers]
    named = [_MEETINGS[number] for number in met]
    check_same("collective", met, named, "Call trimmer, accumulate and end_epoch in the same order everywhere.")
    return [each[1 : 1 + len(numbers)] for each in headers]


def gather(tensor: Tensor, ranks: int, group: dist.ProcessGroup | None) -> Tensor:
    """Return every rank's tensor, (R, ...); all have the same shape."""
    parts = [torch.empty_like(tensor) for _ in range(ranks)]
    try:
        dist.all_gather(parts, tensor, group=group)
    except RuntimeError as error:  # a time limit, a closed connection, or another collective on the other side
        raise RanksDisagree(
            f"expected all {ranks} ranks to choose together, got no matching answer ({first_line(error)}). "
            "Either a rank has stopped, or it does not call its trimmer as often as this one, or not with "
            "scope='global'. A rank without samples calls it too, with losses of shape (0,)."
        ) from error
    return torch.stack(parts)


def check_same(what: str, found: Sequence[float], readable: object, cure: str) -> None:
    """Raise RanksDisagree unless the ranks' numbers are all the same."""
    if len(set(found)) > 1:
        _disagree(what, readable, len(found), cure)


def _disagree(what: str, readable: object, ranks: int, cure: str) -> NoReturn:
    raise RanksDisagree(f"expected the same {what} on every rank, got {readable} for ranks 0 to {ranks - 1}. {cure}")


def _check_header(headers: list[list[int]], holders: list[int]) -> None:
    for position, name in enumerate(_SAME + _SAME_WITH_SAMPLES):
        found = [header[position] for header in headers]
        among = range(len(found)) if position < len(_SAME) else holders
        if len({found[rank] for rank in among}) > 1:
            _disagree(name, _readable(name, found), len(found), _CURE)


def _choose_alike(
    choose: Callable[[], Selection],
    weights: Tensor | None,
    device: torch.device,
    ranks: int,
    group: dist.ProcessGroup | None,
) -> tuple[Selection, float]:
    """Return what ``choose`` returns, and its divisor; compare both over ranks, which choose from the same numbers.

    Args:
        weights: (N,), class weights.
    """
    mine, failure, chosen = [1.0, 0.0, 0.0, 0.0], None, None
    try:
        chosen = choose()
        mine = [0.0, *_checksum(chosen, weights)]
    except Exception as error:  # tell the other ranks before the error propagates
        failure = error
    verdicts = gather(torch.tensor(mine, dtype=torch.float64, device=device), ranks, group).tolist()
    if failure is not None:
        raise failure
    failed = [rank for rank, verdict in enumerate(verdicts) if verdict[0]]
    if failed:
        raise RanksDisagree(
            f"expected the rule to choose on every rank, got an error on ranks {failed}. They report it."
        )
    names = ("rows kept", "divisor of the kept losses", "weights of the kept losses")
    for position, name in enumerate(names, start=1):
        found = [verdict[position] for verdict in verdicts]
        if not all(_close(number, found[0]) for number in found):
            readable = [f"checksum {int(number):08x}" for number in found] if position == 1 else found
            _disagree(name, readable, ranks, "The rule or its state differs between ranks: make it the same on all.")
    assert chosen is not None
    return chosen, mine[2]


def _checksum(chosen: Selection, weights: Tensor | None) -> list[float]:
    """Return numbers that ranks must agree on: a hash of the rows, the divisor, a sum that depends on the weights."""
    rows, order = torch.sort(chosen.indices)
    told = 0.0
    if chosen.weights is not None:
        told = float((chosen.weights[order].double() * torch.cos(rows.double()).add(2.0)).sum())
    if weights is not None:  # the rule's own normalizer counts samples
        chosen = dataclasses.replace(chosen, normalizer=None)
    return [float(zlib.crc32(rows.cpu().numpy().tobytes())), kept_divisor(chosen, weights), told]


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_CLOSE) or (math.isnan(one) and math.isnan(other))


def _readable(name: str, found: list[int]) -> str:
    if name == "keep fraction":
        return str([struct.unpack("<d", struct.pack("<q", bits))[0] for bits in found])
    if name.startswith("dtype"):
        return str([str(_DTYPES[index]) for index in found])
    if name == "reduction":
        return str(["sum" if number else "mean" for number in found])
    if name.startswith("presence"):
        return str([bool(number) for number in found])
    if name.startswith(("settings", "generator")):
        return str([f"fingerprint {number:08x}" for number in found])
    return str(found)


def _fingerprint(*settings: Any) -> int:
    return zlib.crc32(re.sub(r" at 0x[0-9a-f]+", "", repr(settings)).encode())  # addresses differ between processes
