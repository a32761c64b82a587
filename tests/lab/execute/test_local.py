"""Workers that end before their run is done: the likeliest reason is reported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from batchtrim.lab.execute.local import _likely


@pytest.mark.parametrize(
    ("code", "says"), [(-9, "Out of memory?"), (-11, "ended by signal 11 (Segmentation fault)"), (5, "os._exit")]
)
def test_the_likeliest_reason_follows_from_the_exit_code(code: int, says: str) -> None:
    """All of them read "Out of memory?"."""
    worker: Any = SimpleNamespace(process=SimpleNamespace(exitcode=code))
    assert says in _likely(worker)
