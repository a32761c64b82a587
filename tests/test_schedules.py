"""Schedules: values by hand, exact ends, faults found early."""

from __future__ import annotations

import copy
import pickle

import pytest

import batchtrim
from batchtrim import by_accuracy, constant, cosine, linear, piecewise
from batchtrim.schedules import join, step


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (linear(1.0, 0.2), {0.0: 1.0, 0.25: 0.8, 0.5: 0.6, 1.0: 0.2}),
        (linear(0.2, 1.0), {0.0: 0.2, 1.0: 1.0}),
        (constant(0.3), {0.0: 0.3, 1.0: 0.3}),
        (cosine(1.0, 0.2), {0.0: 1.0, 0.25: 0.8828427, 0.5: 0.6, 1.0: 0.2}),
        (step({0.75: 0.3, 0.5: 0.6}), {0.0: 1.0, 0.4999: 1.0, 0.5: 0.6, 0.75: 0.3, 1.0: 0.3}),
        (piecewise({0.2: 1.0, 0.6: 0.4, 0.8: 0.2}), {0.0: 1.0, 0.2: 1.0, 0.4: 0.7, 0.6: 0.4, 0.7: 0.3, 1.0: 0.2}),
        (
            join([0.9, linear(0.8, 0.4), constant(0.2)], at=[0.5, 0.9]),
            {0.0: 0.9, 0.5: 0.8, 0.7: 0.6, 0.9: 0.2, 1.0: 0.2},
        ),
        (by_accuracy(), {0.0: 1.0, 0.79: 1.0, 0.8: 0.5, 0.9: 0.25, 0.95: 0.125, 0.995: 0.0625, 1.0: 0.0625}),
    ],
)
def test_values_repr_and_copies(schedule: batchtrim.schedules.Schedule, values: dict[float, float]) -> None:
    for progress, keep in values.items():
        assert schedule(progress) == pytest.approx(keep, abs=1e-6)
    assert eval(repr(schedule), vars(batchtrim.schedules)) == schedule, "what repr prints is what one types"
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin == schedule


@pytest.mark.parametrize("schedule", [linear(1.0, 0.2), cosine(1.0, 0.2)])
def test_ends_are_exact(schedule: batchtrim.schedules.Schedule) -> None:
    assert schedule(0.0) == 1.0
    assert schedule(1.0) == 0.2, "1.0 + (0.2 - 1.0) would be 0.19999999999999996"


@pytest.mark.parametrize("value", [0, 1.5, -1, float("nan"), 50])
def test_keep_out_of_range(value: float) -> None:
    for make in (constant, linear, lambda v: cosine(1.0, v), lambda v: step({0.5: v}), lambda v: piecewise({0: v})):
        with pytest.raises(ValueError, match=r"in \(0, 1\], got .*fraction of the batch, not a percentage or a count"):
            make(value)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="expected `keep` to be a number, got '20%'"):
        constant("20%")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one place fewer in `at`"):
        join([0.5, 0.4], at=[])
    with pytest.raises(ValueError, match="rise strictly"):
        join([0.5, 0.4, 0.3], at=[0.6, 0.5])
    with pytest.raises(ValueError, match="driven by accuracy"):
        join([by_accuracy(), 0.3], at=[0.5])
    with pytest.raises(TypeError, match="mapping such as"):
        step([0.5])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 2"):
        piecewise({2: 0.5})
    with pytest.raises(TypeError, match="expected `keep` to be a schedule, a number"):
        batchtrim.Trimmer(linear, total=3)  # the class, not an instance
