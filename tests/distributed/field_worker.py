"""One rank of tests/field/test_ranks.py, which says where each case comes from. A case names the function to run."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim import Choice, KeepLog, Losses, Selection, Trimmer
from batchtrim.errors import RanksDisagree

LOSSES = torch.tensor([0.5, 3.0, 1.0, 2.0])
SOON = timedelta(seconds=4)


def joint(keep: Any = 0.5, **options: Any) -> Trimmer:
    return Trimmer(keep, scope="global", **options)


def mean(loss: Tensor) -> float:
    """Return the mean over ranks, as DDP takes it of gradients."""
    value = loss.detach().double().clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def disagree(call: Callable[[], Any], words: str) -> None:
    """An error on this rank, as on all; the ranks are in step afterwards."""
    with pytest.raises(RanksDisagree, match=words):
        call()
    assert mean(joint(0.5)(LOSSES)) == 2.5


class Without:
    """A rule whose repr does not tell its parameter, and that remembers how often it was called."""

    def __init__(self, keep: float = 0.5, calls: int = 0) -> None:
        self.keep, self.calls = keep, calls

    def __call__(self, losses: Tensor, keep: float, generator: Any = None) -> Selection:
        self.calls += 1
        return batchtrim.hardest()(losses, min(1.0, self.keep + self.calls / 8))


def first_call(rank: int) -> None:
    """Nothing is compiled, so the compiler is not imported: several seconds, within somebody's time limit."""
    assert "torch._dynamo" not in sys.modules
    assert mean(joint()(LOSSES)) == 2.5
    log = KeepLog(4, distributed=True)
    log.record(Choice(LOSSES, batchtrim.hardest()(LOSSES, 0.5)), ids=torch.arange(4))
    log.end_epoch()
    assert "torch._dynamo" not in sys.modules


def results(rank: int) -> None:
    """A difference between ranks is found in the choice itself, whatever its cause."""
    for rule in (
        Without(0.1 + 0.5 * rank),
        Without(calls=3 * rank),
        lambda losses, keep, generator=None: batchtrim.hardest()(losses, 0.25 if rank else 0.5),
        lambda losses, keep, generator=None: Selection((losses + losses.shape[0] * rank).topk(3 - rank).indices, 8, 8),
        lambda losses, keep, generator=None: (batchtrim.easiest() if rank else batchtrim.hardest())(losses, keep),
    ):
        disagree(
            lambda rule=rule: joint(select=rule)(LOSSES), r"expected the same rows kept on every rank, got \['check"
        )
    rows = torch.tensor([1, 5])
    disagree(
        lambda: joint(select=lambda *_: Selection(rows, 8, 8, None, 2.0 + rank))(LOSSES),
        r"expected the same divisor of the kept losses on every rank, got \[2.0, 3.0\]",
    )
    weights = torch.tensor([0.4, 0.6]) if rank else torch.tensor([0.6, 0.4])
    disagree(
        lambda: joint(select=lambda *_: Selection(rows, 8, 8, weights, 1.0))(LOSSES),
        "expected the same weights of the kept losses",
    )
    disagree(lambda: joint(select=lambda *_: Selection(rows, 8, 8, weights + rank))(LOSSES), "the same divisor")
    remembering = batchtrim.percentile()
    remembering(torch.full((100 * (1 + rank),), 9.0 * rank), 0.5)
    disagree(lambda: [joint(select=remembering)(torch.arange(16.0)) for _ in range(9)], "the same rows kept")


def failing_rule(rank: int) -> None:
    """A rule that fails on one rank raises its own error there, and one that says so elsewhere."""

    def rule(losses: Tensor, keep: float, generator: Any = None) -> Selection:
        if rank:
            raise ZeroDivisionError("here")
        return batchtrim.hardest()(losses, keep)

    error: Any = ZeroDivisionError if rank else RanksDisagree
    with pytest.raises(error, match=r"here|an error on ranks \[1\]. They report it"):
        joint(select=rule)(LOSSES)
    assert mean(joint()(LOSSES)) == 2.5


def arguments(rank: int) -> None:
    """Arguments that only one rank has, or has in another dtype."""
    late = joint(batchtrim.cosine(), total=9)
    late.step(3 - rank)
    cases: dict[str, Callable[[], Any]] = {
        r"presence of `rank_by` on every rank, got \[False, True\]": lambda: joint()(
            LOSSES, rank_by=-LOSSES if rank else None
        ),
        "dtype of what is ranked by": lambda: joint()(LOSSES, rank_by=(-LOSSES).bfloat16() if rank else -LOSSES),
        "dtype of the losses": lambda: joint()(LOSSES.bfloat16() if rank else LOSSES),
        "presence of class weights": lambda: joint()(Losses(LOSSES, None, torch.ones(4) if rank else None)),
        "number of steps": lambda: late(LOSSES),
        "reduction": lambda: joint()(Losses(LOSSES, reduction="sum" if rank else "mean")),
        "keep fraction": lambda: joint(lambda progress: 0.25 if rank else 0.5, total=3)(LOSSES),
        "settings": lambda: joint(unit="element" if rank else "sample")(LOSSES),
        "setting": lambda: joint(scale="batch" if rank else "kept")(LOSSES),
        "generator state": lambda: joint(select=batchtrim.uniform(), seed=rank)(LOSSES),
    }
    for words, case in cases.items():
        disagree(case, words)


def masked_on_one_rank(rank: int) -> None:
    """A mask on one rank only is allowed: the other rank's samples all count."""
    trim = joint(0.5)
    loss = trim(LOSSES + rank, mask=torch.tensor([True, False, True, True]) if rank else None)
    joined = torch.tensor([0.5, 3.0, 1.0, 2.0, 1.5, 2.0, 3.0])
    assert math.isclose(mean(loss), joined.topk(4).values.mean(), rel_tol=1e-6)  # round(3.5) = 4


def padded_on_one_rank(rank: int) -> None:
    """Losses of several entries count by these; ranks differ in their number, and some may be masked."""
    short, long = LOSSES[:, None].repeat(1, 2), torch.arange(1.0, 21.0).reshape(4, 5)
    mask = torch.arange(5) < torch.tensor([[3], [5], [2], [1]])
    for padding in (None, mask):
        whole = torch.cat([F.pad(short, (0, 3)), long])
        counts = torch.cat([F.pad(torch.ones(4, 2), (0, 3)) > 0, torch.ones(4, 5) > 0 if padding is None else padding])
        own = Losses(long, padding) if rank else Losses(short)
        for keep, rule in ((1.0, batchtrim.hardest()), (0.5, batchtrim.hardest()), (0.45, batchtrim.superquantile())):
            for reduction in ("mean", "sum"):
                own.reduction = reduction
                alone = Trimmer(keep, select=rule)(Losses(whole, counts, reduction=reduction))
                assert math.isclose(mean(joint(keep, select=rule)(own)), alone.item(), rel_tol=1e-6)
            own.reduction = "mean"
            added = batchtrim.losses.flatten(own, "sample") + Losses(LOSSES)
            expected = batchtrim.losses.flatten(Losses(whole, counts), "sample") + Losses(LOSSES.repeat(2))
            alone = Trimmer(keep, select=rule)(expected)
            assert math.isclose(mean(joint(keep, select=rule)(added)), alone.item(), rel_tol=1e-6)


def terms_of_a_sum(rank: int) -> None:
    """Each term of a sum is divided by its own divisor over all ranks."""
    values, mask = torch.arange(1.0, 9.0), torch.tensor([False, True, True, False, True, True, False, True])
    weights = torch.tensor([1.0, 2.0, 1.0, 4.0, 1.0, 1.0, 3.0, 1.0])
    own = slice(0, 3) if rank else slice(3, 8)

    def added(part: slice) -> Losses:
        weighted = Losses(values[part] * weights[part], None, weights[part])
        return Losses(values[part], mask[part]) + weighted + Losses(values[part], reduction="sum") + values[part]

    for scale, rule in itertools.product(("kept", "batch"), (batchtrim.hardest(), batchtrim.superquantile())):
        alone = Trimmer(0.45, scale=scale, select=rule)(added(slice(0, 8))).item()
        assert math.isclose(mean(joint(0.45, scale=scale, select=rule)(added(own))), alone, rel_tol=1e-6)
    disagree(
        lambda: joint()(added(own) if rank else Losses(values)), r"the same number of terms on every rank, got \[0, 4\]"
    )


def entries_of_a_trace(rank: int) -> None:
    """The shared engine counts the entries of its losses, as the exact one does."""
    model, x = nn.Linear(1, 1), torch.arange(1.0, 21.0).reshape(4, 5, 1)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    x = x if rank else x[:, :2]
    criterion, engine = batchtrim.per_sample(nn.L1Loss()), "shared" if rank else "exact"
    loss = batchtrim.TrimmedForward(model, criterion, joint(0.5), engine)(x, torch.zeros_like(x))
    assert math.isclose(mean(loss), (5 * (13 + 18) + 2 * (11.5 + 16.5)) / 14, rel_tol=1e-6)


def without_samples(rank: int) -> None:
    """A rank that has nothing to choose from may lack what the others have."""
    weights = torch.tensor([1.0, 2.0, 1.0, 4.0], dtype=torch.float64)
    losses = LOSSES.double() * weights
    alone = Trimmer(0.5)(Losses(losses, None, weights), rank_by=LOSSES.double()).item()
    nothing = torch.zeros(0, requires_grad=True)
    for empty in (nothing, nothing.half(), torch.ones(3)):
        mask = torch.zeros(3, dtype=torch.bool) if len(empty) else None
        for full in (0, 1):
            if rank == full:
                loss = joint()(Losses(losses, None, weights), rank_by=LOSSES.double())
            else:
                loss = joint()(empty, mask=mask)
                assert loss.item() == 0.0
                assert loss.dtype == empty.dtype
            assert math.isclose(mean(loss), alone)
    loss = joint()(nothing)
    loss.backward()
    assert loss.item() == 0.0, "no rank has any"


def foreign_group(rank: int) -> None:
    group = dist.new_group([0])
    if rank == 0:
        assert joint(process_group=group)(LOSSES).item() == 2.5
    else:
        with pytest.raises(ValueError, match="expected `process_group` to hold this rank, got one without it"):
            joint(process_group=group)
        trim = joint()
        trim.process_group = group
        with pytest.raises(ValueError, match="expected `process_group` to hold this rank"):
            trim(LOSSES)
        with pytest.raises(ValueError, match="expected `process_group` to hold this rank"):
            batchtrim.distributed.sum_over_ranks(torch.ones(1), "number of micro-batches", group)


def half_precision(rank: int) -> None:
    """The sum of 40,000 losses of 5 is beyond float16, their mean is not."""
    for dtype in (torch.float16, torch.bfloat16):
        for scale in ("kept", "batch"):
            for weighted in (False, True):
                losses = torch.full((40_000,), 5.0, dtype=dtype, requires_grad=True)
                loss = joint(0.999, scale=scale)(Losses(losses, None, torch.ones_like(losses) if weighted else None))
                assert loss.dtype == dtype
                assert math.isclose(mean(loss), 5.0, rel_tol=1e-2), (dtype, scale, loss)
                loss.backward()
                assert losses.grad is not None
                assert torch.isfinite(losses.grad).all()


def half_precision_windows(rank: int) -> None:
    step = batchtrim.TrimmedForward(nn.Identity(), lambda outputs, _: outputs, joint(0.5), "exact")
    parts = [(torch.full((20_000,), 5.0).half().requires_grad_(), None) for _ in range(3)]
    for over in ("window", "micro"):
        total = sum(loss.detach().double() for loss in batchtrim.accumulate(step, parts, over))
        assert math.isclose(mean(total), 5.0, rel_tol=1e-2), over  # type: ignore[arg-type]


def model_of(rows: list[int], rank: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a linear model, the same on every rank, and this rank's micro-batches of so many rows."""
    draw = torch.Generator().manual_seed(7 + rank)
    torch.manual_seed(0)
    parts = [(torch.randn(n, 5, generator=draw), torch.randint(0, 3, (n,), generator=draw)) for n in rows]
    return nn.Linear(5, 3), parts


def accumulated(model: nn.Module, parts: Any, over: str, scope: str = "global") -> list[Tensor]:
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), Trimmer(0.5, scope=scope), "exact")
    found = []
    for loss in batchtrim.accumulate(step, parts, over):
        loss.backward()
        found.append(loss.detach())
    return found


def empty_micro_batches(rank: int) -> None:
    for rows in ([0], [0, 0]):
        for over in ("micro", "window"):
            model, parts = model_of(rows, rank)
            assert [loss.item() for loss in accumulated(model, parts, over)] == [0.0] * len(rows)
            assert not any(p.grad is None or p.grad.any() for p in model.parameters())


def uneven_windows(rank: int) -> None:
    """Under DDP, where only backward meets the other ranks, a window may be of any number of micro-batches."""
    every = ([4, 3, 2], [5])
    whole, _ = model_of([], 0)
    x, y = (torch.cat(each) for each in zip(*[part for r in (0, 1) for part in model_of(every[r], r)[1]], strict=True))
    F.cross_entropy(whole(x), y, reduction="none").topk(7).values.mean().backward()
    model, parts = model_of(every[rank], rank)
    accumulated(nn.parallel.DistributedDataParallel(model), parts, "window")
    for mine, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)


def forward_that_waits(rank: int) -> None:
    """Ranks whose forward waits for the others need equal counts, and compare them before they run it."""
    from torch.distributed.fsdp import fully_shard

    ran = []

    def counted(model: nn.Module) -> nn.Module:
        model.register_forward_pre_hook(lambda *_: ran.append(1))
        return model

    for kind in ("fully_shard", "SyncBatchNorm"):
        for over in ("window", "micro"):
            for scope in ("local", "global"):
                model, parts = model_of([4] * (2 - rank), rank)
                model = (
                    counted(fully_shard(model))  # type: ignore[arg-type]
                    if kind == "fully_shard"
                    else counted(nn.Sequential(model, nn.SyncBatchNorm(3)))
                )
                disagree(
                    lambda m=model, p=parts, o=over, s=scope: accumulated(m, p, o, s),
                    "expected the same number of micro-batches on every rank, got 1 to 2, here",
                )
    assert not ran
    whole, _ = model_of([], 0)
    x, y = (torch.cat(each) for each in zip(*[p for r in (0, 1) for p in model_of([4, 3 * r], r)[1]], strict=True))
    F.cross_entropy(whole(x), y, reduction="none").topk(6).values.mean().backward()  # round(5.5) = 6
    model, parts = model_of([4, 3 * rank], rank)
    accumulated(fully_shard(model), parts, "window")  # type: ignore[arg-type]
    for mine, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), expected.grad)  # type: ignore[union-attr]


def other_collectives(rank: int) -> None:
    """A rank that is elsewhere: gloo would abort the process where the sizes differ."""
    model, parts = model_of([4, 4], rank)
    words = "expected the same collective on every rank, got "
    disagree(lambda: accumulated(model, parts, "micro" if rank else "window"), words)
    log = KeepLog(4, distributed=True)
    disagree(lambda: log.end_epoch() if rank else joint()(LOSSES), words + r"\['choice of samples', 'keep log'\]")
    disagree(lambda: accumulated(model, parts, "micro") if rank else joint()(LOSSES), words)


def recorded(batches: int, n: int = 4, **options: Any) -> KeepLog:
    log = KeepLog(n, distributed=True, **options)
    for _ in range(batches):
        log.record(Choice(LOSSES, batchtrim.hardest()(LOSSES, 0.5)), ids=torch.arange(4))
    return log


def keep_logs(rank: int) -> None:
    words = "batches recorded since the last epoch"
    disagree(recorded(rank).end_epoch, rf"expected the same number of {words} on every rank, got \[0, 1\]")
    disagree(recorded(3 + rank).end_epoch, words)
    disagree(lambda: recorded(70 * rank).end_epoch(), words)  # one is entered while the epoch goes on
    disagree(lambda: recorded(64 + 2 * rank).end_epoch(), words)
    disagree(recorded(1, n=4 + rank).end_epoch, r"expected the same number of samples, n, on every rank, got \[4, 5\]")
    disagree(recorded(1, classes=2 + rank).end_epoch, "number of classes")
    log = recorded(2)
    assert log.end_epoch()["seen"] == 16
    assert log.end_epoch()["seen"] == 16, "called again, by a callback, say"
    assert len(log.history) == 1
    wide = KeepLog(4, distributed=True)
    outputs = F.one_hot(torch.tensor([1, 2, 3, 39_999]), 40_000).float()[:, : 4 + 39_996 * rank]
    wide.record(
        Choice(LOSSES, batchtrim.hardest()(LOSSES, 0.5)), ids=torch.arange(4), outputs=outputs if rank else None
    )
    wide.end_epoch()
    assert wide.table()["predicted"].tolist() == [1, 2, 3, 39_999]


def other_numbers_of_calls(rank: int) -> None:
    group = dist.new_group(timeout=SOON)
    dist.barrier()
    trim = joint(process_group=group)
    for _ in range(2):
        assert trim(LOSSES).item() >= 0
    if rank == 0:
        with pytest.raises(RanksDisagree, match="does not call its trimmer as often"):
            trim(LOSSES)


def other_groups(rank: int) -> None:
    """The same two ranks, but each waits in another group."""
    groups = [dist.new_group(timeout=SOON), dist.new_group(timeout=SOON)]
    dist.barrier()
    with pytest.raises(RanksDisagree, match="got no matching answer"):
        joint(process_group=groups[rank])(LOSSES)


def main(rank: int, ranks: int, store: str, cases: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit)
    for case in re.split(r"\W+", cases):
        print(case, flush=True)
        globals()[case](rank)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
