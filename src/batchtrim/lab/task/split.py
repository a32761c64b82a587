"""Set a test split aside: the same fraction of every class, drawn from a seed, with groups kept whole.

N samples, C classes, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["split_rows"]


def split_rows(
    labels: np.ndarray, fraction: float, seed: int = 0, groups: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the training and the test split, each in ascending order.

    Without groups, ``round(fraction * n)`` of each class's n samples are for testing: at least one if a class has
    two, and never all of them. With groups, whole groups are taken in random order if they bring the classes
    closer to that number.

    Args:
        labels: int (N,).
        fraction: in (0, 1).
        seed: of the random draw.
        groups: one name per sample; samples of one group, such as frames of a clip, end up on the same side.

    Raises:
        ValueError: nothing would be left on one side.
    """
    random = np.random.default_rng(seed)
    test = np.zeros(len(labels), dtype=bool)
    if groups is None:
        order = random.permutation(len(labels))
        order = order[np.argsort(labels[order], kind="stable")]
        starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) != 0]) if len(order) else []
        for members in np.split(order, starts[1:]) if len(order) else []:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            test[members[:count]] = True
    else:
        test = _whole_groups(labels, fraction, random, groups)
    if not test.any() or test.all():
        raise ValueError(
            f"expected a `test_split` that leaves images on both sides, got {fraction:g} of {len(labels)} images"
            f"{'' if groups is None else f' in groups that stay whole, of which there are {len(set(groups))}'}."
        )
    return np.flatnonzero(~test), np.flatnonzero(test)


def _whole_groups(
    labels: np.ndarray, fraction: float, random: np.random.Generator, groups: Sequence[str]
) -> np.ndarray:
    """Return bool (N,): a group is taken if that brings the class counts closer to the wanted ones."""
    _, group = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    total = np.bincount(labels).astype(float)
    missing = fraction * total
    test = np.zeros(len(labels), dtype=bool)
    for number in random.permutation(len(members)):
        rows = members[number]
        found, counts = np.unique(labels[rows], return_counts=True)
        weight = total[found]  # so that a small class counts as much as a large one
        before, after = missing[found] / weight, (missing[found] - counts) / weight
        if (after**2).sum() < (before**2).sum():
            missing[found] -= counts
            test[rows] = True
    return test
