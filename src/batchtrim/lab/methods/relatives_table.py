"""Rows of the table of methods: loss mass, trimming that starts late or ends early, and methods since 2025."""

from __future__ import annotations

import math
from collections.abc import Callable

import batchtrim
from batchtrim import Trimmer
from batchtrim._checks import check_count, check_fraction, check_keep, check_ordered, check_part
from batchtrim.lab.methods.base import Method, RunInfo
from batchtrim.lab.methods.relatives import Decaying, FullEnd, GradientNorm, LossDrop, ProxySelection, UnlessFull
from batchtrim.lab.methods.spec import MethodSpec, Param, Params, check_count_or_zero, check_open_interval
from batchtrim.schedules import join

__all__ = ["RELATIVES"]


def _trim_late(info: RunInfo, params: Params) -> Method:
    """Keep everything until ``start``, then follow the run's whole schedule."""
    start = params["start"]
    keep = info.keep if start == 0.0 else join([batchtrim.constant(1.0), info.keep], at=[start])
    return Method(Trimmer(keep, total=info.epochs), info.epochs)


def _trim_full_end(info: RunInfo, params: Params) -> Method:
    """Follow the run's whole schedule, then keep all samples in the last part, at least one epoch."""
    epochs = info.epochs
    trimmed = epochs - max(1, round(params["last"] * epochs))
    keep = info.keep if trimmed > 0 else batchtrim.constant(1.0)
    if trimmed > 0:
        keep = join([keep, batchtrim.constant(1.0)], at=[(trimmed - 0.5) / (epochs - 1)])
    return Method(Trimmer(keep, total=epochs), epochs)


def _loss_mass(scale: str, control: bool = False) -> Callable[[RunInfo, Params], Method]:
    def build(info: RunInfo, params: Params) -> Method:
        check_ordered("loss_mass.at_least", params["at_least"], "at_most", params["at_most"])
        mass = batchtrim.loss_mass(params["skip"], params["at_least"], params["at_most"])
        rule = batchtrim.uniform(like=mass) if control else mass
        return Method(Trimmer(params["share"], select=rule, scale=scale, seed=info.seed), info.epochs)

    return build


_MASS_PARAMS = {
    "share": Param(0.9, check_keep, "share of the batch's loss that is kept"),
    "skip": Param(0.0, check_fraction, "fraction of the batch dropped from the hard end first"),
    "at_least": Param(0.0, check_part, "smallest fraction of the batch kept"),
    "at_most": Param(1.0, check_keep, "largest fraction of the batch kept"),
}


def _dropout(matched: bool) -> Callable[[RunInfo, Params], Method]:
    """Drop samples progressively: by difficulty, or as many at random."""

    def build(info: RunInfo, params: Params) -> Method:
        threshold = batchtrim.selection.above(-math.log(params["threshold"]))
        rule = UnlessFull(batchtrim.uniform(like=threshold) if matched else threshold)
        # keep 0.5 stands for "by the rule", which does not read it
        keep = FullEnd(batchtrim.constant(0.5), info.epochs, min(info.epochs, params["last"]))
        return Method(Trimmer(keep, total=info.epochs, select=rule, seed=info.seed), info.epochs)

    return build


def _dropout_scalar(info: RunInfo, params: Params) -> Method:
    keep = FullEnd(Decaying(params["decay"], info.epochs), info.epochs, min(info.epochs, params["last"]))
    return Method(Trimmer(keep, total=info.epochs, select=batchtrim.uniform(), seed=info.seed), info.epochs)


_LAST = Param(1, check_count, "last epochs, on all samples")
_DROPOUT_PARAMS = {
    "threshold": Param(0.3, check_open_interval, "probability of the true class from which a sample is dropped"),
    "last": _LAST,
}


RELATIVES = (
    MethodSpec(
        "loss_mass",
        "the fewest samples that hold a share of the batch's loss; divided by the batch size",
        "batchtrim",
        _loss_mass("batch"),
        _MASS_PARAMS,
    ),
    MethodSpec(
        "loss_mass_kept",
        "the samples of loss_mass, their losses averaged as in the paper",
        "batchtrim",
        _loss_mass("kept"),
        _MASS_PARAMS,
    ),
    MethodSpec(
        "loss_mass_random",
        "as many samples as loss_mass would keep of the batch, drawn at random",
        "control",
        _loss_mass("kept", control=True),
        _MASS_PARAMS,
    ),
    MethodSpec(
        "trim_late",
        "all samples at first, then trim's schedule in the rest of training",
        "batchtrim",
        _trim_late,
        {"start": Param(0.5, check_fraction, "progress at which the schedule starts")},
        uses_schedule=True,
    ),
    MethodSpec(
        "trim_full_end",
        "trim, then all samples in the last part of training",
        "batchtrim",
        _trim_full_end,
        {"last": Param(0.125, check_part, "last part of training, on all samples; at least one epoch")},
        uses_schedule=True,
    ),
    MethodSpec(
        "data_dropout",
        "samples whose true class has a probability below a threshold; all samples in the last epoch",
        "arXiv 2505.22342 (DBPD)",
        _dropout(matched=False),
        _DROPOUT_PARAMS,
    ),
    MethodSpec(
        "data_dropout_matched",
        "as many samples of the batch as data_dropout would keep, drawn at random",
        "arXiv 2505.22342 (SMRD)",
        _dropout(matched=True),
        _DROPOUT_PARAMS,
    ),
    MethodSpec(
        "data_dropout_scalar",
        "samples drawn at random, fewer by a factor each epoch; all samples in the last epoch",
        "arXiv 2505.22342 (SRD)",
        _dropout_scalar,
        {"decay": Param(0.95, check_keep, "factor on the kept fraction, each epoch"), "last": _LAST},
    ),
    MethodSpec(
        "proxy",
        "the hardest samples by the losses of a narrower proxy network; the network sees no others",
        "the airbench96 speed record of 2025",
        lambda s, p: ProxySelection(s, p["keep"], p["width"], p["every"]),
        {
            "keep": Param(0.5, check_keep, "fraction of the batch the network trains on"),
            "width": Param(0, check_count_or_zero, "channels of the proxy's first stage; 0 is half the network's"),
            "every": Param(4, check_count, "steps from one step of the proxy to the next"),
        },
        any_engine=False,
    ),
    MethodSpec(
        "gradient_norm",
        "draws by the norm of the gradient at the outputs, weighted so that the expected loss is the mean",
        "arXiv 1803.00942",
        lambda s, p: GradientNorm(s, p["keep"]),
        {"keep": Param(0.5, check_keep, "draws, as a fraction of the batch")},
        any_engine=False,
    ),
    MethodSpec(
        "loss_drop",
        "the samples whose loss has fallen furthest below their first loss are dropped",
        "TailSFT, 2026",
        lambda s, p: LossDrop(s, p["drop"]),
        {"drop": Param(0.5, check_fraction, "fraction of the batch dropped, from the second epoch on")},
        any_engine=False,
    ),
)
