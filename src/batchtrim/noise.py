"""Detect that trimming trains ever more on wrong labels: the counts of each epoch, and the rule that reads them.

There are two signs. First, the network's surest predictions contradict random wrong labels; they rarely contradict
people's mistakes, which are made where an image is hard to tell. Second, samples with wrong labels of either kind stay
the hardest however often they are trained on; on clean data, other samples become the hardest. The numbers below were
chosen on runs with seeds 0 and 1 and tried on others: ``studies/noise_warning.py``.

Legend: P entries of a log that are entered together.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["NoiseAmplified"]

# A prediction is confident if it is in the surest quarter. Relative, because a network that trains on the hardest
# samples is unsure of everything. A label is in doubt where such a prediction contradicts it.
CONFIDENT_PART = 0.25
# The first sign: at least this part of the kept samples is in doubt, and this many times the least so far.
DOUBT_AT_LEAST, DOUBT_RISES = 0.05, 1.5
DOUBT_SAMPLES = 20  # fewer than these in an epoch are no evidence
# The second: the hardest tenth of an epoch stays the hardest by this much more than the easiest tenth stays the
# easiest, over all epochs that kept less than STAY_BELOW. It is judged once no more than STAY_JUDGED is kept.
EXTREME_PART = 0.1
STAY_EXCESS = 0.115
STAY_BELOW, STAY_JUDGED = 0.6, 0.4
STAY_SAMPLES = 1500  # with fewer, chance alone may do it
HARD_KEPT = 0.8  # of the hardest, at least: a rule that leaves them out, or draws, amplifies nothing


class NoiseAmplified(UserWarning):
    """The samples that are kept are more and more those whose labels look wrong."""


def surest(confidence: Tensor, judged: Tensor) -> Tensor:
    """Return bool (P,), True for the most confident part of the predictions; the cut is found on the device."""
    values = torch.where(judged, confidence, -1.0)
    last = (judged.sum() * CONFIDENT_PART).ceil().long().clamp(min=1) - 1
    cut = torch.sort(values, descending=True).values.gather(0, last.view(1))
    return judged & (values >= cut)


def stays(before: Tensor, now: Tensor, compared: Tensor, kept: Tensor) -> Tensor:
    """Return int64 (6,): of losses ``before`` and ``now`` (P,), how many were and are the hardest; the same for the
    easiest; how many are the hardest, and are kept. ``compared``: bool (P,), which have both."""  # fmt: skip
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
    """Warn where the last epoch of a log's history speaks for wrong labels; returns whether it does."""
    found = sign(history)
    if found is not None:
        warnings.warn(
            f"{found}: with keep at {history[-1]['keep']:.2g} trimming trains ever more on what look like wrong labels."
            " Look at them with batchtrim.suspects(log), and leave out the very hardest with "
            "Trimmer(select=batchtrim.between(skip=...)), which is two_sided in the lab.",
            NoiseAmplified,
            stacklevel=stacklevel,
        )
    return found is not None


def sign(history: Sequence[dict[str, Any]]) -> str | None:
    """Return the sign of wrong labels in the last epoch of a log's history, in words; None where there is none."""
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
    """True if more and more of the kept samples are in doubt; ``history`` is a log's, the last epoch the question.

    On clean data the doubtful part of the kept samples falls as the network learns; with random wrong labels it falls
    first and then rises while keep falls.
    """
    if not _falls(history):
        return False
    line = history[-1]
    least = min(each["doubt_kept"] for each in history[:-1] if each["doubt_kept"] is not None)
    enough = line["doubt_kept"] * line["kept"] >= DOUBT_SAMPLES
    return enough and line["doubt_kept"] >= max(DOUBT_AT_LEAST, DOUBT_RISES * least)


def hardest_stay(history: Sequence[dict[str, Any]]) -> bool:
    """True if the hardest samples stay the hardest more than the easiest stay the easiest, as keep falls."""
    if not _falls(history) or history[-1]["keep"] > STAY_JUDGED:
        return False
    if history[-1]["stay_hard"] is None or history[-1]["stay_easy"] is None:
        return False
    samples, excess = stay_excess(history)
    return samples >= STAY_SAMPLES and excess >= STAY_EXCESS


def stay_excess(history: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """Return how much more of the hardest stay than of the easiest, over the epochs that kept little.

    The first number is that of the samples compared; 0 if a rule leaves the hardest out.
    """
    lines = [line for line in history if _compares(line) and line["keep"] < STAY_BELOW]
    samples = sum(line["compared"] for line in lines)
    if not samples or min(line["hard_kept"] for line in lines) < HARD_KEPT:
        return 0, 0.0
    return samples, sum(line["compared"] * (line["stay_hard"] - line["stay_easy"]) for line in lines) / samples


def _compares(line: dict[str, Any]) -> bool:
    """True if an epoch has a hardest and an easiest part: not where it saw nothing, or losses are NaN."""
    return all(line.get(name) is not None for name in ("keep", "compared", "stay_hard", "stay_easy", "hard_kept"))


def _falls(history: Sequence[dict[str, Any]]) -> bool:
    """True if less is kept than before, with predictions and labels to judge by."""
    before = [line["keep"] for line in history[:-1] if line["doubt_kept"] is not None]
    return bool(before) and history[-1]["doubt_kept"] is not None and history[-1]["keep"] < max(before)
