"""All methods in one table: every method the lab can train with is one row of ``METHODS``.

A row builds a :class:`batchtrim.lab.methods.base.Method` for the training loop. Each row has a card in
docs/methods with its rule, cost and source, and when not to use it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import batchtrim
from batchtrim import Trimmer
from batchtrim._checks import check_count, check_fraction, check_keep, check_positive, check_progress
from batchtrim.lab.files import look_up
from batchtrim.lab.methods.base import (
    EveryStep,
    FocalLoss,
    InfoBatch,
    Interrupted,
    Method,
    Reweighted,
    RhoLoss,
    RunInfo,
    Shortened,
    SuperLoss,
)
from batchtrim.lab.methods.relatives_table import RELATIVES
from batchtrim.lab.methods.spec import (
    MethodSpec,
    Param,
    Params,
    check_count_or_zero,
    check_not_negative,
)


def make_schedule(name: str, start: float, end: float) -> Callable[[float], float]:
    """Return the keep schedule of a run's ``schedule``, ``keep_start`` and ``keep_end``.

    ``step`` falls in three levels, the middle one halfway; ``constant`` is ``end`` throughout.
    """
    if name == "linear":
        return batchtrim.linear(start, end)
    if name == "cosine":
        return batchtrim.cosine(start, end)
    if name == "step":
        return batchtrim.schedules.step({1 / 3: (start + end) / 2, 2 / 3: end}, start=start)
    return batchtrim.constant(end)


def _scheduled(rule: Callable[[Params], Any]) -> Callable[[RunInfo, Params], Method]:
    """Return a method that follows the run's keep schedule with some selection rule."""

    def build(info: RunInfo, params: Params) -> Method:
        trim = Trimmer(info.keep, total=info.epochs, select=rule(params), seed=info.seed)
        return Method(trim, info.epochs)

    return build


def _small_loss(info: RunInfo, params: Params) -> Method:
    """Keep the easiest 1 - rate * min(1, e / ramp) in epoch e."""
    rate, ramp, last = params["noise_rate"], params["ramp_epochs"], info.epochs - 1
    if last == 0:
        keep: Any = 1.0
    elif ramp >= last:
        keep = batchtrim.linear(1.0, 1.0 - rate * last / ramp)
    else:
        keep = batchtrim.piecewise({0.0: 1.0, ramp / last: 1.0 - rate})
    return Method(Trimmer(keep, total=info.epochs, select=batchtrim.easiest()), info.epochs)


def _selective_backprop_topk(info: RunInfo, params: Params) -> Method:
    if params["start"] >= params["end"]:
        raise ValueError(
            "expected `selective_backprop_topk.start` to be less than `end`, "
            f"got {params['start']:g} and {params['end']:g}."
        )
    total = info.epochs * info.batches
    keep = Interrupted(total=total, **params)
    trim = Trimmer(keep, total=total, select=batchtrim.percentile_topk(), seed=info.seed)
    return EveryStep(trim, info.epochs)


def _equal_compute(info: RunInfo, params: Params) -> Method:
    """Return plain training that stops after as many backward samples as ``trim`` uses with the run's schedule."""
    trim = Trimmer(info.keep, total=info.epochs)
    whole, rest = divmod(info.samples, info.batch_size)
    budget = 0
    for _ in range(info.epochs):
        budget += whole * batchtrim.keep_count(trim.keep, info.batch_size)
        budget += batchtrim.keep_count(trim.keep, rest)
        trim.step()
    return Shortened(budget, info)


_check_tau = functools.partial(check_not_negative, hint="0 stands for log(classes).")

_SPECS = (
    MethodSpec("full", "mean of all losses", "plain training", lambda s, p: Method(Trimmer(1.0), s.epochs)),
    MethodSpec(
        "full_equal_compute",
        "plain training with as many backward samples as trim, learning rate fully decayed",
        "control; arXiv 2307.06440",
        _equal_compute,
        uses_schedule=True,
    ),
    MethodSpec(
        "trim",
        "the hardest q of the batch, q falling along the schedule",
        "arXiv 2110.13058",
        _scheduled(lambda p: batchtrim.hardest()),
        uses_schedule=True,
    ),
    MethodSpec(
        "random",
        "as many samples as trim, drawn at random",
        "control; arXiv 2111.12621",
        _scheduled(lambda p: batchtrim.uniform()),
        uses_schedule=True,
    ),
    MethodSpec(
        "ordered_sgd",
        "the hardest q, q falling as training accuracy rises",
        "arXiv 1907.04371",
        lambda s, p: Method(Trimmer(batchtrim.by_accuracy()), s.epochs),
    ),
    MethodSpec(
        "superquantile",
        "the mean above the (1 - q) quantile, the boundary sample by its fraction",
        "CVaR; Rockafellar and Uryasev 2000",
        lambda s, p: Method(Trimmer(p["keep"], select=batchtrim.superquantile()), s.epochs),
        {"keep": Param(0.5, check_keep, "tail fraction q")},
    ),
    MethodSpec(
        "ohem",
        "losses above a threshold, but at least a minimum number of the hardest",
        "arXiv 1604.03540",
        lambda s, p: Method(Trimmer(1.0, select=batchtrim.selection.above(p["threshold"], p["min_keep"])), s.epochs),
        {
            "threshold": Param(0.357, check_positive, "loss above which a sample is kept (-ln 0.7)"),
            "min_keep": Param(8, check_count, "minimum number kept of a batch"),
        },
    ),
    MethodSpec(
        "selective_backprop",
        "each sample kept with probability (percentile among recent losses) ^ beta",
        "arXiv 1910.00762",
        lambda s, p: Method(Trimmer(1.0, select=batchtrim.percentile(p["beta"], p["history"]), seed=s.seed), s.epochs),
        {
            "beta": Param(2.0, check_not_negative, "exponent; 1 / (beta + 1) of the samples are kept"),
            "history": Param(1024, check_count, "recent losses that the percentile refers to"),
        },
    ),
    MethodSpec(
        "selective_backprop_topk",
        "a percentile-weighted draw of half the batch, on every second step in mid-training",
        "MosaicML Composer",
        _selective_backprop_topk,
        {
            "keep": Param(0.5, check_keep, "fraction of the batch kept on a selective step"),
            "start": Param(0.5, check_progress, "progress at which selection begins"),
            "end": Param(0.9, check_progress, "progress at which it ends"),
            "every": Param(2, check_count, "steps from one selective step to the next"),
        },
    ),
    MethodSpec(
        "small_loss",
        "the easiest samples; the dropped fraction rises to the noise rate",
        "arXiv 1804.06872",
        _small_loss,
        {
            "noise_rate": Param(0.2, check_fraction, "expected fraction of wrong labels"),
            "ramp_epochs": Param(10, check_count, "epochs until that fraction is dropped"),
        },
    ),
    MethodSpec(
        "two_sided",
        "the hardest skipped, the next q kept, q falling along the schedule",
        "batchtrim",
        _scheduled(lambda p: batchtrim.between(p["skip"])),
        {"skip": Param(0.1, check_fraction, "fraction dropped from the hard end")},
        uses_schedule=True,
    ),
    MethodSpec(
        "focal",
        "losses weighted by (1 - p) ^ gamma",
        "arXiv 1708.02002",
        lambda s, p: Reweighted(FocalLoss(p["gamma"]), s.epochs),
        {"gamma": Param(2.0, check_not_negative, "0 is plain training")},
        any_engine=False,
        smoothing=False,
    ),
    MethodSpec(
        "superloss",
        "hard samples get less weight, in closed form",
        "Castells et al., NeurIPS 2020",
        lambda s, p: Reweighted(SuperLoss(p["tau"] or math.log(s.classes), p["lam"]), s.epochs),
        {
            "lam": Param(1.0, check_positive, "the larger, the closer to plain training"),
            "tau": Param(0.0, _check_tau, "loss between easy and hard; 0 is log(classes)"),
        },
        any_engine=False,
        smoothing=False,
    ),
    MethodSpec(
        "infobatch",
        "each epoch, samples below the mean loss are dropped at random, and the rest of them get more weight",
        "arXiv 2303.04947",
        lambda s, p: InfoBatch(s, p["ratio"], p["anneal"]),
        {
            "ratio": Param(0.5, check_fraction, "probability that an easy sample is dropped"),
            "anneal": Param(0.125, check_fraction, "last part of training, on all samples"),
        },
        any_engine=False,
    ),
    MethodSpec(
        "rho_loss",
        "the hardest by loss minus a held-out network's loss",
        "arXiv 2206.07137",
        lambda s, p: RhoLoss(s, p["keep"], p["reference_epochs"]),
        {
            "keep": Param(0.1, check_keep, "fraction of the batch kept"),
            "reference_epochs": Param(0, check_count_or_zero, "epochs of the held-out networks; 0 means the run's"),
        },
        any_engine=False,
    ),
)

METHODS: dict[str, MethodSpec] = {row.name: row for row in (*_SPECS, *RELATIVES)}


def find_method(name: str) -> MethodSpec:
    """Return the row of that name, or an error that suggests the nearest one."""
    return look_up("method", name, METHODS)
