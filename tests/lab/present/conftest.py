"""Shared by the tests of pages."""

from __future__ import annotations

import pytest


@pytest.fixture
def rows(make_row):
    errors = {
        "full": [0.100, 0.110, 0.120, 0.130, 0.140],
        "trim": [0.090, 0.101, 0.110, 0.121, 0.130],
        "random": [0.110, 0.105, 0.130, 0.120, None],
    }
    return [make_row(method, seed, error) for method, each in errors.items() for seed, error in enumerate(each)]
