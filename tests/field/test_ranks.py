"""Ranks that differ, as real processes over gloo; the cases are in distributed/field_worker.py.

Each ends in the value of the joined batch or in an error on every rank. Before, most gave each rank a choice of its
own without a word, left a rank waiting, or aborted the process.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import run_ranks

WORKER = Path(__file__).parent.parent / "distributed" / "field_worker.py"


@pytest.mark.parametrize(
    "cases",
    [
        "first_call results failing_rule arguments masked_on_one_rank padded_on_one_rank terms_of_a_sum "
        "without_samples foreign_group half_precision",
        pytest.param(
            "entries_of_a_trace half_precision_windows empty_micro_batches uneven_windows other_collectives keep_logs "
            "other_numbers_of_calls other_groups",
            marks=pytest.mark.slow,
        ),
        pytest.param("forward_that_waits", marks=pytest.mark.slow),  # FSDP's imports take longer than the rest
    ],
)
def test_ranks_agree_or_all_of_them_raise(cases: str, tmp_path: Path) -> None:
    run_ranks(WORKER, 2, tmp_path, cases)
