"""Test splits: every class in proportion, groups kept whole."""

from __future__ import annotations

import numpy as np
import pytest

from batchtrim.lab.task.split import split_rows


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_several_classes_come_close_to_the_fraction_asked_for(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 5, 2000)
    groups = [str(each) for each in random.integers(0, 200, 2000)]
    train, test = split_rows(labels, 0.2, seed, groups)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(2000))
    assert np.bincount(labels[test]) / np.bincount(labels) == pytest.approx([0.2] * 5, abs=0.04)


@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_a_split_that_leaves_one_side_empty_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"got {fraction:g} of 6 images in groups that stay whole, of which .* 1"):
        split_rows(np.array([0, 0, 0, 1, 1, 1]), fraction, 0, ["all"] * 6)
