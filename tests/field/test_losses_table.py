"""Every combination of criterion, reduction, class weights, ignored targets, mask, ranking, unit, scale and dtype.

Against the definition written out in plain torch: with e the un-reduced losses (weights multiplied in), w the weights
and m what counts, "mean" is ``sum(m e) / sum(m w)``, "sum" is ``sum(m e)``, "batchmean" is ``sum(m e) / samples``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchtrim import Trimmer, keep_count, per_sample

B, C = 8, 4
IGNORED = 2
WEIGHT = torch.tensor([1.0, 3.0, 0.5, 2.0])
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kind:
    """A criterion: its module, its function, and the form of its targets."""

    module: Any
    function: Any
    targets: str  # "classes", "soft", "real", "zero-one", "sign" or "chances"
    shape: tuple[int, ...] = ()  # of a sample, without the classes


KINDS = {
    "ce": Kind(nn.CrossEntropyLoss, F.cross_entropy, "classes"),
    "ce pixels": Kind(nn.CrossEntropyLoss, F.cross_entropy, "classes", (3, 2)),
    "ce soft": Kind(nn.CrossEntropyLoss, F.cross_entropy, "soft"),
    "nll": Kind(nn.NLLLoss, F.nll_loss, "classes"),
    "nll pixels": Kind(nn.NLLLoss, F.nll_loss, "classes", (3, 2)),
    "bce logits": Kind(nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, "zero-one", (5,)),
    "mse": Kind(nn.MSELoss, F.mse_loss, "real", (5,)),
    "l1 images": Kind(nn.L1Loss, F.l1_loss, "real", (2, 3)),
    "l1 numbers": Kind(nn.L1Loss, F.l1_loss, "real"),
    "huber": Kind(nn.HuberLoss, F.huber_loss, "real", (5,)),
    "smooth l1": Kind(nn.SmoothL1Loss, F.smooth_l1_loss, "real", (5,)),
    "poisson": Kind(nn.PoissonNLLLoss, F.poisson_nll_loss, "zero-one", (5,)),
    "soft margin": Kind(nn.SoftMarginLoss, F.soft_margin_loss, "sign", (5,)),
    "kl": Kind(nn.KLDivLoss, F.kl_div, "chances", (5,)),
}


def batch(kind: Kind, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    outputs = torch.randn(B, *((C,) if kind.targets in ("classes", "soft") else ()), *kind.shape)
    if kind.function is F.nll_loss:
        outputs = outputs.log_softmax(1)
    if kind.targets == "classes":
        targets = torch.randint(0, C, (B, *kind.shape))
        targets[0] = IGNORED
        return outputs.to(dtype), targets
    targets = torch.randn_like(outputs)
    if kind.targets in ("soft", "chances"):
        targets = targets.softmax(1)
        outputs = outputs.log_softmax(1) if kind.targets == "chances" else outputs
    elif kind.targets == "zero-one":
        targets = (targets > 0).float()
    elif kind.targets == "sign":
        targets = targets.sign()
    if kind.targets != "soft":
        targets[0] = IGNORED
        targets.flatten()[-2:] = IGNORED
    return outputs.to(dtype), targets.to(dtype)


def by_hand(
    kind: Kind, outputs: Tensor, targets: Tensor, weighted: bool, ignoring: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """e, w, m and the losses without class weights, each (B, P) and in float64."""
    options: dict[str, Any] = {"weight": WEIGHT.double()} if weighted else {}
    plain_options: dict[str, Any] = {}
    if kind.targets == "classes" and ignoring:
        options["ignore_index"] = plain_options["ignore_index"] = IGNORED
    wanted = targets if kind.targets == "classes" else targets.double()
    e = kind.function(outputs.double(), wanted, reduction="none", **options)
    plain = kind.function(outputs.double(), wanted, reduction="none", **plain_options)
    m = targets != IGNORED if ignoring else torch.ones_like(e, dtype=torch.bool)
    w = torch.ones_like(e)
    if weighted and kind.targets == "classes":
        w = WEIGHT.double()[targets]
    return tuple(each.reshape(B, -1) for each in (e, w, m, plain))  # type: ignore[return-value]


def expected(e: Tensor, w: Tensor, m: Tensor, kept: Tensor, reduction: str, scale: str, samples: int) -> Tensor:
    total = torch.where(m & kept, e, 0.0).sum()
    if reduction == "sum":
        return total
    among = m & kept if scale == "kept" else m
    if reduction == "batchmean":
        return total / int(among.any(1).sum()) if scale == "kept" else total / samples
    return total / torch.where(among, w, 0.0).sum()


def make(kind: Kind, form: str, reduction: str, weighted: bool, ignoring: bool) -> Any:
    options: dict[str, Any] = {"reduction": reduction}
    if weighted:
        options["weight"] = WEIGHT
    if ignoring and kind.targets == "classes":
        options["ignore_index"] = IGNORED
    return kind.module(**options) if form == "module" else functools.partial(kind.function, **options)


def combinations() -> list[Any]:
    """All of them; of each criterion, reduction and unit one in every run, each time with other switches."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for number, ((name, kind), reduction, weighted, ignoring, masked, ranked, unit) in enumerate(
        product(KINDS.items(), ("mean", "sum", "batchmean", "none"), *[(False, True)] * 4, ("sample", "element"))
    ):
        if (weighted and kind.targets not in ("classes", "soft")) or (ignoring and kind.targets == "soft"):
            continue
        if reduction == "batchmean" and kind.function is not F.kl_div:
            continue
        form = ("module", "partial")[bin(number).count("1") % 2]  # half of all combinations, of every setting
        switches = {"weight": weighted, "ignore": ignoring, "mask": masked, "rank_by": ranked}
        label = "-".join([name, form, reduction, unit, *(switch for switch, on in switches.items() if on)])
        case = pytest.param(kind, form, reduction, weighted, ignoring, masked, ranked, unit, id=label)
        groups.setdefault((name, reduction, unit), []).append(case)
    found = []
    for number, cases in enumerate(groups.values()):
        default = 5 * number % len(cases)  # 5 shares no factor with 4, 8 or 16 cases
        found += [
            case if at == default else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
            for at, case in enumerate(cases)
        ]
    return found


NAMES = ("kind", "form", "reduction", "weighted", "ignoring", "masked", "ranked", "unit")


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")  # of KLDivLoss, by torch
@pytest.mark.parametrize(NAMES, combinations())
def test_what_was_asked_for_is_done(
    kind: Kind, form: str, reduction: str, weighted: bool, ignoring: bool, masked: bool, ranked: bool, unit: str
) -> None:
    criterion = make(kind, form, reduction, weighted, ignoring)
    explicit = IGNORED if ignoring and kind.targets != "classes" else None
    if reduction == "batchmean" and unit == "element":
        with pytest.raises(ValueError, match="'mean' or 'sum' with unit='element', got 'batchmean'"):
            per_sample(criterion, unit=unit)
        return
    for dtype in (torch.float32, torch.float64, HALF[masked]):
        outputs, targets = batch(kind, dtype)
        if weighted:
            criterion = make(kind, form, reduction, weighted, ignoring)
            bound = criterion if form == "module" else criterion.keywords
            if form == "module":
                bound.to(dtype)
            else:
                bound["weight"] = WEIGHT.to(dtype)
        wrapped = per_sample(criterion, unit=unit, ignore_index=explicit)
        e, w, m, plain = by_hand(kind, outputs, targets, weighted, ignoring)
        for keep, scale in ((1.0, "kept"), (1.0, "batch"), (0.5, "kept"), (0.5, "batch")):
            leaf, reference = outputs.clone().requires_grad_(), outputs.clone().double().requires_grad_()
            losses = wrapped(leaf, targets)
            given: dict[str, Any] = {}
            counted = m
            if masked:
                mask = torch.rand(losses.values.shape) > 0.3
                mask[2:5] = True
                given["mask"] = mask
                counted = m & mask.reshape(B, -1)
            if ranked:
                sample_means = torch.where(counted, plain, 0.0).sum(1) / counted.sum(1).clamp(min=1)
                by = sample_means if unit == "sample" else plain
                given["rank_by"] = by.to(dtype).detach().reshape(losses.values.shape)
            trim = Trimmer(keep, unit=unit, scale=scale)
            loss = trim(losses, **given)
            selection = trim.last_selection
            kept = selection.mask().reshape(B, -1)
            own = by_hand(kind, reference, targets, weighted, ignoring)[0]
            samples = int(counted.any(1).sum())
            right = expected(own, w, counted, kept, "mean" if reduction == "none" else reduction, scale, samples)
            tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
            assert loss.dtype == losses.values.dtype
            torch.testing.assert_close(loss.double(), right, rtol=tolerance, atol=tolerance)
            candidates = samples if unit == "sample" else int(counted.sum())
            assert selection.candidates == candidates
            assert selection.k == keep_count(keep, candidates)
            if keep == 1.0 and not masked:
                assert_own(criterion, losses, outputs, targets, explicit, tolerance)
            if dtype not in HALF:
                loss.backward()
                right.backward()
                torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)
                if unit == "sample" and kind.shape:
                    assert_hardest(reduction, e, w, counted, kept, given.get("rank_by"))


def assert_hardest(reduction: str, e: Tensor, w: Tensor, counted: Tensor, kept: Tensor, rank_by: Tensor | None) -> None:
    """The kept samples are the hardest by the mean of what counts, its sum, or what they were ranked by."""
    ranks = torch.where(counted, e, 0.0).sum(1)
    if reduction not in ("sum", "batchmean"):
        ranks = ranks / torch.where(counted, w, 0.0).sum(1).clamp(min=1e-9)
    if rank_by is not None:
        ranks = rank_by.double()
    highest = ranks[~kept.any(1) & counted.any(1)]
    assert not len(highest) or ranks[kept.any(1)].min() >= highest.max() - 1e-6


def assert_own(
    criterion: Any, losses: Any, outputs: Tensor, targets: Tensor, explicit: int | None, tolerance: float
) -> None:
    """Keeping everything equals what the criterion itself says."""
    own = criterion(outputs, targets)
    if own.ndim or explicit is not None:
        return
    torch.testing.assert_close(losses.mean().double(), own.double(), rtol=2 * tolerance, atol=2 * tolerance)
