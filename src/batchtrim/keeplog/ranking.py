"""Rank samples by how likely it is that their labels are wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from batchtrim._by_name import by_name
from batchtrim._checks import check_count, describe
from batchtrim.keeplog.log import KeepLog

__all__ = ["suspects"]


@by_name
def suspects(log: KeepLog, *, top: int | None = None) -> tuple[Tensor, Tensor]:
    """Return samples ranked by how hard they stayed and how often they were kept; wrong labels rank high.

    The score is a rank, not a probability: 0.99 means that 99 % of the samples rank lower, in clean data too.

    ``score = keep_rate * mean_loss``, given as its rank among all samples. If nothing was ever dropped, this is the
    order of the mean loss over training, the area under the loss curve.

    Args:
        top: return only this many.

    Returns:
        ids int64 and scores in [0, 1], most suspect first. Samples never seen are left out; a NaN loss comes first.

    Notes:
        A high score means hard, and rare or ambiguous samples are hard too: look before you drop any. How the score
        compares with other scores on real label noise is measured in ``studies/label_errors.py``.

    Example:
        >>> from batchtrim import Choice, KeepLog, Selection
        >>> log = KeepLog(3)
        >>> kept = Selection(torch.tensor([1, 2]), size=3, candidates=3)
        >>> log.record(Choice(torch.tensor([0.1, 2.0, 0.4]), kept), ids=torch.arange(3))
        >>> suspects(log, top=2)
        (tensor([1, 2]), tensor([1.0000, 0.5000]))
    """
    if not isinstance(log, KeepLog):
        hint = "Read a file with KeepLog.from_parquet(path)."
        raise TypeError(f"expected `log` to be a batchtrim.KeepLog, got {describe(log)}. {hint}")
    if top is not None:
        check_count("top", top, minimum=0)
    table = log.table()
    ids = torch.nonzero(table["seen"] > 0).flatten()
    score = _ranks(table["keep_rate"][ids] * table["mean"][ids])
    order = torch.argsort(score, descending=True, stable=True)[:top]
    return ids[order], score[order]


def _ranks(values: Tensor) -> Tensor:
    """Return each value's rank in [0, 1]; ties get their mean rank, and NaN ranks highest."""
    values = values.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    ordered = torch.sort(values).values
    low = torch.searchsorted(ordered, values)
    high = torch.searchsorted(ordered, values, right=True) - 1
    return (low + high) / 2 / max(1, len(values) - 1)
