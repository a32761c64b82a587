"""Merge the terms of a loss into one value for each sample or element to choose from.

Legend: B batch, t entries per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from batchtrim.integrations._recorder import NotFound
from batchtrim.unreduced import Losses, flatten, nonzero, sum_of

__all__ = ["Term", "merged", "summed"]


class Term(NamedTuple):
    """One term of a loss, ``sum(values) / divisor``; the divisor is the sum of ``weights``, else the counted entries.

    Attributes:
        values: (B, t).
        counted: bool, as many entries; None if all count.
        weights: as many entries, or None.
    """

    values: Tensor
    counted: Tensor | None
    weights: Tensor | None

    def numbers(self) -> Tensor:
        """Return what each sample adds to the divisor, (B,)."""
        counts = self.counted if self.weights is None else self.weights
        counts = torch.ones_like(self.values) if counts is None else counts
        return counts.reshape(self.values.shape).sum(1).to(self.values.dtype)


def summed(terms: Sequence[Term], alike: bool, unit: str) -> Losses:
    """Return the losses to choose from, with the terms apart if they are not ``alike``; see :func:`merged`."""
    if alike or (unit == "element" and any(term.values.shape[1] > 1 for term in terms)):
        return merged(terms, alike, unit)[0]
    return sum_of([_of_one(term, unit) for term in terms], unit)


def merged(terms: Sequence[Term], alike: bool, unit: str) -> tuple[Losses, Tensor | None]:
    """Return the losses to choose from (keeping all gives the sum of the terms), and what to rank them by.

    Args:
        alike: the terms have the same entries with the same weights, so that they add up entry by entry.
        unit: "sample" or "element".

    Returns:
        Losses, and scores (B,), None if the losses' own values are ranked.

    Raises:
        NotFound: elements are to be chosen, but the terms have different entries.
    """
    if alike:
        values = terms[0].values if len(terms) == 1 else torch.stack([term.values for term in terms]).sum(0)
        return _of_one(terms[0]._replace(values=values), unit), None
    if unit == "element" and any(term.values.shape[1] > 1 for term in terms):
        raise NotFound("it has several terms, of different entries, and `unit` is 'element'")
    numbers = [term.numbers() for term in terms]
    counted = torch.stack([each > 0 for each in numbers]).any(0)
    shares = [term.values.sum(1) / nonzero(each.sum()) for term, each in zip(terms, numbers, strict=True)]
    # what each sample adds to L; ranked by its loss alone
    alone = [term.values.detach().sum(1) / nonzero(each) for term, each in zip(terms, numbers, strict=True)]
    return Losses(torch.stack(shares).sum(0) * counted.sum(), counted), torch.stack(alone).sum(0)


def _of_one(term: Term, unit: str) -> Losses:
    values = term.values
    counted = None if term.counted is None else term.counted.reshape(values.shape)
    weights = None if term.weights is None else term.weights.reshape(values.shape)
    if values.shape[1] == 1:
        return Losses(
            values[:, 0], None if counted is None else counted[:, 0], None if weights is None else weights[:, 0]
        )
    return flatten(Losses(values, counted, weights), unit)
