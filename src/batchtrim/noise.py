"""Detect that trimming concentrates on wrong labels: counts of each epoch, and the rules that read them.

There are two signs. First, the network's most confident predictions contradict random wrong labels; they rarely
contradict people's mistakes, which occur on ambiguous images. Second, samples with wrong labels of either kind stay
the hardest however often they are trained on; on clean data, other samples become the hardest. The numbers below were
chosen on runs with seeds 0 and 1 and tried on others: ``studies/noise_warning.py``.

Legend: P entries of a log that are processed together.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["NoiseAmplified"]

# A prediction is confident if it is in the most confident quarter. This is relative, because a network that trains on
# the hardest samples is unsure of everything. A label is in doubt if such a prediction contradicts it.
CONFIDENT_PART = 0.25
# The first sign: at least this fraction of the kept samples is in doubt, and this many times the minimum so far.
DOUBT_AT_LEAST, DOUBT_RISES = 0.05, 1.5
DOUBT_SAMPLES = 20  # fewer than these in an epoch are no evidence
# The second: the hardest tenth of an epoch stays the hardest by this much more than the easiest tenth stays the
# easiest, over all epochs that kept less than STAY_BELOW. It is judged once no more than STAY_JUDGED is kept.
EXTREME_PART = 0.1
STAY_EXCESS = 0.115
STAY_BELOW, STAY_JUDGED = 0.6, 0.4
STAY_SAMPLES = 1500  # with fewer, chance alone may cause it
HARD_KEPT = 0.8  # at least this share of the hardest is kept: a rule that leaves them out, or draws, amplifies nothing


class NoiseAmplified(UserWarning):
    """Warns that more and more of the kept samples have labels that look wrong."""


def surest(confidence: Tensor, judged: Tensor) -> Tensor:
    """Return bool (P,), True for the most confident part of the predictions; the cut is found on the device."""
    values = torch.where(judged, confidence, -1.0)
    last = (judged.sum() * CONFIDENT_PART).ceil().long().clamp(min=1) - 1
    cut = torch.sort(values, descending=True).values.gather(0, last.view(1))
    return judged & (values >= cut)


def stays(before: Tensor, now: Tensor, compared: Tensor, kept: Tensor) -> Tensor:
    """Count the samples that stay among the hardest or the easiest tenth.

    Args:
        before, now: losses (P,) at the previous visit and at this one.
        compared: bool (P,), True for samples that have both.
        kept: bool (P,).

    Returns:
        int64 (6,): samples hardest before, and of these hardest now; easiest before, and of these easiest now;
        hardest now, and of these kept.
    """
    count = compared.sum()
    k = (count * EXTREME_PART).ceil().long().clamp(min=1)
    hard, easy = [], []
    for losses in (before, now):
        rising = torch.sort(torch.where(compared, losses, torch.inf)).values
        hard.append(compared & (losses >= rising.gather(0, (count - k).clamp(min=0).view(1))))
        easy.append(compared & (losses <= rising.gather(0, (k - 1).view(1))))
    parts = [hard[0], hard[0] & hard[1], easy[0], easy[0] & easy[1], hard[1], hard[1] & kept]
    return torch.stack([part.sum() for part in parts])


def warn_of(history: Sequence[dict[str, Any]], stacklevel: int) -> bool:
    """Warn if the last epoch of a log's history shows signs of wrong labels; return True if it does."""
    found = sign(history)
    if found is not None:
        warnings.warn(
            f"{found}: with keep at {history[-1]['keep']:.2g} trimming trains more and more on labels that look wrong."
            " Inspect them with batchtrim.suspects(log), and leave out the very hardest with "
            "Trimmer(select=batchtrim.between(skip=...)), which is two_sided in the lab.",
            NoiseAmplified,
            stacklevel=stacklevel,
        )
    return found is not None


def sign(history: Sequence[dict[str, Any]]) -> str | None:
    """Describe the sign of wrong labels in the last epoch of a log's history; None if there is none."""
    line = history[-1]
    if doubt_rises(history):
        return (
            f"of the samples kept in this epoch {line['doubt_kept']:.0%} carry a label that the model confidently "
            f"contradicts, against {line['doubt']:.0%} of all"
        )
    if hardest_stay(history):
        return (
            f"the hardest tenth of the samples stay the hardest ({line['stay_hard']:.0%} in this epoch) more than "
            f"the easiest stay the easiest ({line['stay_easy']:.0%}), however often they are trained on"
        )
    return None


def doubt_rises(history: Sequence[dict[str, Any]]) -> bool:
    """True if the kept samples in doubt rose up to the last epoch of a log's ``history``.

    On clean data the fraction of kept samples in doubt falls as the network learns; with random wrong labels it falls
    first and then rises while keep falls.
    """
    if not _falls(history):
        return False
    line = history[-1]
    least = min(each["doubt_kept"] for each in history[:-1] if each["doubt_kept"] is not None)
    enough = line["doubt_kept"] * line["kept"] >= DOUBT_SAMPLES
    return enough and line["doubt_kept"] >= max(DOUBT_AT_LEAST, DOUBT_RISES * least)


def hardest_stay(history: Sequence[dict[str, Any]]) -> bool:
    """True if, as keep falls, the hardest samples stay the hardest more often than the easiest stay the easiest."""
    if not _falls(history) or history[-1]["keep"] > STAY_JUDGED:
        return False
    if history[-1]["stay_hard"] is None or history[-1]["stay_easy"] is None:
        return False
    samples, excess = stay_excess(history)
    return samples >= STAY_SAMPLES and excess >= STAY_EXCESS


def stay_excess(history: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """Return how much larger the fraction that stays is among the hardest than among the easiest, over late epochs.

    The first number is that of the samples compared; 0 if a rule leaves the hardest out.
    """
    lines = [line for line in history if _compares(line) and line["keep"] < STAY_BELOW]
    samples = sum(line["compared"] for line in lines)
    if not samples or min(line["hard_kept"] for line in lines) < HARD_KEPT:
        return 0, 0.0
    return samples, sum(line["compared"] * (line["stay_hard"] - line["stay_easy"]) for line in lines) / samples


def _compares(line: dict[str, Any]) -> bool:
    """True if an epoch has a hardest and an easiest part: not if it saw nothing, or losses are NaN."""
    return all(line.get(name) is not None for name in ("keep", "compared", "stay_hard", "stay_easy", "hard_kept"))


def _falls(history: Sequence[dict[str, Any]]) -> bool:
    """True if less is kept than before, and predictions and labels were recorded."""
    before = [line["keep"] for line in history[:-1] if line["doubt_kept"] is not None]
    return bool(before) and history[-1]["doubt_kept"] is not None and history[-1]["keep"] < max(before)
