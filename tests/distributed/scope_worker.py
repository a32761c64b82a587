"""One rank of test_scope.py. Every rank also builds the joined batch and computes the expected result by hand."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import batchtrim
from batchtrim.errors import RanksDisagree

# rows a rank holds, for the first two ranks and for all three
SHARDS = {
    "even": (6, 6, 6),
    "uneven last batch": (7, 3, 1),
    "empty shard": (5, 0, 4),
    "one row in all": (0, 1, 0),
}


def batch_of(sizes: tuple[int, ...], spread: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Return every rank's inputs and labels. A large ``spread`` makes all of rank 0 harder than anything elsewhere."""
    draw = torch.Generator().manual_seed(sum(sizes) * 100 + sizes[0])
    parts = []
    for rank, size in enumerate(sizes):
        x = torch.randn(size, 5, generator=draw, dtype=torch.float64)
        parts.append((x * (spread if rank == 0 else 1.0), torch.randint(0, 3, (size,), generator=draw)))
    return parts


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 3).double()


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


def kept_by_hand(losses: list[float], counts: list[bool], keep: float) -> list[int]:
    candidates = [i for i, counted in enumerate(counts) if counted]
    k = min(len(candidates), max(1, round(keep * len(candidates)))) if candidates else 0
    return sorted(sorted(candidates, key=lambda i: (-losses[i], i))[:k])


class Rank:
    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def mean(self, loss: Tensor) -> float:
        value = loss.detach().double().clone()
        dist.all_reduce(value)
        return value.item() / self.ranks

    def kept(self, trim: batchtrim.Trimmer, offset: int) -> list[int]:
        """Return the rows that all ranks kept, as rows of the joined batch."""
        found: list[Any] = [None] * self.ranks
        selection = trim.last_selection
        assert selection is not None
        assert selection.indices.dtype == torch.int64
        dist.all_gather_object(found, [row + offset for row in selection.indices.tolist()])
        return sorted(row for rows in found for row in rows)

    def check_case(self, sizes: tuple[int, ...], keep: float, scale: str, spread: float, masked: bool) -> None:
        """Compare samples, loss and gradient under DDP with those of the joined batch, sorted in Python."""
        sizes = sizes[: self.ranks]
        parts = batch_of(sizes, spread)
        masks = [torch.arange(size) % 3 != 1 if masked else torch.ones(size, dtype=torch.bool) for size in sizes]
        whole = new_model()
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        losses = F.cross_entropy(whole(x), y, reduction="none")
        rows = kept_by_hand(losses.tolist(), torch.cat(masks).tolist(), keep)
        divisor = len(rows) if scale == "kept" else int(torch.cat(masks).sum())
        expected = losses[rows].sum() / max(1, divisor)
        expected.backward()

        model = DistributedDataParallel(new_model())
        trim = batchtrim.Trimmer(keep, scope="global", scale=scale)
        own_x, own_y = parts[self.rank]
        own = F.cross_entropy(model(own_x), own_y, reduction="none")
        loss = trim(own, mask=masks[self.rank] if masked and self.rank != 1 else _maybe(masks[self.rank]))
        loss.backward()
        assert self.kept(trim, sum(sizes[: self.rank])) == rows
        assert math.isclose(self.mean(loss), expected.item(), rel_tol=1e-12, abs_tol=1e-15)
        torch.testing.assert_close(flat_gradient(model), flat_gradient(whole), rtol=1e-10, atol=1e-13)
        stats = trim.stats.compute()
        assert stats["kept"] == len(rows), "statistics are those of the joined batch"
        if rows:
            assert math.isclose(stats["threshold"], min(losses[row].item() for row in rows))

    def check_like_one_process(self, parts: list[Any], split: list[int], **options: Any) -> None:
        """Compare a call with every argument with a local trimmer on the joined batch."""
        whole = [torch.cat([part[i] for part in parts]).clone().requires_grad_(i == 0) for i in range(len(parts[0]))]
        alone = batchtrim.Trimmer(0.45, **options)
        call(alone, whole).backward()
        own = [tensor.clone().requires_grad_(i == 0) for i, tensor in enumerate(parts[self.rank])]
        trim = batchtrim.Trimmer(0.45, scope="global", **options)
        loss = call(trim, own)
        loss.backward()
        unit = parts[0][0].shape[1] if options.get("unit") == "element" else 1
        assert alone.last_selection is not None
        offset = sum(split[: self.rank]) * unit
        assert self.kept(trim, offset) == sorted(alone.last_selection.indices.tolist())
        offset = sum(split[: self.rank])
        gradient = whole[0].grad[offset : offset + split[self.rank]]  # type: ignore[index]
        torch.testing.assert_close(own[0].grad / self.ranks, gradient)  # DDP's mean divides by the ranks
        assert torch.equal(trim.generator.get_state(), alone.generator.get_state())


def _maybe(mask: Tensor) -> Tensor | None:
    """Return None for a mask that changes nothing: a rank may have one while another has none."""
    return None if bool(mask.all()) else mask


def call(trim: batchtrim.Trimmer, tensors: list[Tensor]) -> Tensor:
    """losses, rank_by, mask, class weights."""
    losses, rank_by, mask, weights = tensors
    return trim(batchtrim.Losses(losses, mask, weights), rank_by=rank_by)


def like_one_process(me: Rank) -> None:
    draw = torch.Generator().manual_seed(5)
    split = [5, 4, 0][: me.ranks]
    for shape in ((), (4,)):
        parts = []
        for size in split:
            losses = torch.rand(size, *shape, generator=draw)
            mask = torch.rand(size, *shape, generator=draw) < 0.8
            weights = torch.rand(size, *shape, generator=draw) + 0.5
            ranked = torch.rand(size, *shape, generator=draw)
            parts.append((losses * weights, ranked, mask, torch.where(mask, weights, 0.0)))
        rules = [batchtrim.hardest(), batchtrim.between(0.2), batchtrim.superquantile(), batchtrim.uniform()]
        rules += [batchtrim.percentile(), batchtrim.percentile_topk(), batchtrim.easiest()]
        rules.append(batchtrim.selection.above(0.5))
        rules.insert(0, batchtrim.loss_mass(skip=0.1))
        rules += [batchtrim.loss_mass(), batchtrim.uniform(like=batchtrim.loss_mass())]
        for rule in rules if not shape else rules[:2]:
            for unit in ("sample", "element") if shape else ("sample",):
                me.check_like_one_process(parts, split, select=rule, unit=unit)


def mass_of_the_joined_batch(me: Rank) -> None:
    """A share of all ranks' loss, with the collectives any rule needs; a negative loss anywhere raises everywhere."""
    counted: dict[str, int] = {}
    gather = dist.all_gather
    for name, rule in (("hardest", batchtrim.hardest()), ("mass", batchtrim.loss_mass())):
        trim = batchtrim.Trimmer(0.6, scope="global", select=rule)
        calls: list[int] = []
        dist.all_gather = lambda *a, _calls=calls, **k: (_calls.append(1), gather(*a, **k))[1]
        trim(torch.tensor([5.0, 0.5, 0.5]) / (1 + 9 * me.rank))
        dist.all_gather = gather
        counted[name] = len(calls)
    assert counted["mass"] == counted["hardest"]
    assert me.kept(trim, 3 * me.rank) == [0], "rank 0's first holds 5 of the 6.6 or 7.2 there are"
    with pytest.raises(ValueError, match="expected `losses` of at least 0 for loss_mass, got -2"):
        trim(torch.tensor([1.0, -2.0 if me.rank == 1 else 2.0]))
    trim(torch.rand(3))  # and the group goes on


def ties_nan_and_half(me: Rank) -> None:
    trim = batchtrim.Trimmer(0.5, scope="global")
    trim(torch.ones(4))
    assert me.kept(trim, 4 * me.rank) == list(range(2 * me.ranks)), "of equal losses the lower (rank, row)"
    loss = trim(torch.tensor([0.0, float("nan") if me.rank == 1 else 0.0], requires_grad=True))
    assert math.isnan(me.mean(loss)), "a NaN loss anywhere is kept"
    assert 3 in me.kept(trim, 2 * me.rank)
    # 257 and 2049 are the first whole numbers bf16 and fp16 cannot hold: rows and counts must not travel in them
    for dtype, size in ((torch.bfloat16, 300), (torch.float16, 2100)):
        losses = torch.zeros(size, dtype=dtype)
        if me.rank == 1:
            losses[-1], losses[-3] = 2.0, 1.0
        trim = batchtrim.Trimmer(2 / (size * me.ranks), scope="global")
        trim(losses)
        assert me.kept(trim, size * me.rank) == [2 * size - 3, 2 * size - 1]


def different_token_counts(me: Rank) -> None:
    """Padded lengths, and numbers of tokens that count, differ between ranks; padding takes no part."""
    length = 3 + 2 * me.rank
    losses = torch.arange(2.0 * length).reshape(2, length) + 100 * me.rank
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, -1] = False  # the largest loss of each rank is padding
    trim = batchtrim.Trimmer(0.25, scope="global", unit="element")
    trim(losses, mask=mask)
    counted = sum(2 * (3 + 2 * rank) - 1 for rank in range(me.ranks))
    kept = me.kept(trim, 1000 * me.rank)
    last = me.ranks - 1
    assert len(kept) == round(0.25 * counted)
    assert all(row // 1000 == last for row in kept), "the last rank's tokens are the largest"
    assert 1000 * last + 2 * (3 + 2 * last) - 1 not in kept, "and its padding is not among them"
    trim(losses, mask=mask if me.rank == 0 else torch.zeros_like(mask))  # all ranks but one have no token
    assert me.kept(trim, 1000 * me.rank) == [4], "one of rank 0's five: rounded, 0.25 * 5 = 1"
    nothing = trim(losses.requires_grad_(), mask=torch.zeros_like(mask))
    nothing.backward()
    assert nothing.item() == 0.0
    assert losses.grad is not None
    assert not losses.grad.any()


def subgroup(me: Rank) -> None:
    group = dist.new_group([0, 1])
    if me.rank < 2:
        trim = batchtrim.Trimmer(0.5, scope="global", process_group=group)
        with pytest.raises(TypeError, match=r"without `process_group` to pickle, got one with it\. .* state_dict"):
            pickle.dumps(trim)
        for each in (trim, copy.copy(trim), copy.deepcopy(trim)):
            assert len(each.select(torch.tensor([1.0, 2.0]) + 10 * me.rank).indices) == 2 * me.rank


def engines(me: Rank) -> None:
    """Two-pass and shared engines reduce the joint selection as the plain call does; a rank may keep nothing."""
    sizes = (6, 4, 5)[: me.ranks]
    x, y = batch_of(sizes, spread=50.0)[me.rank]
    gradients = []
    for engine in ("exact", "two_pass", "shared"):
        model = DistributedDataParallel(new_model())
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.2, scope="global"), engine)
        step(x, y).backward()
        gradients.append(flat_gradient(model))
        assert step.last is not None
        assert me.rank == 0 or step.last.selection.k == 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-6, atol=1e-8)


def disagreements(me: Rank) -> None:
    """Every rank names the difference, and the group is still usable afterwards."""
    odd = me.rank == 1
    losses = torch.rand(4)
    stepped = batchtrim.Trimmer(0.5, total=5, scope="global")
    stepped.step(1 + odd)
    drawn = batchtrim.Trimmer(0.5, scope="global", select=batchtrim.uniform(), seed=int(odd))
    cases = {
        "keep fraction": lambda: batchtrim.Trimmer(0.5 if odd else 0.4, total=3, scope="global")(losses),
        "settings": lambda: batchtrim.Trimmer(0.5, scope="global", scale="batch" if odd else "kept")(losses),
        "number of steps": lambda: stepped(losses),
        "generator state": lambda: drawn(losses),
        "dtype": lambda: batchtrim.Trimmer(0.5, scope="global")(losses.double() if odd else losses),
        "class weights": lambda: batchtrim.Trimmer(0.5, scope="global")(
            batchtrim.Losses(losses, None, torch.ones(4) if odd else None)
        ),
    }
    for words, case in cases.items():
        # a schedule differs in the settings too, and those are looked at first
        with pytest.raises(RanksDisagree, match="settings" if words == "keep fraction" else words):
            case()
    batchtrim.Trimmer(lambda progress: 1.0 - progress / 2, total=3, scope="global")(losses)


def another_number_of_micro_batches(me: Rank) -> None:
    """Each by itself, in step with those of the other ranks: as many of them everywhere, empty ones among them."""
    step = batchtrim.TrimmedForward(new_model(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5, scope="global"), "exact")
    x, y = batch_of((4, 4, 4))[me.rank]
    with pytest.raises(RanksDisagree, match=r"same number of micro-batches on every rank, got \[2, 1"):
        next(batchtrim.accumulate(step, [(x[:2], y[:2]), (x[2:], y[2:])][: 1 if me.rank else 2], "micro"))
    sizes = [len(x), 0] if me.rank == 0 else [1, 3]
    for over in ("micro", "window"):
        total = sum(
            me.mean(loss)
            for loss in batchtrim.accumulate(step, list(zip(x.split(sizes), y.split(sizes), strict=True)), over)
        )
        assert total > 0.0


def compiled(me: Rank) -> None:
    """In a compiled function the choice is a graph break, and nothing else changes."""
    eager, traced = (batchtrim.Trimmer(batchtrim.linear(), total=4, scope="global") for _ in range(2))
    function = torch.compile(lambda losses: traced(losses * 2), backend="aot_eager")
    for _ in range(4):
        losses = (torch.rand(5) + me.rank / 4).requires_grad_()
        both = function(losses), eager(losses * 2)
        torch.testing.assert_close(*both)
        gradients = [torch.autograd.grad(loss, losses)[0] for loss in both]
        torch.testing.assert_close(*gradients)
        eager.step()
        traced.step()


def absent(me: Rank) -> None:
    """A rank that never comes: an error within the time limit of the group, where the others wait."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    if me.rank == 0:
        with pytest.raises(RanksDisagree, match=r"called?|stopped"):
            batchtrim.Trimmer(0.5, scope="global", process_group=group)(torch.rand(4))


def elsewhere(me: Rank, group: dist.ProcessGroup) -> None:
    """A rank in another collective gets an error at its time limit; when it ends, so does the one that waits."""
    if me.rank == 0:
        with pytest.raises(RanksDisagree, match="no matching answer"):
            batchtrim.Trimmer(0.5, scope="global", process_group=group)(torch.rand(4))
    else:
        with pytest.raises(RuntimeError):
            dist.barrier(group)


def main(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    me = Rank(rank, ranks)
    for sizes in SHARDS.values():
        for keep, scale, spread, masked in (
            (0.4, "kept", 1.0, False),
            (0.4, "batch", 1.0, True),
            (0.15, "kept", 50.0, True),  # ranks other than 0 keep nothing
            (1.0, "kept", 1.0, False),
        ):
            me.check_case(sizes, keep, scale, spread, masked)
    like_one_process(me)
    mass_of_the_joined_batch(me)
    ties_nan_and_half(me)
    different_token_counts(me)
    subgroup(me)
    engines(me)
    disagreements(me)
    another_number_of_micro_batches(me)
    if ranks > 2:
        compiled(me)  # takes longer than all of the above
    later = dist.new_group(timeout=timedelta(seconds=2))
    dist.barrier()
    absent(me)
    elsewhere(me, later)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
